"""Sensitivity beside the loop that writes and runs the whole network for every change, on digits and on text lines.

python -m tests.benchmarks.mixed_precision
"""

import sys
import time

import joblib
import numpy as np
from scipy.stats import spearmanr

from qtools import zoo
from qtools.ptq import calibrate, fuse, graph
from qtools.ptq.convert import Options
from qtools.ptq.sensitivity import FLOAT, Sensitivity, _feeds, _session, candidates, owners, proxy, sensitivity
from qtools.ptq.write import quantized_tensors, write_qdq

ALONE, TWO, PROXY = 1.6, 3.0, 20  # times as fast as the loop: the aims
BITS = (4, 8, 16)
FINE = Options(
    use_per_channel_quantization=True,
    use_per_row_quantization=True,
    act_quantizer_calibration="percentile",
    percentile_calibration_value=99.999,
)


def loop(network, samples, calibration, options, direction, bits, units, base=8, subsets=4) -> np.ndarray:
    """The noise that each change adds, of shape (units, bits, subsets): every change a whole network, all of it run."""
    tensors, constants = quantized_tensors(network), owners(network)
    encodings = candidates(network, calibration, options, {*bits, base})
    every = [*dict.fromkeys(tensors.activations.values()), *tensors.weights]
    feeds = [_feeds(network, samples[i::subsets]) for i in range(subsets)]
    name = network.graph.output[0].name

    def outputs(types: dict[str, int]) -> list[np.ndarray]:
        full = types | {c: max(types.get(root, FLOAT) for root in roots) for c, roots in constants.items()}
        wide = {n: full[root] for n, root in tensors.activations.items() if full.get(root, FLOAT) != FLOAT}
        params = {n: encodings[n][b] for n, b in full.items() if n not in tensors.activations and b != FLOAT}
        model = write_qdq(network, {n: encodings[n][b] for n, b in wide.items()}, params, tensors)
        session = _session(model, 1)
        return [np.concatenate([session.run([name], feed)[0] for feed in part]) for part in feeds]

    def noise(types: dict[str, int]) -> np.ndarray:
        pairs = zip(outputs(types), real)
        return np.array([np.square(a - b, dtype=float).sum() / np.square(b, dtype=float).sum() for a, b in pairs])

    real = outputs({})
    others = {} if direction == "one_quantized" else dict.fromkeys(every, base)
    before = noise(others)
    return np.array([[noise(others | {unit: width}) - before for width in bits] for unit in units])


def timed(call, *args, **more) -> tuple[float, object]:
    start = time.perf_counter()
    found = call(*args, **more)
    return time.perf_counter() - start, found


def compare(what, network, samples, calibration, options, direction, bits, units) -> list[str]:
    """Print one line of the table; return the aims missed."""
    asked = dict(options=options, direction=direction, bits=bits, units=units)
    slow, expected = timed(loop, network, samples, calibration, options, direction, bits, units)
    alone, found = timed(sensitivity, network, samples, calibration, **asked)
    with joblib.parallel_config("loky", n_jobs=2):
        sensitivity(network, samples[:4], calibration, **asked | {"units": units[:4]})  # starts the workers
        two, _ = timed(sensitivity, network, samples, calibration, **asked)
    off = float(np.abs(found.noise - expected).max())
    print(
        f"{what:28} {direction:14} loop {slow:6.1f} s, ours {alone:6.1f} s ({slow / alone:.2f} x), two workers "
        f"{two:6.1f} s ({slow / two:.2f} x); {100 * found.rerun:.0f} % run again; largest difference {off:.1e}",
        flush=True,
    )
    missed = [f"{what} {direction}: another number than the loop's ({off:.1e})"] if off > 1e-6 else []
    missed += [f"{what} {direction}: {slow / alone:.2f} x alone, aim {ALONE}"] if slow / alone < ALONE else []
    return missed + ([f"{what} {direction}: {slow / two:.2f} x with two, aim {TWO}"] if slow / two < TWO else [])


def guesses(what, network, samples, calibration, options, bits) -> list[str]:
    """Rank correlation of the cheap guesses with the measured ranking, and how much sooner they are there."""
    slow, true = timed(sensitivity, network, samples, calibration, options=options, bits=bits)
    missed = []

    def show(kind: str, seconds: float, guess: Sensitivity) -> None:
        cells = [f"{spearmanr(guess.noise[:, k].mean(1), true.noise[:, k].mean(1))[0]:.2f}" for k in range(len(bits))]
        per = ", ".join(f"{width} bits {cell}" for width, cell in zip(bits, cells))
        print(f"{what:28} {kind:14} Spearman {per}; {slow / seconds:.0f} x sooner", flush=True)
        if slow / seconds < PROXY:
            missed.append(f"{what} {kind}: {slow / seconds:.0f} x sooner, aim {PROXY}")

    for kind in ("local", "hessian"):
        show(kind, *timed(proxy, network, samples[:2], calibration, kind, options=options, bits=bits))
    return missed


def bench(lines: int = 24) -> list[str]:
    """Print the tables; return the aims missed."""
    network = fuse.fuse(graph.prepare(zoo.digits_cnn("skew")))
    images = np.concatenate([part for part in zoo.digits() if part.ndim == 4])
    calibration = calibrate.calibrate(network, [images[i : i + 1] for i in range(64)], methods=("min_max",))
    tensors = quantized_tensors(network)
    digits = network, [image[None] for image in images], calibration, Options()
    units, missed = [*dict.fromkeys(tensors.activations.values()), *tensors.weights], []
    for direction in ("one_quantized", "one_spared"):
        missed += compare(f"digits, {len(images)} images", *digits, direction, BITS, units)
    missed += guesses("digits", *digits, BITS)
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}))
    samples = [line[None] for line in zoo.recognizer_lines(4 * lines, 999)[0]]
    calibration = calibrate.calibrate(network, samples, methods=("min_max", "percentile"), percentile=99.999)
    tensors = quantized_tensors(network)
    units = [*dict.fromkeys(tensors.activations.values()), *tensors.weights][::4]
    for direction in ("one_quantized", "one_spared"):
        text = network, samples[:lines], calibration, FINE, direction, (8, 16), units
        missed += compare(f"recognizer, {lines} lines", *text)
    return missed + guesses(f"recognizer, {4 * lines} lines", network, samples, calibration, FINE, (8, 16))


if __name__ == "__main__":
    found = bench()
    print("\n".join(["aims missed:", *found] if found else ["every aim met"]))
    sys.exit(bool(found))
