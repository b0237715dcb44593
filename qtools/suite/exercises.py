"""The automatic checks behind the exercises at the end of every chapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtools.affine import Grid, bits_per_weight, choose_qparams, fake_quantize, qparams_from_range
from qtools.metrics import sqnr_db
from qtools.npu.integer import requantize_float


def exercise(number: str, answer: Callable[..., Any]) -> str:
    """Check a reader's function and say, in one line, how it did.

    Raises
    ------
    KeyError
        If there is no such exercise.
    """
    check, hint = _CHECKS[number]
    try:
        verdict = check(answer)
    except Exception as error:
        return f"Exercise {number}: your code stopped with {type(error).__name__}: {error}"
    if verdict is None:
        return f"Exercise {number}: waiting for your code."
    return f"Exercise {number}: right!" if verdict else f"Exercise {number}: not yet. {hint}"


def _grid_of_a_range(answer: Callable[[float, float], Any]) -> bool | None:
    """1.1: scale and zero point of an unsigned 4-bit grid for any range."""
    for low, high in [(-1.0, 2.0), (-0.25, 3.5), (1.0, 2.0), (-3.0, -1.0)]:
        given = answer(low, high)
        if given is None:
            return None
        right = qparams_from_range(np.float64(low), np.float64(high), Grid(bits=4))
        if not (np.isclose(given[0], right.scale) and given[1] == right.zero_point):
            return False
    return True


def _bits_for(answer: Callable[[float], Any]) -> bool | None:
    """1.2: the fewest bits for a wanted SQNR on uniform data."""
    if answer(40.0) is None:
        return None
    x = np.random.default_rng(7).uniform(-1, 1, 50_000)

    def reached(bits: int) -> float:
        grid = Grid(bits)
        return sqnr_db(x, fake_quantize(x, qparams_from_range(x.min(), x.max(), grid)))

    return all(reached(answer(goal)) >= goal > reached(answer(goal) - 1) for goal in (12.0, 40.0, 61.0, 75.0))


def _better_than_min_max(answer: Callable[[np.ndarray], Any]) -> bool | None:
    """1.3: a clipping limit at 4 bits that gains 3 dB over min-max on long-tailed data."""
    x = np.random.default_rng(8).laplace(size=20_000).astype(np.float32)
    if (limit := answer(x)) is None:
        return None
    grid = Grid(bits=4, signed=True, symmetric=True)

    def quality(end: float) -> float:
        return sqnr_db(x, fake_quantize(x, qparams_from_range(np.float32(-end), np.float32(end), grid)))

    return quality(float(limit)) > quality(float(np.abs(x).max())) + 3


def _storage_of(answer: Callable[[int, int], Any]) -> bool | None:
    """2.1: bits per weight of an asymmetric grid in groups."""
    if answer(4, 128) is None:
        return None
    cases = [(4, 128), (4, 32), (8, 16), (3, 64)]
    return all(
        np.isclose(answer(bits, group), bits_per_weight(Grid(bits, block_size=(1, group)), (16, 1024)))
        for bits, group in cases
    )


def _symmetric(bits: int, group: int) -> Grid:
    return Grid(bits, signed=True, symmetric=True, narrow_range=True, block_size=(1, group))


def _in_groups(answer: Callable[[np.ndarray, int, int], Any]) -> bool | None:
    """2.2: quantize and dequantize in groups, from scratch."""
    w = np.random.default_rng(9).standard_normal((6, 96)).astype(np.float32)
    for bits, group in [(4, 32), (3, 8), (8, 96)]:
        if (given := answer(w.copy(), bits, group)) is None:
            return None
        right = fake_quantize(w, choose_qparams(w, _symmetric(bits, group)))
        if np.shape(given) != w.shape or not np.allclose(given, right, atol=1e-5):
            return False
    return True


def _spend(answer: Callable[[np.ndarray, float], Any]) -> bool | None:
    """2.3: the best width and group size under a budget of bits per weight."""
    rng = np.random.default_rng(10)
    w = (rng.standard_normal((32, 512)) * np.exp(rng.standard_normal((32, 512)) / 2)).astype(np.float32)
    choices = [(bits, group) for bits in range(3, 9) for group in (16, 32, 64, 128, 256, 512)]
    quality = {
        (bits, group): sqnr_db(w, fake_quantize(w, choose_qparams(w, _symmetric(bits, group))))
        for bits, group in choices
    }
    for budget in (4.1, 4.6, 6.0):
        if (given := answer(w.copy(), budget)) is None:
            return None
        affordable = [choice for choice in choices if bits_per_weight(_symmetric(*choice), w.shape) <= budget]
        if tuple(given) not in affordable or quality[tuple(given)] < max(quality[c] for c in affordable) - 0.01:
            return False
    return True


def _min_max_range(answer: Callable[[list[np.ndarray]], Any]) -> bool | None:
    """3.1: the range of min-max calibration over batches."""
    for low, high in [(-1.0, 2.0), (0.5, 3.0), (-4.0, -1.0)]:
        batches = [np.array([low, (low + high) / 2]), np.array([high])]
        if (given := answer(batches)) is None:
            return None
        if not np.allclose(given, (min(low, 0), max(high, 0))):
            return False
    return True


def _paired(answer: Callable[[np.ndarray, np.ndarray], Any]) -> bool | None:
    """3.2: difference and 95 % interval of paired accuracies."""
    a, b = np.random.default_rng(3).integers(0, 2, (2, 400))
    if (given := answer(a, b)) is None:
        return None
    difference = 100.0 * (a - b)
    return np.allclose(given, (difference.mean(), 1.96 * difference.std() / 20), rtol=0.01)


def _bias_codes(answer: Callable[[np.ndarray, float, np.ndarray], Any]) -> bool | None:
    """3.3: a bias at the scale of its accumulator."""
    bias, scales = np.array([0.5, -1.25, 3.0]), np.array([0.01, 0.02, 0.005])
    if (given := answer(bias, 0.05, scales)) is None:
        return None
    given = np.asarray(given)
    return given.dtype.kind == "i" and np.array_equal(given, np.rint(bias / (0.05 * scales)))


def _requantize(answer: Callable[..., Any]) -> bool | None:
    """3.4: accumulators to unsigned 8-bit codes by ONNX's rule."""
    rng = np.random.default_rng(13)
    acc = np.concatenate([rng.integers(-60_000, 60_000, 2_000), np.arange(-9, 10)])
    for multiplier, zero_point in ((0.0021, 17), (0.5, 128)):
        if (given := answer(acc, multiplier, zero_point)) is None:
            return None
        if not np.array_equal(given, requantize_float(acc, multiplier, zero_point, 0, 255)):
            return False
    return True


