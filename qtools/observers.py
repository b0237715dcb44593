"""Ranges from data: observers that watch batches go by and then choose the range a grid should cover.

An observer takes any number of batches and keeps a state whose size depends on the number of blocks (and bins), never
on the number of samples.  `MinMaxObserver` and `MovingAverageObserver` keep two numbers a block, the others a
histogram.  Where libraries differ in a definition, `rules` names the library to follow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from qtools import _histogram, _prices
from qtools._histogram import SLAB, Histogram, Range, binary_bins, mirrored_bins, spread_bins, zeroed_bins
from qtools.affine import Array, Grid, QParams, SymmetricScale, block_ranges, blocks_of, qparams_from_range

Rules = Literal["qtools", "aimet-torch", "aimet-onnx", "ort"]
Tails = Literal["each", "total"]
_MOST_CELLS = 1 << 28  # of a histogram: 2 GiB
# What the MSE observer multiplies the end of a range by: first the whole range, then the best so far.
_COARSE, _FINE, _FINEST = np.linspace(1, 0.04, 25), np.linspace(1.03, 0.97, 9), np.linspace(1.006, 0.994, 9)


class Observer:
    """What all observers share: the checks at the door, the kind of array, and `qparams`.

    Parameters
    ----------
    block_size : tuple of int
        As in `affine.Grid`: () is per tensor, whatever the rank.
    """

    _symmetric_scale = "qmax"

    def __init__(self, block_size: tuple[int, ...] = ()) -> None:
        self.block_size = Grid(block_size=block_size).block_size
        self.shape: tuple[int, ...] | None = None
        self._device: Any = None
        self._dtype: Any = np.float32

    def update(self, x: Array) -> Self:
        """Take in a batch.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            Batches may differ in shape as long as they have the same number of blocks.

        Raises
        ------
        TypeError
            If `x` is not an array of floats.
        ValueError
            If `x` is empty, holds NaN or infinity, or has another rank or number of blocks; the observer is
            then as it was before.
        """
        low, high = (_numpy(part) for part in block_ranges(x, self.block_size))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError(f"cannot observe NaN or infinity, found in the tensor of shape {tuple(x.shape)}")
        if self.shape is not None and low.shape != self.shape:
            raise ValueError(f"expected {self.shape} blocks as in earlier batches, got {low.shape} in {tuple(x.shape)}")
        self.take(x, low, high)
        self._device = x.device if is_torch_array(x) else None
        return self

    def take(self, x: Array, low: np.ndarray, high: np.ndarray) -> None:
        """As `update`, where the range of every block is known, and known to be finite."""
        self._take(x, low.ravel(), high.ravel())
        self.shape, self._dtype = low.shape, np.result_type(self._dtype, low.dtype)

    def resume(self, dtype: Any, **state: Any) -> Self:
        """Go on from what another observer (per tensor) has seen: its attributes, and the dtype of its ranges."""
        vars(self).update(state)
        self.shape, self._dtype = (), np.dtype(dtype)
        return self

    def range(self, grid: Grid) -> tuple[Array, Array]:
        """The range that `grid` should cover, one entry per block, in units of the tensor.

        Raises
        ------
        ValueError
            If nothing has been observed, or `grid` has another block size.
        """
        if self.shape is None:
            raise ValueError(f"{type(self).__name__} has seen no data: call update(x) first")
        if grid.block_size != self.block_size:
            raise ValueError(f"the grid has block_size {grid.block_size}, the observer {self.block_size}")
        most = np.finfo(self._dtype).max
        low, high = (np.clip(end, -most, most).astype(self._dtype).reshape(self.shape) for end in self._choose(grid))
        if self._device is None:
            return low, high
        import torch

        return tuple(torch.as_tensor(part, device=self._device) for part in (low, high))

    def qparams(
        self, grid: Grid, *, symmetric_scale: SymmetricScale | None = None, eps: float | None = None
    ) -> QParams:
        """Scale and zero point for the chosen range, in the kind of array that was observed.

        Parameters
        ----------
        grid : Grid
        symmetric_scale : str, optional
            See `affine.qparams_from_range`.  By default 'qmax'; the observers that search the scale itself (MSE,
            SQNR) return the scale they found.
        eps : float, optional
            See `affine.qparams_from_range`.
        """
        low, high = self.range(grid)
        rule = symmetric_scale or self._symmetric_scale
        return qparams_from_range(low, high, grid, symmetric_scale=rule, eps=eps)

    @property
    def nbytes(self) -> int:
        """Size of the state, in bytes."""
        return sum(part.nbytes for part in vars(self).values() if isinstance(part, np.ndarray))

    def _take(self, x: Array, low: np.ndarray, high: np.ndarray) -> None:
        raise NotImplementedError

    def _choose(self, grid: Grid) -> Range:
        raise NotImplementedError


class MinMaxObserver(Observer):
    """The smallest and largest value seen.

    Parameters
    ----------
    block_size : tuple of int
    rules : {'qtools', 'aimet-torch'}
        AIMET 2.42 (MinMaxEncodingAnalyzer) widens a range of less than 2**-23 a step by 2**-23 a step, makes a
        symmetric range that of the grid (with 2 bits: absmax / 2 a step), and divides its rounded length.

    Examples
    --------
    >>> o = MinMaxObserver().update(np.array([-1.0, 0.5])).update(np.array([1.55]))
    >>> [float(end) for end in o.range(Grid(bits=8))]
    [-1.0, 1.55]
    """

    def __init__(self, block_size: tuple[int, ...] = (), *, rules: Rules = "qtools") -> None:
        super().__init__(block_size)
        self.rules = _one_of(rules, ("qtools", "aimet-torch"), "rules")
        self.low: np.ndarray | None = None
        self.high: np.ndarray | None = None

    def _take(self, x: Array, low: np.ndarray, high: np.ndarray) -> None:
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)

    def _choose(self, grid: Grid) -> Range:
        if self.rules == "qtools":
            return self.low, self.high
        low, high = _prices.widened(self.low, self.high, grid)
        return _prices.aimet_ends(low, high, grid) if grid.symmetric else (low, high)

    def qparams(
        self, grid: Grid, *, symmetric_scale: SymmetricScale | None = None, eps: float | None = None
    ) -> QParams:
        """See `Observer.qparams`; under AIMET's rules a symmetric scale is the length of the range over its steps."""
        if self.rules == "qtools" or not grid.symmetric:
            return super().qparams(grid, symmetric_scale=symmetric_scale, eps=eps)
        if symmetric_scale is not None or eps is not None:
            raise ValueError("rules='aimet-torch' fix the symmetric scale: leave symmetric_scale and eps out")
        low, high = self.range(grid)
        xp = array_namespace(low)
        scale = (high / 2 - low / 2) / (grid.qmax - grid.qmin) * 2
        return QParams(grid, scale, xp.full_like(low, grid.midpoint, dtype=xp.int32))


