"""What a range costs under a histogram: the searches behind the MSE, SQNR and entropy observers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from qtools._histogram import SLAB, Histogram, Range, compiled
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


Price = Callable[[Bins, np.ndarray, np.ndarray, int, float], np.ndarray]
"""Scale and offset (blocks, 1), steps and a parameter to the cost of every block; a range begins at scale * offset."""


def cheapest(
    h: Histogram, delta: np.ndarray, offset: np.ndarray, price: Price, steps: int, parameter: float
) -> np.ndarray:
    """Index (blocks, 1) of the cheapest of the candidates `delta`, `offset` (blocks, candidates), the first of equals.

    All blocks of a slab are worked through at once.
    """
    best = np.zeros(len(delta), np.int64)
    edges = h.edges()
    rows = max(1, SLAB // edges.shape[1])
    for begin in range(0, len(delta), rows):
        part = slice(begin, begin + rows)
        used = np.flatnonzero(h.counts[part].any(axis=0))
        columns = slice(used[0], used[-1] + 1)
        bins = Bins(edges[part, used[0] : used[-1] + 2], h.counts[part, columns], h.low[part, None], h.high[part, None])
        best[part] = _cheapest_of(bins, delta[part], offset[part], price, steps, parameter)
    return best[:, None]


def _cheapest_of(
    bins: Bins, delta: np.ndarray, offset: np.ndarray, price: Price, steps: int, parameter: float
) -> np.ndarray:
    """Price the candidates that a compiled estimate, with its bound of error, leaves in the running: mostly one."""
    tried = np.ones(delta.shape, bool)
    if price in (noise, power_error):
        estimate = compiled(_noise_estimates if price is noise else _power_estimates)
        rows = zip(bins.edges, bins.counts, delta, offset, strict=True)
        cost, error = np.array([estimate(*row, steps, parameter) for row in rows]).swapaxes(0, 1)
        with np.errstate(invalid="ignore"):  # what is not finite stays in the running
            tried = ~(cost - error > (cost + error).min(axis=1, keepdims=True))
    cost = np.full(delta.shape, np.inf)
    for column in np.flatnonzero(tried.any(axis=0)):
        rows = np.flatnonzero(tried[:, column])
        part = Bins(*(values[rows] for values in bins))
        cost[rows, column] = price(part, delta[rows, column, None], offset[rows, column, None], steps, parameter)
    return np.argmin(cost, axis=1)


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


def _noise_estimates(edges, counts, delta, offset, steps, gamma):
    """`noise` of one block for all candidates, and a bound of what another order of summation may change."""
    result, width = np.zeros((2, delta.size)), edges[1] - edges[0]
    for k in range(delta.size):
        for i in range(counts.size):
            middle = (edges[i] + edges[i + 1]) / 2
            code = np.rint(middle / delta[k] - offset[k])
            kept = min(max(code, 0.0), float(steps))
            error = (middle - (kept + offset[k]) * delta[k]) / width
            result[0, k] += (counts[i] if code == kept else gamma * counts[i]) * (error * error)
        result[1, k] = 1e-11 * result[0, k]
    return result


def _power_estimates(edges, counts, delta, offset, steps, p):
    """`power_error` of one block for all candidates, and a bound of what rounding may change."""
    result, area = np.zeros((2, delta.size)), np.zeros(edges.size)
    for k in range(delta.size):
        for i in range(edges.size):
            x = edges[i] / delta[k]
            inside = min(max(x, offset[k]), offset[k] + steps)
            code = np.rint(inside)
            near, over = inside - code, x - inside
            if p == 2:
                area[i] = code * 0.25 + near * near * near + over * over * over
            else:
                powers = np.sign(near) * abs(near) ** (p + 1) + np.sign(over) * abs(over) ** (p + 1)
                area[i] = code * 0.5**p + powers
        for i in range(counts.size):
            result[0, k] += counts[i] * (area[i + 1] - area[i])
            result[1, k] += counts[i] * (abs(area[i + 1]) + abs(area[i]))
        result[0, k] *= (delta[k] / (edges[1] - edges[0])) ** (p + 1) / (p + 1)
        result[1, k] *= 1e-12 * (delta[k] / (edges[1] - edges[0])) ** (p + 1)
    return result


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
    tried = np.ones((len(counts), len(halves)), bool) if ort else _contenders(counts, halves, levels)
    divergence = np.full(tried.shape, np.inf)
    for column in np.flatnonzero(tried.any(axis=0)):
        rows = np.flatnonzero(tried[:, column])
        divergence[rows, column] = _clip_divergence(counts[rows], halves[column], levels, ort)
    return halves[np.argmin(divergence, axis=1)]


def _clip_divergence(counts: np.ndarray, half: int, levels: int, ort: bool) -> np.ndarray:
    """Divergence of every block at one half width."""
    middle = counts.shape[1] // 2
    begin, end = middle - half, min(middle + half + ort, counts.shape[1])
    clipped = counts[:, begin:end].copy()
    clipped[:, 0] += counts[:, :begin].sum(axis=1)
    clipped[:, -1] += counts[:, end:].sum(axis=1)
    merged = _merged(counts[:, begin:end], clipped, levels, ort)
    return _divergence(_smooth(clipped), _smooth(merged), merged if ort else clipped)


def _contenders(counts: np.ndarray, halves: np.ndarray, levels: int) -> np.ndarray:
    """Which half widths (blocks, halves) may have the smallest divergence: all within 1e-9 of the smallest estimate."""
    estimates = np.array([_estimates(row, halves, levels) for row in counts])
    least = np.nanmin(np.where(np.isnan(estimates), np.inf, estimates), axis=1, keepdims=True)
    return ~(estimates > least + 1e-9 * (1 + np.abs(least)))


def _estimates(counts: np.ndarray, halves: np.ndarray, levels: int) -> np.ndarray:
    """`_clip_divergence` of one block at every half width, but for rounding; NaN where it cannot be told.

    The divergence is sum p log p - sum p log q.  A filled bin's p is its count c less a tiny e, so that the first sum
    is expanded in powers of e, over sums of c log c, log c + 1, 1 / c, 1 / c**2, ... that no clip changes.
    """
    begin, end = counts.size // 2 - halves, counts.size // 2 + halves
    before, filled_before = (_sums_before(part) for part in (counts, counts > 0))
    cross, filled = compiled(_cross_entropies)(counts, before, filled_before, halves, levels)
    c = counts[counts > 0].astype(np.float64)
    inner = filled_before[begin + 1], filled_before[end - 1]  # the filled bins but for those at the ends
    with np.errstate(all="ignore"):
        e = 1e-4 * (2 * halves - filled) / filled
        terms = [c * np.log(c), -np.log(c) - 1, *(c ** (1 - k) / (k * (k - 1)) for k in range(2, 6))]
        sums = [part[inner[1]] - part[inner[0]] for part in map(_sums_before, terms)]
        entropy = sum(e**k * part for k, part in enumerate(sums))
        for tail in (before[begin + 1], before[-1] - before[end - 1]):  # the end bins hold what was cut off as well
            entropy += np.where(tail > 0, (tail - e) * np.log(tail - e), 0)
        return np.where(e < 0.01, entropy - cross, np.nan) / before[-1]


def _sums_before(values: np.ndarray) -> np.ndarray:
    """The sum of all values before each one, and of all."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])