def _equalizing_factors(answer: Callable[..., Any]) -> bool | None:
    """3.5: the factors that give the channels between two matrices equal ranges on both sides."""
    rng = np.random.default_rng(14)
    first, second = rng.normal(size=(6, 9)) * rng.uniform(0.1, 10, (6, 1)), rng.normal(size=(4, 6))
    if (factors := answer(first, second)) is None:
        return None
    written, read = np.abs(first).max(axis=1) / factors, np.abs(second).max(axis=0) * factors
    return bool(np.all(np.asarray(factors) > 0) and np.allclose(written, read))


def _bias_change(answer: Callable[..., Any]) -> bool | None:
    """3.6: what a bias must take up of the error that rounded weights make on average."""
    rng = np.random.default_rng(15)
    w, x = rng.normal(size=(5, 8)), rng.uniform(0, 6, (400, 8))
    rounded = np.round(w * 3) / 3
    if (given := answer(w, rounded, x)) is None:
        return None
    return np.allclose(np.mean(x @ rounded.T + given - x @ w.T, axis=0), 0, atol=1e-9)


def _real_value(answer: Callable[[int, float, int], Any]) -> bool | None:
    """4.1: codes of version 1.0.0."""
    if answer(3, 0.5, -1) is None:
        return None
    return all(
        np.isclose(answer(q, s, o), (q + o) * s) for q, s, o in [(0, 0.02, -100), (255, 0.02, -100), (7, 3.0, 0)]
    )


def _min_and_max(answer: Callable[[int, float, int], Any]) -> bool | None:
    """4.2: the ends of a grid."""
    for bits, scale, zero_point in [(8, 0.02, 100), (4, 0.5, 3), (16, 0.001, 0)]:
        if (given := answer(bits, scale, zero_point)) is None:
            return None
        if not np.allclose(given, (-zero_point * scale, (2**bits - 1 - zero_point) * scale)):
            return False
    return True


