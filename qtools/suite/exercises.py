"""The automatic checks behind the exercises at the end of every chapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtools.affine import Grid, bits_per_weight, choose_qparams, fake_quantize, qparams_from_range
from qtools.metrics import sqnr_db
from qtools.npu import tiling
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


def _share_rerun(answer: Callable[..., Any]) -> bool | None:
    """5.1: operators that run where what lies before a change runs once."""
    for count, starts in [(10, range(10)), (17, [0, 2, 2, 9, 16]), (4, [3])]:
        if (given := answer(count, list(starts))) is None:
            return None
        if not np.isclose(given, sum(count - start for start in starts) / (count * len(list(starts)))):
            return False
    return True


def _least_loss(answer: Callable[..., Any]) -> bool | None:
    """5.2: the best choice of one type for each layer under a budget."""
    rng = np.random.default_rng(16)
    for layers, budget in ((3, 18), (5, 34), (6, 41)):
        losses = np.sort(rng.integers(0, 50, (layers, 3)), axis=1)[:, ::-1]
        costs = np.sort(rng.integers(1, 12, (layers, 3)), axis=1)
        if (given := answer(losses, costs, budget)) is None:
            return None
        choices, every = np.indices((3,) * layers).reshape(layers, -1), np.arange(layers)[:, None]
        fits = costs[every, choices].sum(0) <= budget
        if given != losses[every, choices].sum(0)[fits].min():
            return False
    return True


def _clearly(answer: Callable[..., Any]) -> bool | None:
    """5.3: which mean losses stand clear of zero."""
    losses = np.random.default_rng(17).normal(np.linspace(0, 1, 12)[:, None], 0.5, (12, 6))
    if (given := answer(losses)) is None:
        return None
    return np.array_equal(given, losses.mean(1) > 2 * losses.std(1, ddof=1) / np.sqrt(6))


def _what_passes(answer: Callable[..., Any]) -> bool | None:
    """6.1: the gradient that a straight-through estimator hands on."""
    rng = np.random.default_rng(16)
    x, upstream = rng.normal(0, 2, (2, 300))
    for step, low, high in ((0.5, -4, 3), (0.3, 0, 15)):
        if (given := answer(x, step, low, high, upstream)) is None:
            return None
        rounded = np.round(x / step)
        if not np.allclose(given, upstream * ((rounded >= low) & (rounded <= high))):
            return False
    return True


def _step_gradient(answer: Callable[..., Any]) -> bool | None:
    """6.2: the gradient of a learned step."""
    rng = np.random.default_rng(17)
    x, upstream = rng.normal(0, 2, (2, 300))
    for step, low, high in ((0.5, -4, 3), (0.3, -8, 7)):
        if (given := answer(x, step, low, high, upstream)) is None:
            return None
        rounded = np.round(x / step)
        slope = np.where((rounded >= low) & (rounded <= high), rounded - x / step, np.clip(rounded, low, high))
        if not np.isclose(given, np.sum(upstream * slope)):
            return False
    return True


def _folded(answer: Callable[..., Any]) -> bool | None:
    """6.3: a BatchNorm in the weights and the bias of the layer before it."""
    rng = np.random.default_rng(18)
    w, x = rng.normal(size=(5, 7)), rng.normal(size=(40, 7))
    (gain, shift, mean), variance = rng.normal(size=(3, 5)), rng.uniform(0.5, 2, 5)
    if (given := answer(w, gain, shift, mean, variance)) is None:
        return None
    expected = (x @ w.T - mean) / np.sqrt(variance + 1e-5) * gain + shift
    return np.allclose(x @ given[0].T + given[1], expected)


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


def _times_faster(answer: Callable[..., Any]) -> bool | None:
    """8.1: Amdahl's law for several levers."""
    for parts in ([(0.5, 2)], [(0.3, 4), (0.2, 10)], [(0.05, 300)]):
        if (given := answer(parts)) is None:
            return None
        left = 1 - sum(share for share, _ in parts) + sum(share / factor for share, factor in parts)
        if not np.isclose(given, 1 / left):
            return False
    return True


def _tile_traffic(answer: Callable[..., Any]) -> bool | None:
    """8.2: bytes of a tiled product whose inputs stay while the output channels pass."""
    cases = [(64, 128, 96, 16, 32), (100, 64, 96, 32, 96), (50, 10, 30, 50, 7), (1, 4096, 4096, 1, 512)]
    for rows, depth, channels, tile_rows, tile_channels in cases:
        if (given := answer(rows, depth, channels, tile_rows, tile_channels)) is None:
            return None
        tile = (tile_rows, 1, tile_channels, depth)
        if given != tiling.tiling(tiling.matmul(rows, depth, channels), tile, "input").moved.total:
            return False
    return True


def _worth_sharing(answer: Callable[..., Any]) -> bool | None:
    """8.3: from which size on handing over beats copying."""
    cases = [(200e-6, 100e-6, 5e9), (40e-6, 20e-6, 10e9), (10e-6, 30e-6, 5e9)]
    for handing, copying, rate in cases:
        if (given := answer(handing, copying, rate)) is None:
            return None
        if not np.isclose(given, max(0.0, (handing - copying) * rate)):
            return False
    return True