def _cross_entropies(counts, before, filled_before, halves, levels):
    """Sum of p log q over the filled bins at every half width, and their number; NaN if some q is all but 0 or none is.

    One number a level: q is the same for all its filled bins.
    """
    cross, filled_bins = np.full(halves.size, np.nan), np.zeros(halves.size, np.int64)
    mass, share, filled = np.zeros(levels), np.zeros(levels), np.zeros(levels, np.int64)
    for h, half in enumerate(halves):
        begin, end = counts.size // 2 - half, counts.size // 2 + half
        used, kept = min(levels, 2 * half), 0  # kept: bins that the merged histogram fills
        for level in range(used):
            i, j = begin + level * 2 * half // used, begin + (level + 1) * 2 * half // used
            inner = before[j] - before[i]
            mass[level], filled[level] = inner, filled_before[j] - filled_before[i]
            if level == 0:
                mass[level] += before[begin]
                filled[level] += counts[begin] == 0 and before[begin] > 0
            if level == used - 1:
                mass[level] += before[-1] - before[end]
                filled[level] += counts[end - 1] == 0 and before[-1] > before[end]
            share[level] = inner / max(filled[level], 1)
            filled_bins[h] += filled[level]
            kept += filled[level] if inner > 0 else 0
        if kept == 0:
            continue
        e, q_less = 1e-4 * (2 * half - filled_bins[h]) / filled_bins[h], 1e-4 * (2 * half - kept) / kept
        total = 0.0
        for level in range(used):
            if filled[level] > 0:
                q = share[level] - q_less if share[level] > 0 else 1e-4
                total += (mass[level] - e * filled[level]) * np.log(q) if q > 1e-6 else np.nan
        cross[h] = total
    return cross, filled_bins


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