class MovingAverageObserver(MinMaxObserver):
    """Exponential moving average of the smallest and largest value of every batch: it forgets, and order matters.

    Parameters
    ----------
    block_size : tuple of int
    momentum : float
        Weight of the past, 0 <= momentum < 1; ``1 - momentum`` is torch's ``averaging_constant`` (0.01 there).

    Examples
    --------
    >>> o = MovingAverageObserver(momentum=0.5).update(np.array([-1.0, 1.0])).update(np.array([-3.0, 2.0]))
    >>> [float(end) for end in o.range(Grid(bits=8))]
    [-2.0, 1.5]
    """

    def __init__(self, block_size: tuple[int, ...] = (), *, momentum: float = 0.99) -> None:
        super().__init__(block_size)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum!r}")
        self.momentum = momentum

    def _take(self, x: Array, low: np.ndarray, high: np.ndarray) -> None:
        old = (low, high) if self.low is None else (self.low, self.high)
        m = self.momentum
        self.low, self.high = (m * past + (1 - m) * now for past, now in zip(old, (low, high), strict=True))


class _HistogramObserver(Observer):
    def __init__(self, block_size: tuple[int, ...], *histogram: Any) -> None:
        super().__init__(block_size)
        self.histogram = Histogram(*histogram)

    def _take(self, x: Array, low: np.ndarray, high: np.ndarray) -> None:
        cells = low.size * self.histogram.counts.shape[1]
        if cells > _MOST_CELLS:
            size = f"{cells * 8 / 2**30:.0f} GiB"
            raise ValueError(f"{low.size} blocks need {size} of counts: take larger blocks or fewer bins")
        self.histogram.add(_numpy(x), blocks_of(tuple(x.shape), self.block_size), low, high)

    @property
    def nbytes(self) -> int:
        """Size of the state, in bytes."""
        return self.histogram.nbytes


