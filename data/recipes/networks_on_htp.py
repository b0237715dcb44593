"""Whole networks on the HTP backend (emulated): the direction classifier on 100 lines, the recognizer on 8.

Some minutes.  Run from the repository:

    python data/recipes/networks_on_htp.py data/results/measured/03_htp.json
"""

from __future__ import annotations

import sys

import numpy as np
from record import record

from qtools import zoo
from qtools.metrics import sqnr_db
from qtools.npu import htp
from qtools.ptq import fuse, graph
from qtools.ptq.convert import Options, Runner, quantize_network

OPTIONS = Options(
    act_quantizer_calibration="percentile",
    percentile_calibration_value=99.999,
    use_per_channel_quantization=True,
    use_per_row_quantization=True,
)


def classifier(batch: int = 20, lines: int = 100) -> dict[str, float]:
    """Accuracy of the backend and of the simulation, and how often they agree."""
    samples, _ = zoo.classifier_lines(100, 999)
    inputs, labels = zoo.classifier_lines(lines, 1234)
    network = fuse.fuse(graph.prepare(zoo.direction_classifier(), {"x": (batch, 3, 48, 192)}))
    batches = np.split(samples, range(batch, len(samples), batch))
    done = quantize_network(network, ({"x": part} for part in batches), OPTIONS)
    name = network.graph.output[0].name
    simulated = Runner(done.network, [name])
    session = htp.session(done.network)
    ours, theirs = [], []
    for part in np.split(inputs, range(batch, lines, batch)):
        ours.append(simulated({"x": part})[0])
        theirs.append(htp.quietly(session.run, [name], {"x": part})[0])
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    return {
        "htp_classifier_lines": lines,
        "htp_classifier_right": 100 * np.mean(theirs.argmax(1) == labels),
        "htp_classifier_simulated_right": 100 * np.mean(ours.argmax(1) == labels),
        "htp_classifier_agree": 100 * np.mean(theirs.argmax(1) == ours.argmax(1)),
        "htp_classifier_db": sqnr_db(ours, theirs),
    }


def recognizer(lines: int = 8) -> dict[str, float]:
    """The same for the recognizer; a line is right if every letter is."""
    samples, _ = zoo.recognizer_lines(50, 999)
    inputs, texts = zoo.recognizer_lines(lines, 1234)
    alphabet = zoo.characters(zoo.text_recognizer())
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}))
    done = quantize_network(network, ({"x": line[None]} for line in samples), OPTIONS)
    name = network.graph.output[0].name
    simulated, session = Runner(done.network, [name]), htp.session(done.network)
    ours = np.concatenate([simulated({"x": line[None]})[0] for line in inputs])
    theirs = np.concatenate([htp.quietly(session.run, [name], {"x": line[None]})[0] for line in inputs])
    return {
        "htp_recognizer_lines": lines,
        "htp_recognizer_right": zoo.exact_match(zoo.decode(theirs, alphabet), texts),
        "htp_recognizer_simulated_right": zoo.exact_match(zoo.decode(ours, alphabet), texts),
        "htp_recognizer_agree": 100 * np.mean(theirs.argmax(2) == ours.argmax(2)),
        "htp_recognizer_db": sqnr_db(ours, theirs),
    }


def main() -> None:
    """Write the results where the chapter looks for them."""
    values = classifier() | recognizer()
    print(values)
    record(sys.argv[1], values, htp.status().reason)


if __name__ == "__main__":
    main()
