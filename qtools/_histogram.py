"""Streaming histograms behind `qtools.observers`: counts per block, of a size that does not depend on the data."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np

Range = tuple[np.ndarray, np.ndarray]
SLAB = 1 << 17  # elements worked through at a time: 1 MiB of float64, which stays in the cache
_COMPILED_FROM = 1 << 20  # elements; below this a compiled kernel costs more to load than it saves


def binary_bins(low: np.ndarray, high: np.ndarray, bins: int) -> Range:
    """Anchor and width of bins from zero outwards whose width is a power of two.

    Such bins only ever merge with the same neighbours: the counts are the same whatever the order of the batches.
    """
    return np.zeros_like(low), _finest(low, high)


def mirrored_bins(low: np.ndarray, high: np.ndarray, bins: int) -> Range:
    """Bins over [-absmax, absmax] of the first batch (ONNX Runtime)."""
    return np.zeros_like(low), np.maximum(np.maximum(high, -low) / (bins // 2), _finest(low, high))


def spread_bins(low: np.ndarray, high: np.ndarray, bins: int) -> Range:
    """Bins over [low, high] of the first batch, one unit wide if that is a point (aimet-torch, torch.histc)."""
    low, high = np.where(low == high, low - 0.5, low), np.where(low == high, high + 0.5, high)
    return low, np.maximum(high / bins - low / bins, _finest(low, high))


def zeroed_bins(low: np.ndarray, high: np.ndarray, bins: int) -> Range:
    """Bins as wide as in `spread_bins` (0.01 in all for a point), but with an edge at zero (aimet-onnx)."""
    span = np.where(low == high, 0.01, high - low)
    return np.zeros_like(low), np.maximum(span / bins, _finest(low, high))


class Histogram:
    """Counts per block, over a range that grows by merging neighbouring bins.

    When a batch does not fit, the bins of that block double in width, as often as needed, and neighbours are added
    up: nothing is lost, and counts stay exact integers.

    Parameters
    ----------
    bins : int
        At least this many bins cover the data (of the first batch, exactly this many unless they are binary); there
        is room for twice as many.  Even.
    start : function
        How the first bins are laid: `binary_bins`, `mirrored_bins`, `spread_bins` or `zeroed_bins`.
    clamp_beyond : float
        Clamp later batches to the range of the first one, widened at both ends by this many times its length.

    Attributes
    ----------
    counts : int64 array (blocks, 2 * bins)
    anchor, width : float64 arrays (blocks,)
        Bin number g of a block is ``[anchor + g * width, anchor + (g + 1) * width)``.
    first, last : float64 arrays (blocks,)
        Number of the bin that column 0 of `counts` holds; the last column in use.
    low, high : float64 arrays (blocks,)
        The smallest and largest value seen.

    Examples
    --------
    >>> h = Histogram(2)
    >>> h.add(np.array([0.5, 1.0, 3.5]), [])
    >>> h.add(np.array([9.0]), [])
    >>> h.counts.tolist(), h.width.tolist()
    ([[3, 0, 1, 0]], [4.0])
    """

    def __init__(
        self,
        bins: int,
        start: Callable[[np.ndarray, np.ndarray, int], Range] = binary_bins,
        clamp_beyond: float = math.inf,
    ) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 2 or bins % 2:
            raise ValueError(f"bins must be an even integer of at least 2, got {bins!r}")
        if not clamp_beyond >= 0:
            raise ValueError(f"clamp_beyond must be at least 0, got {clamp_beyond!r}")
        self.bins, self.start, self.clamp_beyond = bins, start, clamp_beyond
        self.counts = np.zeros((0, 2 * bins), np.int64)
        self.anchor = self.width = self.first = self.last = self.low = self.high = np.zeros(0)
        self.limits: Range | None = None

    @property
    def nbytes(self) -> int:
        """Size of the state, in bytes."""
        return self.counts.nbytes + 8 * self.anchor.nbytes

    def edges(self) -> np.ndarray:
        """Bin edges, float64 (blocks, 2 * bins + 1), in units of the tensor."""
        numbers = self.first[:, None] + np.arange(self.counts.shape[1] + 1)
        return self.anchor[:, None] + numbers * self.width[:, None]

    def add(self, x: np.ndarray, blocks: list[tuple[int, int]], low: Any = None, high: Any = None) -> None:
        """Count a batch of finite numbers.

        Parameters
        ----------
        x : float ndarray
        blocks : list of (count, size) per axis
            As `affine.blocks_of` gives them; empty: one block.
        low, high : arrays, one entry per block, optional
            The range of every block, where it is known already.
        """
        low, high = (x.min(), x.max()) if low is None else (low, high)
        self._grow(*self._limited(*(np.ravel(end).astype(np.float64) for end in (low, high))))
        plain = x.dtype in (np.float32, np.float64) and x.dtype.isnative and x.flags.c_contiguous
        if plain and x.size >= _COMPILED_FROM and len(self.counts) == 1 and self.limits is None:
            return self._count(x)
        columns = self.counts.shape[1]
        flat = self.counts.reshape(-1)
        for part, ids in _slabs(np.atleast_1d(x), _strides(blocks)):
            begin, end = int(ids.min()), int(ids.max()) + 1
            if self.limits:
                part = np.clip(part, *(limit[ids] for limit in self.limits))
            index = np.subtract(part, self.anchor[ids], dtype=np.float64)
            index /= self.width[ids]
            np.floor(index, out=index)
            index -= self.first[ids]
            cells = np.minimum(index, self.last[ids], out=index).astype(np.int64)
            cells += (ids - begin) * columns
            flat[begin * columns : end * columns] += np.bincount(cells.ravel(), minlength=(end - begin) * columns)

    def take(self, x: np.ndarray, low: float, high: float) -> None:
        """As `add`, compiled, for a tensor that is one block and nothing that clamps.

        Parameters
        ----------
        x : ndarray of float32 or float64, C-contiguous
        low, high : float
            Its range.
        """
        if not (len(self.counts) and self.low[0] <= low and high <= self.high[0]):
            self._grow(np.array([low], np.float64), np.array([high], np.float64))
        self._count(x)

    def coarser(self, bins: int) -> Self:
        """The histogram of fewer bins that the same data would have filled; of binary bins only."""
        result = type(self)(bins)
        result._grow(self.low, self.high)
        rows, columns = np.nonzero(self.counts)
        numbers = np.floor((self.first[rows] + columns) * (self.width / result.width)[rows]) - result.first[rows]
        np.add.at(result.counts, (rows, numbers.astype(np.int64)), self.counts[rows, columns])
        return result

    def _count(self, x: np.ndarray) -> None:
        ends = (float(part[0]) for part in (self.anchor, self.width, self.first, self.last))
        compiled(_count_flat)(x.reshape(-1), *ends, self.counts[0])

    def _limited(self, low: np.ndarray, high: np.ndarray) -> Range:
        if math.isinf(self.clamp_beyond):
            return low, high
        if self.limits is None:
            more = self.clamp_beyond * np.where(low == high, 1.0, high - low)
            self.limits = low - more, high + more
        return np.clip(low, *self.limits), np.clip(high, *self.limits)

    def _grow(self, low: np.ndarray, high: np.ndarray) -> None:
        """Make room for values in [low, high]."""
        if not len(self.counts):
            self.anchor, self.width = self.start(low, high, self.bins)
            self.first = np.floor((low - self.anchor) / self.width)
            self.counts = np.zeros((low.size, 2 * self.bins), np.int64)
            self.low, self.high = low, high
        elif (low >= self.low).all() and (high <= self.high).all():
            return
        self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
        width, finest = self.width, _finest(self.low, self.high)
        while True:
            bottom, top = (np.floor((end - self.anchor) / width) for end in (self.low, self.high))
            tight = (top - bottom >= 2 * self.bins) | (width < finest)
            if not tight.any():
                break
            width = np.where(tight, 2 * width, width)
        self._move(width, bottom, top)
        # As in numpy.histogram, the largest value belongs to the bin below it if it lies on an edge.  Binary bins do
        # without: what a bin holds must not depend on which value was the largest so far.
        on_edge = (self.anchor + top * width == self.high) & (top > bottom) & (self.start is not binary_bins)
        self.last = top - self.first - on_edge

    def _move(self, width: np.ndarray, bottom: np.ndarray, top: np.ndarray) -> None:
        """Widen the bins to `width`, and put the counts of every block where they belong then."""
        fits = (width == self.width) & (bottom >= self.first) & (top < self.first + 2 * self.bins)
        stale = np.flatnonzero(~fits)
        counts = self.counts[stale]
        rows, columns = np.nonzero(counts)
        numbers = self.first[stale][rows] + columns
        numbers = np.floor(numbers * (self.width / width)[stale][rows]) - bottom[stale][rows]
        self.first, self.width = np.where(fits, self.first, bottom), width
        self.counts[stale] = 0
        np.add.at(self.counts, (stale[rows], numbers.astype(np.int64)), counts[rows, columns])


def quantile(h: Histogram, fraction: float, within: bool = True) -> np.ndarray:
    """The value below which `fraction` of the counts lie: `within` its bin by interpolation, or the bin's left edge."""
    return _inverse(np.cumsum(h.counts, axis=1), h.edges(), fraction, within)


