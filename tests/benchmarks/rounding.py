"""Rounding of weights: what it keeps of the digits network, in how long, and what the text recognizer costs."""

import json
import subprocess
import sys
import time

import numpy as np

from qtools import zoo
from qtools.affine import Grid, choose_qparams
from qtools.metrics import sqnr_db
from qtools.ptq import calibrate, convert, fuse, graph, rounding, write
from tests.benchmarks.calibration import peak_gibibytes

SEEDS = (0, 1, 2)
# Bits, per channel: the SQNR in dB to reach; AIMET's AdaRound of 2,000 iterations, the better of its two schemes.
AIMS = {(4, True): 22.9, (3, True): 16.3, (4, False): 19.7, (3, False): 14.4}
SOLVERS = {
    "nearest": (rounding.Nearest(), {"bias": False}),
    "nearest, best bias": (rounding.Nearest(), {}),
    "GPTQ": (rounding.GPTQ(), {}),
    "GPTQ, descent": (rounding.Descent(), {}),
    "AdaRound": (rounding.AdaRound(), {}),
    "scales, GPTQ, descent": (rounding.Descent(), {"clips": rounding.CLIPS}),
    "scales, AdaRound": (rounding.AdaRound(), {"clips": rounding.CLIPS}),
}
FAST, SLOW = "scales, GPTQ, descent", "scales, AdaRound"
SECONDS, MINUTES, GIBIBYTES = 45, 10, 2.0  # the aims: 2,000 iterations on the digits, and the recognizer's


def digits(bits: int, per_channel: bool, seed: int) -> dict[str, tuple[float, float, float]]:
    """By solver: SQNR of the test logits (dB), percent right, seconds; 8-bit activations, 256 images to calibrate."""
    train, _, test, labels = zoo.digits()
    base = graph.prepare(zoo.digits_cnn("mini"))
    network, real = fuse.fuse(base), convert.Runner(base, ["output"])(test)[0]
    images = train[np.random.default_rng(1000 + seed).choice(len(train), 256, replace=False)]
    samples = [images[begin : begin + 64] for begin in range(0, 256, 64)]
    tensors, view = write.quantized_tensors(network), fuse.View(network)
    seen = calibrate.calibrate(network, samples, methods=("min_max",))
    activations = {name: seen.qparams(root, Grid(8)) for name, root in tensors.activations.items()}
    params = {name: choose_qparams(view.value(name), Grid(8)) for name in tensors.constants}
    for name, axis in tensors.weights.items():
        values = view.value(name)
        blocks = tuple(1 if per_channel and i == axis else -1 for i in range(values.ndim))
        grid = Grid(bits, signed=True, symmetric=True, block_size=blocks)
        params[name] = choose_qparams(values, grid, symmetric_scale="no_clipping")  # as AIMET does
    found = {}
    for name, (solver, more) in SOLVERS.items():
        start = time.perf_counter()
        done = rounding.round_network(network, activations, params, samples, solver, tensors=tensors, **more)
        seconds = time.perf_counter() - start
        rounded = graph.replace_weights(network, done.values)
        quantized = write.write_simulation(rounded, activations, done.params, tensors)
        logits = convert.Runner(quantized, ["output"])(test)[0]
        found[name] = sqnr_db(real, logits), 100 * (logits.argmax(1) == labels).mean(), seconds
    return found


def recognizer(lines: int) -> tuple[float, int]:
    """Seconds and layers; W8A8, weights per tensor."""
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}))
    samples = [line[None] for line in zoo.recognizer_lines(lines, 999)[0]]
    seen = convert.quantize_network(network, samples[:20], convert.Options())
    activations, params = (
        {name: one.qparams(shapes.get(name, ())) for name, one in entries.items()}
        for entries, shapes in (
            (seen.encodings.activations, {}),
            (seen.encodings.params, {tensor.name: tuple(tensor.dims) for tensor in network.graph.initializer}),
        )
    )
    start = time.perf_counter()
    done = rounding.round_network(network, activations, params, samples, tensors=seen.tensors, progress=True)
    return time.perf_counter() - start, len(done.layers)


def bench(lines: int) -> list[str]:
    """Print SQNR, accuracy and seconds; return the aims missed."""
    missed = []
    for (bits, per_channel), aim in AIMS.items():
        print(f"\nthe digits, W{bits}A8 per {'channel' if per_channel else 'tensor'}, mean of {len(SEEDS)} seeds")
        rows = [digits(bits, per_channel, seed) for seed in SEEDS]
        means = {name: np.mean([row[name] for row in rows], axis=0) for name in SOLVERS}
        for name, (decibels, right, seconds) in means.items():
            print(f"  {decibels:6.1f} dB  {right:6.2f} % right  {seconds:6.1f} s  {name}")
        missed += [f"W{bits}: not {aim} dB with {name}" for name in (FAST, SLOW) if not means[name][0] >= aim]
        missed += [f"W{bits}: not in {SECONDS} s" for name in (FAST, SLOW) if not means[name][2] <= SECONDS]
    command = [sys.executable, "-m", "tests.benchmarks.rounding", str(lines)]
    row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()[-1])
    print(f"\nthe text recognizer, {row['layers']} layers, {lines} lines: ", end="")
    print(f"{row['seconds']:.0f} s, {row['gibibytes']:.2f} GiB at most")
    missed += [] if row["gibibytes"] < GIBIBYTES else [f"rounding: not below {GIBIBYTES} GiB"]
    return missed + ([] if row["seconds"] < 60 * MINUTES else [f"rounding: not in {MINUTES} minutes"])


def main(lines: str) -> None:
    """Measure the recognizer in this process."""
    seconds, layers = recognizer(int(lines))
    print(json.dumps({"seconds": seconds, "layers": layers, "gibibytes": peak_gibibytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
