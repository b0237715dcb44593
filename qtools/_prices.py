"""What a range costs under a histogram: the searches behind the MSE, SQNR and entropy observers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qtools._histogram import SLAB, Histogram, Range
from qtools.affine import Grid, symmetric_divisors

AIMET_STEP = 2.0**-23  # the smallest scale aimet-torch chooses
TINY_STEP = 2.0**-149  # the smallest float32


class Bins(NamedTuple):
    """The filled part of the histograms of some blocks: edges (blocks, bins + 1), counts, low and high (blocks, 1)."""

    edges: np.ndarray
    counts: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        """The middles of the bins."""
        return (self.edges[:, :-1] + self.edges[:, 1:]) / 2

    @property
    def width(self) -> np.ndarray:
        """The width of a bin, (blocks, 1)."""
        return self.edges[:, 1:2] - self.edges[:, :1]


Price = Callable[[Bins, np.ndarray, np.ndarray], np.ndarray]
"""Scale and offset (blocks, 1) to the cost of every block; the range they stand for begins at scale * offset."""


def cheapest(h: Histogram, delta: np.ndarray, offset: np.ndarray, price: Price) -> np.ndarray:
    """Index (blocks, 1) of the cheapest of the candidates `delta`, `offset` (blocks, candidates), the first of equals.

    The candidates are tried one after the other, all blocks of a slab at once.
    """
    best = np.zeros(len(delta), np.int64)
    edges = h.edges()
    rows = max(1, SLAB // edges.shape[1])
    for begin in range(0, len(delta), rows):
        part = slice(begin, begin + rows)
        used = np.flatnonzero(h.counts[part].any(axis=0))
        columns = slice(used[0], used[-1] + 1)
        bins = Bins(edges[part, used[0] : used[-1] + 2], h.counts[part, columns], h.low[part, None], h.high[part, None])
        pairs = zip(delta[part].T, offset[part].T, strict=True)
        best[part] = np.argmin([price(bins, d[:, None], o[:, None]) for d, o in pairs], axis=0)
    return best[:, None]


def power_error(bins: Bins, delta: np.ndarray, offset: np.ndarray, steps: int, p: float) -> np.ndarray:
    """Sum of |x - x_hat|**p, in bin widths, over values that lie evenly in their bins.

    The integral over a bin is the difference of the antiderivative at its edges.  In units of the scale, a step from
    code to code costs ``2 * (1/2)**(p + 1) / (p + 1)``; a clipped value is `over` away from its code.
    """
    x = bins.edges / delta
    inside = np.clip(x, offset, offset + steps)
    code = np.round(inside)
    area = code * 0.5**p + _odd_power(inside - code, p + 1) + _odd_power(x - inside, p + 1)
    per_bin = np.sum(bins.counts * np.diff(area, axis=1), axis=1) / (p + 1)
    return per_bin * (delta / bins.width)[:, 0] ** (p + 1)


def noise(bins: Bins, delta: np.ndarray, offset: np.ndarray, steps: int, gamma: float) -> np.ndarray:
    """Squared error of the bins' middles, in bin widths; `gamma` times where a value saturates (aimet-torch)."""
    code = np.round(bins.middle / delta - offset)
    kept = np.clip(code, 0, steps)
    weight = np.where(code == kept, bins.counts, gamma * bins.counts)
    return np.sum(weight * ((bins.middle - (kept + offset) * delta) / bins.width) ** 2, axis=1)


def onnx_noise(bins: Bins, delta: np.ndarray, offset: np.ndarray, steps: int, gamma: float) -> np.ndarray:
    """As `noise`, but a range ends, and values saturate, in the middle of a bin (aimet-onnx).

    Ends beyond three times the range of the data count as lying there: that is where its histogram stops.
    """
    start, width, middle = bins.edges[:, :1], bins.width, bins.middle
    span = np.where(bins.low == bins.high, 0.01, bins.high - bins.low)
    centre = (bins.low + bins.high) / 2
    limits = [np.floor((end - start) / width) for end in (centre - 1.5 * span, centre + 1.5 * span)]
    bottom, top = (np.clip(np.floor((delta * end - start) / width), *limits) for end in (offset, offset + steps))
    number = np.arange(bins.counts.shape[1])
    saturated = (number < bottom) | (number >= top)
    kept = np.where(saturated, start + (np.clip(number, bottom, top) + 0.5) * width, np.round(middle / delta) * delta)
    return np.sum(np.where(saturated, gamma * bins.counts, bins.counts) * ((middle - kept) / width) ** 2, axis=1)