def magnitude_quantile(h: Histogram, fraction: float) -> np.ndarray:
    """As `quantile`, of the magnitudes; the bins must be anchored at zero."""
    counts = mirrored(h, slice(None))
    half = counts.shape[1] // 2
    folded = counts[:, half:] + counts[:, half - 1 :: -1]
    return _inverse(np.cumsum(folded, axis=1), np.arange(half + 1) * h.width[:, None], fraction, True)


def mirrored(h: Histogram, part: slice) -> np.ndarray:
    """Counts of some blocks with zero in the middle, as many columns above as below; bins anchored at zero."""
    counts, first = h.counts[part], h.first[part].astype(np.int64)
    rows, columns = np.nonzero(counts)
    numbers = columns + first[rows]
    half = max(int(numbers.max()) + 1, -int(numbers.min()))
    result = np.zeros((len(counts), 2 * half), np.int64)
    result[rows, numbers + half] = counts[rows, columns]
    return result


def filled_labels(h: Histogram) -> Range:
    """The left edges of the first and the last bin that hold anything."""
    labels, filled = h.edges()[:, :-1], h.counts > 0
    return np.where(filled, labels, np.inf).min(axis=1), np.where(filled, labels, -np.inf).max(axis=1)


def _inverse(cumulated: np.ndarray, edges: np.ndarray, fraction: float, within: bool) -> np.ndarray:
    # A hair less, so that 99.9 % of 10,000 is 9,990 and not a rounding error more.
    target = fraction * (1 - 1e-12) * cumulated[:, -1:]
    column = np.argmax(cumulated >= target, axis=1)[:, None]
    above = np.take_along_axis(cumulated, column, axis=1)
    below = np.where(column > 0, np.take_along_axis(cumulated, np.maximum(column - 1, 0), axis=1), 0)
    left, right = (np.take_along_axis(edges, column + i, axis=1) for i in (0, 1))
    share = (target - below) / np.maximum(above - below, 1)
    return (left + (right - left) * share if within else left)[:, 0]


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of this package as machine code that leaves other threads running; numba is imported only here."""
    import numba

    return numba.njit(nogil=True, cache=True)(function)


def _count_flat(x, anchor, width, first, last, counts):
    """Add the numbers of `x` to `counts`, with the arithmetic of `Histogram.add`."""
    cells = np.empty(min(2048, x.size), np.uint32)  # unsigned: an index that may be negative takes a check
    # Neighbours often lie in the same bin, and an addition must wait for the one before it: four tables take turns.
    tables = np.zeros((4 if x.size > 4 * counts.size else 1, counts.size), np.uint32)
    a, b, c, d = tables[0], tables[1 % len(tables)], tables[2 % len(tables)], tables[3 % len(tables)]
    for begin in range(0, x.size, 2048):
        values = x[begin : begin + 2048]
        for i in range(values.size):
            index = np.floor((np.float64(values[i]) - anchor) / width) - first
            cells[i] = np.uint32(np.int32(min(index, last)))
        fours = values.size // 4 * 4
        for i in range(0, fours, 4):
            a[cells[i]] += np.uint32(1)
            b[cells[i + 1]] += np.uint32(1)
            c[cells[i + 2]] += np.uint32(1)
            d[cells[i + 3]] += np.uint32(1)
        for i in range(fours, values.size):
            a[cells[i]] += np.uint32(1)
    for table in tables:
        for i in range(counts.size):
            counts[i] += table[i]


def _finest(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Width below which bins would be narrower than the spacing of float32 numbers (at least 2**-149)."""
    _, exponent = np.frexp(np.maximum(np.abs(low), np.abs(high)))
    return np.ldexp(1.0, np.maximum(exponent, -125) - 24)