def _perplexity(answer: Callable[..., Any]) -> bool | None:
    """9.1: exponential of the mean negative log likelihood."""
    rng = np.random.default_rng(19)
    for rows, size in ((1, 4), (50, 30)):
        logits, targets = rng.normal(3, 4, (rows, size)), rng.integers(0, size, rows)
        if (given := answer(logits, targets)) is None:
            return None
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        if not np.isclose(given, np.prod(shares[np.arange(rows), targets] ** (-1 / rows))):
            return False
    return True


def _cache_size(answer: Callable[..., Any]) -> bool | None:
    """9.2: bytes of a packed key-value cache with a step and a zero point for each token and head."""
    for tokens, layers, heads, side, bits in ((1, 1, 1, 32, 8), (1024, 32, 32, 128, 8), (7, 4, 2, 32, 4)):
        if (given := answer(tokens, layers, heads, side, bits)) is None:
            return None
        if given != sum(tokens * layers * heads * (side * bits / 8 + 2 + 1) for _ in ("keys", "values")):
            return False
    return True


def _longest_context(answer: Callable[..., Any]) -> bool | None:
    """9.3: the longest context within a time."""
    for case in ((3_369_000_000, 524_288, 50e9, 0.1), (3_000, 10, 1_000, 3.1), (6_607_000_000, 262_144, 50e9, 0.05)):
        if (given := answer(*case)) is None:
            return None
        weights, each, bandwidth, seconds = case
        if given < 0 or (given and weights + given * each > seconds * bandwidth):
            return False
        if weights + (given + 1) * each <= seconds * bandwidth:
            return False
    return True


def _bits_read(answer: Callable[..., Any]) -> bool | None:
    """10.1: bits of each weight that a printed latency leaves time for."""
    for weights, bandwidth, seconds in [(6.607e9, 50e9, 0.045), (1e9, 60e9, 0.02), (3.2e9, 76.8e9, 0.1)]:
        if (given := answer(weights, bandwidth, seconds)) is None:
            return None
        if not np.isclose(given, bandwidth * seconds / weights * 8):
            return False
    return True


def _predicate(answer: Callable[..., Any]) -> bool | None:
    """10.2: a comparison evaluated without running anything else."""
    values = {"a": 3.0, "b": 0.5, "article_a": 6}
    for text, expected in [
        ("a < 2", False),
        ("a * b > 1", True),
        ("(article_a - a) / b < a + 4", True),
        ("a > a", False),
    ]:
        if (given := answer(text, values)) is None:
            return None
        if given is not expected:
            return False
    for text in ("__import__('os').getcwd() > 1", "a.real > 1", "abs(a) > 1", "[a][0] > 1"):
        try:
            answer(text, values)
        except ValueError:
            continue
        return False
    return True


def _impossible(answer: Callable[..., Any]) -> bool | None:
    """10.3: the lever that saves more than it touches."""
    cases = [
        [(0.4, 0.3), (0.1, 0.12), (0.9, 0.5)],
        [(0.05, 0.2), (0.6, 0.6), (0.5, 0.1)],
        [(0.3, 0.2), (1, 0.9), (0.2, 0.22)],
    ]
    for levers, place in zip(cases, (1, 0, 2)):
        if (given := answer(levers)) is None:
            return None
        if given != place:
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
    "5.1": (_share_rerun, "A change at operator i makes the operators i, i + 1, ... run: count - i of them."),
    "5.2": (_least_loss, "Three types and a few layers: itertools.product lists every choice; keep those that fit."),
    "5.3": (_clearly, "The standard error of a mean of n values is their std(ddof=1) divided by the root of n."),
    "6.1": (_what_passes, "It is 1 where the rounded code lies between low and high, both included, and 0 elsewhere."),
    "6.2": (
        _step_gradient,
        "Inside: the rounding error in steps, code minus x / step. Outside: the last code. Then sum.",
    ),
    "6.3": (_folded, "Rows are multiplied by gain / sqrt(variance + 1e-5); the mean goes through the same factor."),
    "7.1": (_intensity_of, "Weights take bits / 8 bytes each; every row is read once and written once, in bytes."),
    "7.2": (_rows_to_the_ridge, "Two operations a MAC, weights once, inputs and outputs for every row; then round up."),
    "7.3": (_tokens_a_second, "Every weight is read once for each token: bytes of all parts together, then divide."),
    "8.1": (
        _times_faster,
        "What no lever touches keeps its time; add what is left of every part; then 1 over the sum.",
    ),
    "8.2": (
        _tile_traffic,
        "Inputs and outputs once; the weights once for every strip of rows, unless one tile holds all.",
    ),
    "8.3": (_worth_sharing, "Both times are equal where handing = copying + size / rate; a size is never negative."),
    "9.1": (_perplexity, "Take the largest logit away first; log(sum(exp)) is what makes probabilities of logits."),
    "9.2": (_cache_size, "Keys and values: twice. For every token and head the codes, two bytes and one byte."),
    "9.3": (_longest_context, "What is left of the bytes after the weights, by the bytes of a token; never below 0."),
    "10.1": (_bits_read, "Bytes that come in that time, times eight, shared out among the weights."),
    "10.2": (_predicate, "Walk the tree of ast.parse; list what you allow, and raise ValueError for all the rest."),
    "10.3": (_impossible, "What a lever does not touch it cannot save."),
}