def _traffic(answer: Callable[[list[int], set[int]], Any]) -> bool | None:
    """4.3: bytes written and read by a chain."""
    if answer([4, 2], set()) is None:
        return None
    cases = [([100, 200, 50], set(), 650), ([100, 200, 50], {0}, 450), ([100, 200, 50, 10], {0, 2}, 410)]
    return all(answer(sizes, fused) == right for sizes, fused, right in cases)


def _intensity_of(answer: Callable[..., Any]) -> bool | None:
    """7.1: operations a byte of a fully connected layer."""
    cases = [(1, 4096, 11008, 8), (64, 512, 1000, 8), (128, 4096, 4096, 4)]
    for rows, depth, channels, bits in cases:
        if (given := answer(rows, depth, channels, bits)) is None:
            return None
        moved = depth * channels * bits / 8 + rows * (depth + channels)
        if not np.isclose(given, 2 * rows * depth * channels / moved):
            return False
    return True


def _rows_to_the_ridge(answer: Callable[..., Any]) -> bool | None:
    """7.2: the fewest rows at which a fully connected layer is bound by compute."""
    for depth, channels, ridge in [(4096, 4096, 720), (1024, 4096, 100), (2048, 1000, 50)]:
        if (given := answer(depth, channels, ridge)) is None:
            return None
        size, sides = depth * channels, depth + channels
        if given != next(rows for rows in range(1, 10**5) if 2 * rows * size >= ridge * (size + rows * sides)):
            return False
    return True


def _tokens_a_second(answer: Callable[..., Any]) -> bool | None:
    """7.3: the most tokens a second that a bandwidth allows."""
    for parts, bandwidth in [([(6.607e9, 8)], 50e9), ([(6.476e9, 4), (0.131e9, 8)], 60e9)]:
        if (given := answer(parts, bandwidth)) is None:
            return None
        if not np.isclose(given, bandwidth / sum(count * bits / 8 for count, bits in parts)):
            return False
    return True


_CHECKS: dict[str, tuple[Callable[..., bool | None], str]] = {
    "1.1": (_grid_of_a_range, "Does your grid hold zero exactly when the range is [1, 2]?"),
    "1.2": (_bits_for, "b bits make 2**b - 1 steps, and n steps give 20 log10(n) dB. Round up."),
    "1.3": (_better_than_min_max, "Try several limits below the largest value and keep the best."),
    "2.1": (_storage_of, "Each group keeps one scale of 16 bits and one zero point of `bits` bits."),
    "2.2": (_in_groups, "Reshape to (rows, groups, group); the largest magnitude of a group maps to the last code."),
    "4.1": (_real_value, "In 1.0.0 the offset is added to the code, before the scale."),
    "4.2": (_min_and_max, "The least code stands for min, the greatest for max; zero_point is the code of zero."),
    "4.3": (_traffic, "A fused tensor is neither written nor read; the last one is written only."),
    "3.1": (_min_max_range, "Take the least and the greatest over all batches; then let the range hold zero."),
    "3.2": (_paired, "Take differences line by line first, in points; their standard deviation makes the interval."),
    "3.3": (_bias_codes, "The sum is in units of x_scale * w_scale; the bias must be too, rounded, as int32."),
    "3.4": (_requantize, "Multiply as float32, round half to even, add the zero point, and only then clip to 0..255."),
    "3.5": (
        _equalizing_factors,
        "Rows of the first are divided, columns of the second multiplied: what makes them equal?",
    ),
    "3.6": (_bias_change, "Average the inputs; the errors of the weights times that mean is the shift to take back."),
    "2.3": (_spend, "List every affordable pair, quantize with each, and keep the one with the best SQNR."),
    "7.1": (_intensity_of, "Weights take bits / 8 bytes each; every row is read once and written once, in bytes."),
    "7.2": (_rows_to_the_ridge, "Two operations a MAC, weights once, inputs and outputs for every row; then round up."),
    "7.3": (_tokens_a_second, "Every weight is read once for each token: bytes of all parts together, then divide."),
}