def _strides(blocks: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) of every axis: position i of an axis adds ``i // size * stride`` to the number of the block."""
    counts = [count for count, _ in blocks]
    return [(size, math.prod(counts[axis + 1 :]) if count > 1 else 0) for axis, (count, size) in enumerate(blocks)]


def _slabs(
    x: np.ndarray, axes: list[tuple[int, int]], starts: tuple[int, ...] = ()
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut `x` into parts of at most SLAB elements and few blocks, each with its block numbers (broadcastable)."""
    starts = starts or (0,) * x.ndim
    if x.size > SLAB:
        split = [axis for axis, (_, stride) in enumerate(axes) if stride and x.shape[axis] > 1]
        axis = split[0] if split else int(np.argmax(x.shape))
        step = max(1, SLAB * x.shape[axis] // x.size)
        for begin in range(0, x.shape[axis], step):
            part = x[(slice(None),) * axis + (slice(begin, begin + step),)]
            yield from _slabs(part, axes, (*starts[:axis], starts[axis] + begin, *starts[axis + 1 :]))
        return
    ids = np.zeros((1,) * x.ndim, np.int64)
    for axis, (size, stride) in enumerate(axes):
        if stride:
            numbers = (starts[axis] + np.arange(x.shape[axis])) // size * stride
            ids = ids + numbers.reshape((-1,) + (1,) * (x.ndim - axis - 1))
    yield x, ids