def symmetric_candidates(low: np.ndarray, high: np.ndarray, steps: int, onnx: bool) -> Range:
    """101 scales, up to one that covers a hundredth more than the data (AIMET)."""
    delta = 2 * np.maximum(high, -low)[:, None] / steps * np.arange(1, 102) / 100
    delta = np.maximum(delta, TINY_STEP if onnx else AIMET_STEP)
    return delta, np.full_like(delta, -steps // 2)


def candidates(low: np.ndarray, high: np.ndarray, steps: int, onnx: bool) -> Range:
    """17 scales x 20 or 21 offsets, and the offset of [low, high] itself; cut to [low, high] on its grid (AIMET)."""
    widest = (high - low) / steps
    nearest = np.round(low / widest)
    count = 20 if onnx else min(steps, 19)
    offset = (np.trunc if onnx else np.round)(-steps + np.arange(count + 1) * steps / count)
    offset = np.concatenate([np.broadcast_to(offset, (len(low), count + 1)), nearest[:, None]], axis=1)[:, None]
    delta = widest[:, None, None] * np.arange(1, 18)[:, None] / 16
    bottom = np.maximum((widest * nearest)[:, None, None], delta * offset)
    top = np.minimum((widest * (nearest + steps))[:, None, None], delta * (offset + steps))
    delta = np.maximum((top - bottom) / steps, TINY_STEP if onnx else AIMET_STEP)
    return delta.reshape(len(low), -1), np.round(bottom / delta).reshape(len(low), -1)


def symmetric_ends(low: np.ndarray, high: np.ndarray, grid: Grid) -> Range:
    """The range of the symmetric grid that just covers [low, high]."""
    above, below = symmetric_divisors(grid, "no_clipping")
    scale = np.maximum(high / above, -low / below)
    return -below * scale, above * scale


def aimet_ends(low: np.ndarray, high: np.ndarray, grid: Grid) -> Range:
    """As `symmetric_ends`; with four codes the topmost may clip (aimet-torch's MinMaxEncodingAnalyzer)."""
    above, below = symmetric_divisors(grid, "no_clipping")
    scale = np.maximum(high / (above + (above + below == 3)), -low / below)
    return -below * scale, above * scale


def widened(low: np.ndarray, high: np.ndarray, grid: Grid) -> Range:
    """A range below 2**-23 a step, widened by 2**-23 a step: on both sides if symmetric, else upwards (aimet-torch)."""
    steps = grid.qmax - grid.qmin
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    more = np.where((high - low) / steps < AIMET_STEP, np.asarray(AIMET_STEP, low.dtype), 0)
    below = -(-steps // 2) if grid.symmetric else 0
    return low - below * more, high + (steps - below) * more


def at_least_a_hundredth(low: np.ndarray, high: np.ndarray, h: Histogram, grid: Grid) -> Range:
    """A range made to contain zero and to be 0.01 wide; two wide where there were only zeros (aimet-onnx)."""
    steps = grid.qmax - grid.qmin
    zeros = (h.low == 0) & (h.high == 0)
    low = np.minimum(low, 0)
    high = np.maximum(np.maximum(high, 0), low + 0.01)
    return np.where(zeros, -steps // 2 * 2 / steps, low), np.where(zeros, steps // 2 * 2 / steps, high)


def entropy_threshold(counts: np.ndarray, levels: int, ort: bool) -> np.ndarray:
    """Half width, in bins, of the clip of smallest divergence; `counts` (blocks, bins) have zero in the middle."""
    middle = counts.shape[1] // 2
    if not ort:  # zero keeps a code of its own wherever the clip is: its peak (after a ReLU) must not count
        peak = np.minimum(counts[:, middle], counts[:, [middle - 1, min(middle + 1, 2 * middle - 1)]].max(axis=1))
        counts = np.concatenate([counts[:, :middle], peak[:, None], counts[:, middle + 1 :]], axis=1)
    halves = np.arange(min(levels // 2, middle), middle + 1)
    divergence = np.empty((len(halves), len(counts)))
    for row, half in enumerate(halves):
        begin, end = middle - half, min(middle + half + ort, counts.shape[1])
        clipped = counts[:, begin:end].copy()
        clipped[:, 0] += counts[:, :begin].sum(axis=1)
        clipped[:, -1] += counts[:, end:].sum(axis=1)
        merged = _merged(counts[:, begin:end], clipped, levels, ort)
        divergence[row] = _divergence(_smooth(clipped), _smooth(merged), merged if ort else clipped)
    return halves[np.argmin(divergence, axis=0)]


def _merged(inner: np.ndarray, clipped: np.ndarray, levels: int, ort: bool) -> np.ndarray:
    """`inner` merged into levels, each spread evenly over the bins that `clipped` fills."""
    size = inner.shape[1]
    levels = min(levels, size)
    starts = np.arange(levels) * (size // levels) if ort else np.arange(levels) * size // levels
    filled = clipped != 0
    if ort:
        filled[:, levels * (size // levels) :] = False
    number = np.add.reduceat(filled, starts, axis=1, dtype=np.int64)
    share = np.where(number > 0, np.add.reduceat(inner, starts, axis=1) / np.maximum(number, 1), 0)
    spread = np.repeat(np.trunc(share) if ort else share, np.diff(starts, append=size), axis=1)
    if not ort:
        return np.where(filled, spread, 0)
    spread[:, levels * (size // levels) :] = 0
    return spread


def _smooth(counts: np.ndarray) -> np.ndarray:
    """Empty bins get 1e-4 of a count, taken from the others, if there are others."""
    empty = counts == 0
    filled = np.sum(~empty, axis=1, keepdims=True)
    moved = np.where(empty, 1e-4, -1e-4 * np.sum(empty, axis=1, keepdims=True) / np.maximum(filled, 1))
    return counts + np.where(filled > 0, moved, 0)


def _divergence(p: np.ndarray, q: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of q from p in nats, with q as a share of `whole`.

    Migacz and ONNX Runtime divide q by its own sum.  Then a clip that leaves one bin, all the rest piled on top of
    it, costs nothing, and data far from zero are clipped away; as a share of all counts it costs what was clipped.
    """
    p = p / np.maximum(p.sum(axis=1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = p * np.log(p * whole.sum(axis=1, keepdims=True) / q)
    return np.where((q > 0).all(axis=1), terms.sum(axis=1), np.inf)


def _odd_power(x: np.ndarray, n: float) -> np.ndarray:
    """|x|**n with the sign of x."""
    return x * x * x if n == 3 else np.sign(x) * np.abs(x) ** n
