"""The recognizer at W8A8 with min-max ranges from ever more calibration lines, read on 150 lines; under a minute.

python data/recipes/more_samples.py data/results/measured/03_samples.json
"""

from __future__ import annotations

import sys

import onnxruntime as ort
from record import record

from qtools import zoo
from qtools.ptq import fuse, graph
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, quantize_network

COUNTS, LINES = (20, 60, 100, 200), 150


def curve() -> dict[str, float]:
    """Percent of lines right after each number of calibration lines."""
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}))
    inputs, texts = zoo.recognizer_lines(LINES, 1234)
    samples, _ = zoo.recognizer_lines(max(COUNTS), 999)
    alphabet = zoo.characters(zoo.text_recognizer())
    options = Options(use_per_channel_quantization=True, use_per_row_quantization=True)
    found = {}
    for count in COUNTS:
        watched = calibrate(network, ({"x": line[None]} for line in samples[:count]), methods=("min_max",))
        quantized = quantize_network(network, (), options, calibration=watched).network
        session = ort.InferenceSession(quantized.SerializeToString(), providers=["CPUExecutionProvider"])
        told = [zoo.decode(session.run(None, {"x": line[None]})[0], alphabet)[0] for line in inputs]
        found[f"min_max_after_{count}"] = zoo.exact_match(told, texts)
    return found


def main() -> None:
    """Write the curve where the chapter looks for it."""
    values = curve()
    print(values)
    record(sys.argv[1], values)


if __name__ == "__main__":
    main()