class PercentileObserver(_HistogramObserver):
    """Cuts off the tails of the distribution.

    Parameters
    ----------
    percentile : float
        In percent, above 50, up to 100 (no cut: min-max).
    block_size : tuple of int
    tails : {'each', 'total'}
        With p = 99: cut 1 % at each end (AIMET), or 1 % in all (ONNX Runtime), which is half of it at each end on an
        asymmetric grid and the largest magnitudes on a symmetric one.
    bins : int
        Resolution: within a bin the values are taken to lie evenly.
    clamp_beyond : float
        Clamp later batches to the first one's range, widened by this many times its length at both ends.  By default
        nothing is clamped; aimet-onnx drops what lies more than one length beyond.
    rules : {'qtools', 'aimet-torch', 'aimet-onnx'}
        AIMET 2.42 returns the left edge of the bin a quantile lies in, for both ends.  aimet-torch widens constants
        by 0.5 at each end if p is 100, and tiny ranges as in `MinMaxObserver`; aimet-onnx makes every range at least
        0.01 wide, and that of zeros [-1, 1].

    Examples
    --------
    >>> x = np.arange(1001, dtype=np.float32)
    >>> [round(float(end)) for end in PercentileObserver(99).update(x).range(Grid(bits=8))]
    [10, 990]
    """

    def __init__(
        self,
        percentile: float = 99.99,
        block_size: tuple[int, ...] = (),
        *,
        tails: Tails = "each",
        bins: int = 2048,
        clamp_beyond: float = math.inf,
        rules: Rules = "qtools",
    ) -> None:
        starts = {"qtools": binary_bins, "aimet-torch": spread_bins, "aimet-onnx": zeroed_bins}
        self.rules = _one_of(rules, tuple(starts), "rules")
        super().__init__(block_size, bins, starts[rules], clamp_beyond)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {percentile!r}")
        self.tails = _one_of(tails, get_args(Tails) if rules == "qtools" else ("each",), "tails")
        self.percentile = percentile

    def _choose(self, grid: Grid) -> Range:
        cut, h = (100 - self.percentile) / 100, self.histogram
        if cut == 0:
            low, high = _histogram.filled_labels(h) if self.rules == "aimet-onnx" else (h.low, h.high)
        elif self.tails == "total" and grid.symmetric:
            high = _histogram.magnitude_quantile(h, 1 - cut)
            low = -high
        else:
            cut /= 1 if self.tails == "each" else 2
            low, high = (_histogram.quantile(h, fraction, self.rules == "qtools") for fraction in (cut, 1 - cut))
        if self.rules == "aimet-torch":
            pad = 0.5 * ((low == high) & (cut == 0))
            return _prices.widened(low - pad, high + pad, grid)
        if self.rules == "aimet-onnx":
            return _prices.at_least_a_hundredth(low, high, h, grid)
        return np.clip(low, h.low, h.high), np.clip(high, h.low, h.high)


