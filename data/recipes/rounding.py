"""The digit networks in every scheme that other tools publish, with everything this course has to repair them.

Three calibration sets of 256 training digits each, as the figures of the other tools have them; about ten minutes, of
which AdaRound takes most.  Run from the repository:

    python data/recipes/rounding.py data/results/measured/03_rounding.json
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator

import numpy as np
from record import record

from qtools import zoo
from qtools.affine import Grid, fake_quantize
from qtools.metrics import sqnr_db
from qtools.observers import OBSERVERS
from qtools.ptq import equalize, fuse, graph, rounding
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Runner
from qtools.ptq.write import fit_biases, quantized_tensors, write_simulation

SEEDS = (0, 1, 2)
SCHEMES = ((8, 8), (8, 16), (4, 16), (4, 8), (3, 8), (4, 4))
METHODS = ("nearest", "mse", "bc", "gptq", "clipped", "adaround")
"""Nearest with min-max scales or those of least squared error; bias correction; GPTQ and descent, the last with scales
chosen by the output too; AdaRound with 2,000 iterations."""


def prepared(variant: str, equalized: bool) -> object:
    """A digit network, its ReLU6 made ReLU and its channels equalized if asked."""
    network = fuse.fuse(graph.prepare(zoo.digits_cnn(variant)))
    return equalize.equalize(network, relu6="replace").network if equalized else network


def quantized(network: object, samples: list, bits: tuple[int, int], channel: bool, method: str) -> object:
    """The simulation of one scheme, repaired by one method."""
    tensors = quantized_tensors(network)
    watched = calibrate(network, samples, methods=("min_max", "mse"))
    act_method = "mse" if bits[1] < 8 or method == "mse" else "min_max"
    acts = {name: watched.qparams(root, Grid(bits[1]), act_method) for name, root in tensors.activations.items()}
    params = {}
    for weight in graph.weights(network).values():
        blocks = tuple(1 if channel and axis == weight.channel_axis else -1 for axis in range(weight.values.ndim))
        grid = Grid(bits[0], signed=True, symmetric=True, block_size=blocks)
        observer = OBSERVERS["mse" if method == "mse" else "min_max"](block_size=blocks)
        params[weight.name] = observer.update(weight.values).qparams(grid)
    params = fit_biases(network, acts, params, tensors)
    if method == "bc":
        values = {name: fake_quantize(fuse.View(network).value(name), one) for name, one in params.items()}
        network = equalize.correct_biases(network, values, samples).network
    elif method in ("gptq", "clipped", "adaround"):
        solver = rounding.AdaRound() if method == "adaround" else rounding.Descent()
        clips = rounding.CLIPS if method == "clipped" else ()
        done = rounding.round_network(network, acts, params, samples, solver, tensors=tensors, clips=clips)
        network, params = graph.replace_weights(network, done.values), done.params
    return write_simulation(network, acts, params, tensors)


def wanted() -> Iterator[tuple[str, bool, tuple[int, int], str, str, tuple[int, ...]]]:
    """Variant, whether equalized, bits, granularity, method and seeds; AdaRound only where others report it, once."""
    grains = ("channel", "tensor")
    for variant, cle, bits, grain, method in itertools.product(
        ("mini", "skew"), (False, True), SCHEMES, grains, METHODS
    ):
        if method != "adaround":
            yield variant, cle, bits, grain, method, SEEDS
        elif variant == "mini" and not cle and bits in ((4, 8), (3, 8)):
            yield variant, cle, bits, grain, method, SEEDS[:1]


def main() -> None:
    """Write the results where the chapter looks for them."""
    train, _, images, labels = zoo.digits()
    networks = {(variant, cle): prepared(variant, cle) for variant in ("mini", "skew") for cle in (False, True)}
    real = {variant: Runner(networks[variant, False], ["output"])({"input": images})[0] for variant in ("mini", "skew")}
    values: dict[str, float] = {}
    for variant, cle, bits, grain, method, seeds in wanted():
        found = []
        for seed in seeds:
            chosen = np.random.default_rng(1000 + seed).choice(1257, 256, replace=False)
            samples = [{"input": part} for part in np.split(train[chosen], 4)]
            start = time.perf_counter()
            model = quantized(networks[variant, cle], samples, bits, grain == "channel", method)
            seconds = time.perf_counter() - start
            out = Runner(model, ["output"])({"input": images})[0]
            found.append((sqnr_db(real[variant], out), 100 * np.mean(out.argmax(1) == labels), seconds))
        key = f"{variant}{'_cle' * cle}_w{bits[0]}a{bits[1]}_{grain}_{method}"
        for name, value in zip(("db", "right", "seconds"), np.mean(found, axis=0)):
            values[f"{key}_{name}"] = round(float(value), 3)
        print(key, *np.mean(found, axis=0).round(2), flush=True)
    record(sys.argv[1], values)


if __name__ == "__main__":
    main()
