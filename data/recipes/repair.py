"""The recognizer of printed lines, repaired in every way that chapter 3 offers, on the 3 x 600 lines of recognizer.py.

Some twenty minutes and 1 GB.  Run from the repository:

    python data/recipes/repair.py data/results/measured/03_repair.json
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

from recognizer import LINES, SEEDS, SHAPE, right
from record import ahead, means, record

from qtools import zoo
from qtools.encodings import Rule
from qtools.ptq import fuse, graph
from qtools.ptq.convert import Options, quantize_network
from qtools.ptq.write import quantized_tensors

CALIBRATION = 60
EARLY = 0.3  # of the activations, the first ones, that get 16 bits in a mixed network

TENSOR = Options(
    act_quantizer_calibration="percentile",
    percentile_calibration_value=99.999,
    param_quantizer_schema="symmetric",
)
CHANNEL = replace(TENSOR, use_per_channel_quantization=True, use_per_row_quantization=True)


def early(network: object) -> list[Rule]:
    """16 bits for the first tensors that the network computes, and for those that are only moved."""
    activations = quantized_tensors(network).activations
    roots = list(dict.fromkeys(activations.values()))
    first = set(roots[: int(EARLY * len(roots))])
    return [Rule(name, 16, None, "activation") for name, root in activations.items() if root in first]


def networks() -> tuple[dict[str, object], dict[str, float]]:
    """The float network and the quantized ones by name, and how many seconds each took to make."""
    fused = fuse.fuse(graph.prepare(zoo.text_recognizer(), SHAPE))
    samples = [{"x": line[None]} for line in zoo.recognizer_lines(CALIBRATION, 999)[0]]
    found, seconds = {"float": fused}, {}
    wanted = {
        f"w8a8_{grain}_{name}": replace(options, algorithms=algorithms)
        for grain, options in (("channel", CHANNEL), ("tensor", TENSOR))
        for name, algorithms in (("nearest", ()), ("bc", ("bc",)), ("gptq", ("gptq",)))
    }
    wanted["w4a8_channel_nearest"] = replace(CHANNEL, weight_bw=4)
    wanted["w4a8_channel_gptq"] = replace(CHANNEL, weight_bw=4, algorithms=("seqmse", "gptq"))
    for key, options in wanted.items():
        start = time.perf_counter()
        found[key] = quantize_network(fused, samples, options).network
        seconds[key] = time.perf_counter() - start
        print(key, round(seconds[key]), "s", flush=True)
    for name, algorithms in (("nearest", ()), ("gptq", ("gptq",))):
        found[f"mixed_channel_{name}"] = quantize_network(
            fused, samples, replace(CHANNEL, algorithms=algorithms), early(fused)
        ).network
    return found, seconds


def table() -> dict[str, float]:
    """How many lines each reads right, and how far it is from the float network (95 % intervals of the difference)."""
    alphabet, (made, seconds) = zoo.characters(zoo.text_recognizer()), networks()
    hits, values = {name: [] for name in made}, {f"{name}_seconds": value for name, value in seconds.items()}
    for seed in SEEDS:
        inputs, texts = zoo.recognizer_lines(LINES, seed)
        for name, network in made.items():
            hits[name].append(right(network, inputs, texts, alphabet))
            values[f"{name}_{seed}"] = 100 * float(hits[name][-1].mean())
            print(seed, name, values[f"{name}_{seed}"], flush=True)
    return values | means(hits) | ahead(hits, "float", "ahead")


def main() -> None:
    """Write the table where the chapter looks for it."""
    record(sys.argv[1], table())


if __name__ == "__main__":
    main()