class MSEObserver(_HistogramObserver):
    """The range with the smallest quantization error, p-norm to the power p, under the histogram.

    The values of a bin are taken to lie evenly in it, and the error is integrated over the bin exactly; a rule that
    looks at the middle of a bin only is blind where bins are wider than a quantization step (16 bits).  The search
    moves both ends together and each alone, coarse to fine; it starts from min-max and can never end up worse.

    Parameters
    ----------
    block_size : tuple of int
    p : float
        2 is the mean squared error; larger p clips less.
    bins : int

    Examples
    --------
    >>> x = np.concatenate([np.random.default_rng(0).normal(size=9999), [50]])
    >>> o = MSEObserver().update(x)
    >>> bool(o.range(Grid(bits=4))[1] < 15)
    True
    """

    _symmetric_scale = "no_clipping"

    def __init__(self, block_size: tuple[int, ...] = (), *, p: float = 2.0, bins: int = 512) -> None:
        super().__init__(block_size, bins)
        if not 0 < p < math.inf:
            raise ValueError(f"p must be positive and finite, got {p!r}")
        self.p = p

    def _choose(self, grid: Grid) -> Range:
        low, high = np.minimum(self.histogram.low, 0), np.maximum(self.histogram.high, 0)
        whole = np.stack(_prices.symmetric_ends(low, high, grid) if grid.symmetric else (low, high), axis=1)[:, None]
        best = whole
        for factors in (_COARSE, _COARSE, _FINE, _FINEST):
            for moved in ([True, True],) if grid.symmetric else ([True, True], [False, True], [True, False]):
                centre = whole if factors is _COARSE else best
                tried = np.where(moved, centre * factors[:, None], best)
                tried = np.concatenate([best, np.clip(tried, whole[..., :1], whole[..., 1:])], axis=1)
                best = self._best_of(tried, grid.qmax - grid.qmin)
        return best[:, 0, 0], best[:, 0, 1]

    def _best_of(self, ends: np.ndarray, steps: int) -> np.ndarray:
        """Of the ranges `ends` (blocks, candidates, 2), the one of the smallest error per block: (blocks, 1, 2)."""
        delta = np.maximum(ends[..., 1] / steps - ends[..., 0] / steps, _prices.TINY_STEP)
        offset = np.clip(np.round(ends[..., 0] / delta), -steps, 0)
        best = _prices.cheapest(self.histogram, delta, offset, _prices.power_error, steps, self.p)
        return np.take_along_axis(ends, best[..., None], axis=1)


class SQNRObserver(_HistogramObserver):
    """The rule called 'tf_enhanced' or SQNR: a grid search for the least noise, clipping noise counted three times.

    AIMET 2.42 (TfEnhancedEncodingAnalyzer, SqnrEncodingAnalyzer) tries 17 scales x 21 offsets, on a symmetric grid 101
    scales, and prices each on the middles of the histogram's bins.  ``bins=2048`` is its 'sqnr', ``gamma=1`` the plain
    squared error.

    Parameters
    ----------
    block_size : tuple of int
    gamma : float
        Weight of clipping noise.
    bins : int
    clamp_beyond : float
        As in `PercentileObserver`.  By default nothing is clamped; AIMET's tf_enhanced lets its histogram grow by
        1.5 times the first batch's length at both ends (aimet-torch) or by 1 (aimet-onnx), whatever comes later.
    rules : {'aimet-torch', 'aimet-onnx'}
        The packages differ.  aimet-onnx (C++) lays an edge of its bins at zero, saturates values in the middle of a
        bin rather than at a code, lets offsets lie 1/20 apart instead of 1/19, and gives zeros the range [-1, 1].

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=10000).astype(np.float32)
    >>> p = SQNRObserver().update(x).qparams(Grid(bits=4, signed=True, symmetric=True))
    >>> round(float(p.scale), 4)
    0.3691
    """

    _symmetric_scale = "no_clipping"

    def __init__(
        self,
        block_size: tuple[int, ...] = (),
        *,
        gamma: float = 3.0,
        bins: int = 512,
        clamp_beyond: float = math.inf,
        rules: Rules = "aimet-torch",
    ) -> None:
        self.rules = _one_of(rules, ("aimet-torch", "aimet-onnx"), "rules")
        super().__init__(block_size, bins, spread_bins if rules == "aimet-torch" else zeroed_bins, clamp_beyond)
        if not 0 < gamma < math.inf:
            raise ValueError(f"gamma must be positive and finite, got {gamma!r}")
        self.gamma = gamma

    def _choose(self, grid: Grid) -> Range:
        steps, onnx = grid.qmax - grid.qmin, self.rules == "aimet-onnx"
        low, high = self._observed(steps)
        if grid.symmetric:
            delta, offset = _prices.symmetric_candidates(low, high, steps, onnx)
        else:
            delta, offset = _prices.candidates(low, high, steps, onnx)
        # aimet-onnx prices a strict symmetric grid as if it had its lowest code.
        price, priced = (_prices.onnx_noise, (1 << grid.bits) - 1) if onnx else (_prices.noise, steps)
        best = _prices.cheapest(self.histogram, delta, offset, price, priced, self.gamma)
        delta, offset = (np.take_along_axis(part, best, axis=1)[:, 0] for part in (delta, offset))
        if onnx:
            zeros = (self.histogram.low == 0) & (self.histogram.high == 0)
            delta, offset = np.where(zeros, 2 / priced, delta), np.where(zeros, -steps // 2, offset)
        return delta * offset, delta * (offset + steps)

    def _observed(self, steps: int) -> Range:
        """Both ends of the data, made to contain zero and to be no point."""
        h = self.histogram
        low, high, least = h.low, h.high, _prices.AIMET_STEP * steps
        if self.rules == "aimet-onnx":
            low, high = _histogram.filled_labels(h)
            least = 0.01
        low = np.minimum(low, 0)
        return low, np.maximum(np.maximum(high, 0), low + least)


class EntropyObserver(_HistogramObserver):
    """The symmetric clip whose histogram loses the least information when its bins are merged into codes.

    Migacz, '8-bit inference with TensorRT' (GTC 2017): for every threshold T, the Kullback-Leibler divergence of the
    histogram clipped at T (tails added to its end bins) from the same histogram, tails left out, merged into
    `levels` levels and spread out again.  The range is [-T, T], cut to the values seen.  Here the tails that were
    left out count as lost, and the peak at zero is levelled (see `_prices.entropy_threshold`).

    Parameters
    ----------
    block_size : tuple of int
    bins : int
        Over [-absmax, absmax] of the first batch.
    levels : int, optional
        By default the number of codes of the grid.  With as many levels as bins nothing can be clipped: ONNX
        Runtime's own defaults are ``bins=128, levels=128``.
    rules : {'qtools', 'ort'}
        ONNX Runtime 1.32 takes one bin more above than below, leaves out bins that do not fill a level, spreads a
        level over empty bins too, cuts counts to integers, and neither counts lost tails nor levels the peak.

    Examples
    --------
    >>> x = np.concatenate([np.random.default_rng(0).normal(size=9999), [50]])
    >>> bool(EntropyObserver().update(x).range(Grid(bits=8, signed=True, symmetric=True))[1] < 25)
    True
    """

    def __init__(
        self, block_size: tuple[int, ...] = (), *, bins: int = 2048, levels: int | None = None, rules: Rules = "qtools"
    ) -> None:
        super().__init__(block_size, bins, mirrored_bins)
        if levels is not None and (isinstance(levels, bool) or not isinstance(levels, int) or levels < 2):
            raise ValueError(f"levels must be an integer of at least 2, or None for the grid's codes, got {levels!r}")
        self.levels, self.rules = levels, _one_of(rules, ("qtools", "ort"), "rules")

    def _choose(self, grid: Grid) -> Range:
        h = self.histogram
        levels = self.levels or grid.qmax - grid.qmin + 1
        ort = self.rules == "ort"
        low, high = np.empty((2, len(h.counts)))
        rows = max(1, SLAB // h.counts.shape[1])
        for begin in range(0, len(h.counts), rows):
            part = slice(begin, begin + rows)
            counts = _histogram.mirrored(h, part)
            half = _prices.entropy_threshold(counts, levels, ort)
            above = np.minimum(half + 1, counts.shape[1] // 2) if ort else half
            low[part], high[part] = -half * h.width[part], above * h.width[part]
        return np.clip(low, h.low, h.high), np.clip(high, h.low, h.high)


OBSERVERS: dict[str, type[Observer]] = {
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "sqnr": SQNRObserver,
    "entropy": EntropyObserver,
}
_HISTOGRAM_STATE = ("counts", "anchor", "width", "first", "last", "low", "high")


class Tally:
    """What the observers of several methods (per tensor, with their defaults) keep of one tensor, each thing once.

    That is its range, the moving average of its range, and one histogram for each way to lay bins.  MSE and percentile
    share one: bins whose width is a power of two merge into exactly those that fewer bins would have been.

    Parameters
    ----------
    methods : iterable of str
        Of `OBSERVERS`.
    """

    def __init__(self, methods: Iterable[str]) -> None:
        made = {method: OBSERVERS[method]() for method in methods}
        self.dtype: Any = None
        self.ranges = {type(one): one for one in made.values() if isinstance(one, MinMaxObserver)}
        self.histograms: dict[str, Histogram] = {}
        shared = [one.histogram for one in made.values() if isinstance(one, _HistogramObserver)]
        for histogram in sorted(shared, key=lambda one: one.bins):
            self.histograms[histogram.start.__name__] = histogram  # the finest of a kind is the one that stays

    def take(self, x: np.ndarray) -> bool:
        """Take in a batch of floats; False, and nothing has changed, if it holds NaN or infinity."""
        if x.size == 0:
            return True
        x = np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32, order="C")
        low, high = x.min(), x.max()
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        for observer in self.ranges.values():
            observer.take(x, low, high)
        for histogram in self.histograms.values():
            histogram.take(x, low, high)
        self.dtype = x.dtype
        return True

    def lend(self, observer: Observer) -> Observer:
        """Give a new observer the state it would have, had it seen everything; what it chooses is its own affair.

        Raises
        ------
        ValueError
            If it would have kept something else.
        """
        state = self._range_for(observer) if isinstance(observer, MinMaxObserver) else self._histogram_for(observer)
        if not state or observer.block_size:
            raise ValueError(f"what was kept does not serve a {type(observer).__name__} of {described(observer)}")
        return observer.resume(self.dtype, **state)

    def _range_for(self, observer: Observer) -> dict[str, Any]:
        kept = self.ranges.get(type(observer))
        if kept is None or described(kept) != described(observer):
            return {}
        return {"low": kept.low, "high": kept.high}

    def _histogram_for(self, observer: Observer) -> dict[str, Any]:
        wanted = observer.histogram
        kept = self.histograms.get(wanted.start.__name__)
        if kept is None or wanted.clamp_beyond != kept.clamp_beyond:
            return {}
        if wanted.start is binary_bins and wanted.bins <= kept.bins:
            return {"histogram": kept.coarser(wanted.bins)}
        return {"histogram": copy.deepcopy(kept)} if wanted.bins == kept.bins else {}

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything kept, by names."""
        found = {f"{kind.__name__}.{end}": vars(o)[end] for kind, o in self.ranges.items() for end in ("low", "high")}
        return found | {f"{k}.{part}": vars(h)[part] for k, h in self.histograms.items() for part in _HISTOGRAM_STATE}

    def restore(self, dtype: Any, arrays: Mapping[str, np.ndarray]) -> Self:
        """The inverse of `arrays`."""
        self.dtype = np.dtype(dtype)
        for kind, observer in self.ranges.items():
            observer.resume(dtype, **{end: arrays[f"{kind.__name__}.{end}"].astype(dtype) for end in ("low", "high")})
        for key, histogram in self.histograms.items():
            vars(histogram).update({part: arrays[f"{key}.{part}"] for part in _HISTOGRAM_STATE})
        return self


def described(observer: Observer) -> dict[str, Any]:
    """What decides what an observer keeps of its data: block size, momentum, bins."""
    found: dict[str, Any] = {"block_size": list(observer.block_size)}
    if isinstance(observer, MovingAverageObserver):
        found["momentum"] = observer.momentum
    if isinstance(observer, _HistogramObserver):
        h = observer.histogram
        found |= {"bins": h.bins, "start": h.start.__name__, "clamp_beyond": str(h.clamp_beyond)}
    return found


# -- helpers -----------------------------------------------------------------------------------------------------------


def _one_of(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def _numpy(x: Array) -> np.ndarray:
    if not is_torch_array(x):
        return np.asarray(x)
    x = x.detach().cpu()
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
