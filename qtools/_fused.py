"""Compiled one-pass kernels behind `qtools.affine` for large float32 arrays on the CPU.

They give bit for bit what the plain array code in `affine` gives (the tests hold them to it) while touching memory
once.  A tensor and its blocks are folded to three axes (outer, middle, inner); two threads or more share the rows.
Ranges are taken on the *integer* image of the floats: IEEE-754 bit patterns, with the lower 31 bits of negatives
flipped, sort like the numbers themselves, so one integer min/max finds the range and any NaN or infinity at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from array_api_compat import is_torch_array
from numba.extending import register_jitable

from qtools.affine import Array, Grid, QParams, SymmetricScale, blocks_of, qparams_from_range, symmetric_divisors

_PARTS = 4  # that every core gets, so that one held up by another program does not hold up the rest
_SMALLEST, _LARGEST = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max
_CODES = ("int8", "uint8", "int16", "uint16")
_jit = numba.njit(nogil=True, cache=True)


def takes(x: Array, block_size: tuple[int, ...], qparams: QParams | None) -> bool:
    """Whether `x` and the scales lie in memory as the kernels want them, and the blocks on three axes at most."""
    if str(x.dtype).removeprefix("torch.") not in ("float32", *_CODES) or not _plain_memory(x):
        return False
    if qparams is not None and not (str(qparams.scale.dtype).endswith("float32") and _plain_memory(qparams.scale)):
        return False
    return len(_merged(tuple(x.shape), block_size)) <= 3


def _plain_memory(x: Array) -> bool:
    """Contiguous, on the CPU, in the machine's byte order, and no part of a gradient."""
    if is_torch_array(x):
        return x.device.type == "cpu" and x.is_contiguous() and not x.requires_grad
    return isinstance(x, np.ndarray | np.generic) and x.flags.c_contiguous and x.dtype.isnative


def quantize(x: Array, qparams: QParams, out: Array | None = None, *, backwards: bool = False) -> Array:
    """See `affine.quantize`; rule 'onnx'.  `backwards` starts with what a pass before has left in the cache."""
    source, grid = _numpy(x), qparams.grid
    codes = np.empty(source.shape, grid.dtype) if out is None else _numpy(out)
    if any(_each_part(_quantize_rows, source, codes, qparams, grid.qmin, grid.qmax, backwards=backwards)):
        raise ValueError("cannot quantize NaN: no code stands for it")
    return _like(codes, x) if out is None else out


def fake_quantize(x: Array, qparams: QParams, out: Array | None = None) -> Array:
    """See `affine.fake_quantize`."""
    source, grid = _numpy(x), qparams.grid
    result = np.empty(source.shape, np.float32) if out is None else _numpy(out)
    if any(_each_part(_fake_rows, source, result, qparams, grid.qmin, grid.qmax)):
        raise ValueError("cannot quantize NaN: no code stands for it")
    return _like(result, x) if out is None else out


def dequantize(codes: Array, qparams: QParams, out: Array | None = None) -> Array:
    """See `affine.dequantize`."""
    source = _numpy(codes)
    result = np.empty(source.shape, np.float32) if out is None else _numpy(out)
    _each_part(_dequantize_rows, source, result, qparams, 0, 0)
    return _like(result, codes) if out is None else out


def block_ranges(x: Array, block_size: tuple[int, ...]) -> tuple[Array, Array]:
    """See `affine.block_ranges`."""
    source = _numpy(x)
    counts = tuple(count for count, _ in blocks_of(source.shape, block_size))
    folded = _fold(source.shape, block_size)
    if _whole(folded):
        parts = _threads(lambda a, b: _range_rows(source.reshape(1, -1)[:, a:b].view(np.int32), b - a), source.size)
        low, high = _floats(min(p[0].min() for p in parts)), _floats(max(p[1].max() for p in parts))
    elif _row_blocks(folded):
        rows, width = _rows(source, folded), folded[2][1]
        parts = _threads(lambda a, b: _range_rows(rows[a:b].view(np.int32), width), len(rows))
        low, high = (_floats(np.concatenate([p[i] for p in parts])) for i in (0, 1))
    else:
        low, high = _plain_ranges(source, folded)
    return tuple(_like(np.reshape(part, counts), x) for part in (low, high))


def choose_and_quantize(
    x: Array, grid: Grid, symmetric_scale: SymmetricScale, eps: float | None, out: Array | None = None
) -> tuple[Array, QParams]:
    """See `affine.choose_and_quantize`: one pass where every block lies within a row."""
    source = _numpy(x)
    folded = _fold(source.shape, grid.block_size)
    if _whole(folded) or not _row_blocks(folded):
        return _in_two_passes(x, grid, symmetric_scale, eps, out)
    width = folded[2][1]
    codes = np.empty(source.shape, grid.dtype) if out is None else _numpy(out)
    rows, flat = _rows(source, folded), _rows(codes, folded)
    scale, zero_point = (np.empty((len(rows), -(-rows.shape[1] // width)), kind) for kind in (np.float32, np.int32))
    above, below = symmetric_divisors(grid, symmetric_scale)
    numbers = grid.qmin, grid.qmax, grid.midpoint, above, below, eps or 0.0

    def part(a: int, b: int) -> int:
        return _choose_rows(rows[a:b], flat[a:b], scale[a:b], zero_point[a:b], width, grid.symmetric, *numbers)

    if any(_threads(part, len(rows))):
        # Some block has no scale: the plain road says why.
        return _in_two_passes(x, grid, symmetric_scale, eps, out)
    counts = tuple(count for count, _ in blocks_of(source.shape, grid.block_size))
    qparams = QParams(grid, *(_like(array.reshape(counts), x) for array in (scale, zero_point)))
    return (_like(codes, x) if out is None else out), qparams


def _in_two_passes(
    x: Array, grid: Grid, symmetric_scale: SymmetricScale, eps: float | None, out: Array | None
) -> tuple[Array, QParams]:
    low, high = block_ranges(x, grid.block_size)
    qparams = qparams_from_range(low, high, grid, symmetric_scale=symmetric_scale, eps=eps)
    return quantize(x, qparams, out, backwards=True), qparams


# -- folding and threads ---------------------------------------------------------------------------------------------

Axis = tuple[int, int]  # length, block length


def _merged(shape: tuple[int, ...], block_size: tuple[int, ...]) -> list[Axis]:
    """The axes, neighbours merged where both are whole or both of block 1."""
    if not block_size:
        return [(math.prod(shape), math.prod(shape))]
    merged: list[Axis] = []
    for length, (_, size) in zip(shape, blocks_of(shape, block_size)):
        if length == 1:
            continue
        last = merged[-1] if merged else None
        if last and last[1] == 1 and size == 1:
            merged[-1] = (last[0] * length, 1)
        elif last and last[0] == last[1] and size == length:
            merged[-1] = (last[0] * length, last[0] * length)
        else:
            merged.append((length, size))
    return merged


def _fold(shape: tuple[int, ...], block_size: tuple[int, ...]) -> list[Axis]:
    """The merged axes, with axes of one element in front to make three."""
    merged = _merged(shape, block_size)
    return [(1, 1)] * (3 - len(merged)) + merged


def _whole(folded: list[Axis]) -> bool:
    return all(length == size for length, size in folded)


def _row_blocks(folded: list[Axis]) -> bool:
    """Whether every block lies within one row, so that rows can be worked through one after the other."""
    return folded[0][1] == folded[1][1] == 1 and folded[2][1] > 1


def _rows(source: np.ndarray, folded: list[Axis]) -> np.ndarray:
    """The tensor as rows: one a block where blocks fill the inner axis exactly, else that axis."""
    inner, width = folded[2]
    return source.reshape(-1, width if width > 1 and inner % width == 0 else inner)


def _plain_ranges(source: np.ndarray, folded: list[Axis]) -> tuple[np.ndarray, np.ndarray]:
    low = high = source.reshape([length for length, _ in folded])
    for axis, (length, size) in enumerate(folded):
        if size == length:
            low, high = low.min(axis, keepdims=True), high.max(axis, keepdims=True)
        elif size > 1:
            starts = np.arange(0, length, size)
            low, high = np.minimum.reduceat(low, starts, axis), np.maximum.reduceat(high, starts, axis)
    return low, high


def _each_part(
    kernel: Any, source: np.ndarray, out: np.ndarray, qparams: QParams, *limits: int, backwards: bool = False
) -> list[Any]:
    """Run a kernel over all rows; the whole tensor under one scale is cut anywhere."""
    scale, zero_point = np.asarray(qparams.scale), np.asarray(qparams.zero_point)
    blocks = blocks_of(source.shape, qparams.grid.block_size)
    if scale.shape != tuple(count for count, _ in blocks):
        raise ValueError(
            f"scale of shape {scale.shape} does not fit a tensor of shape {source.shape} "
            f"in blocks {qparams.grid.block_size}"
        )
    folded = _fold(source.shape, qparams.grid.block_size)
    (outer, a), (middle, b), (inner, width) = folded
    x, y = _rows(source, folded), _rows(out, folded)
    scale = scale.astype(np.float32, copy=False).reshape(-1, -(-x.shape[1] // width))
    zero_point = zero_point.astype(np.int32, copy=False).reshape(scale.shape)
    if _whole(folded):
        x, y, first = source.reshape(1, -1), out.reshape(1, -1), np.zeros(1, np.int32)
        whole = lambda i, j: kernel(x[:, i:j], y[:, i:j], first, scale, zero_point, j - i, *limits)  # noqa: E731
        return _threads(whole, source.size, backwards)
    if a == b == 1:
        row = np.arange(len(x), dtype=np.int32)
    else:
        blocks = inner // width if len(x) != outer * middle else 1
        row = np.arange(outer)[:, None] // a * -(-middle // b) + np.arange(middle) // b
        row = (row.reshape(-1, 1) * blocks + np.arange(blocks)).ravel().astype(np.int32)
    return _threads(lambda i, j: kernel(x[i:j], y[i:j], row[i:j], scale, zero_point, width, *limits), len(x), backwards)


def _threads(work: Any, count: int, backwards: bool = False) -> list[Any]:
    """``work(start, stop)`` over 0..count in parts, on every core this process may use; results in order."""
    bounds = np.linspace(0, count, min(count, _PARTS * _cores()) + 1).astype(int).tolist()
    step = -1 if backwards else 1
    return list(_pool().map(lambda part: work(*part), list(itertools.pairwise(bounds))[::step]))[::step]


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), "qtools")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numpy(x: Array) -> np.ndarray:
    return x.numpy() if is_torch_array(x) else x


def _like(result: np.ndarray, x: Array) -> Array:
    if not is_torch_array(x):
        return result
    import torch

    return torch.as_tensor(result)


# -- kernels ---------------------------------------------------------------------------------------------------------


def _floats(keys: np.ndarray) -> np.ndarray:
    """The floats whose sort keys these are; a key beyond that of infinity is a NaN."""
    keys = np.asarray(keys, np.int32)
    return (keys ^ (keys >> 31 & 0x7FFFFFFF)).view(np.float32)


# The innermost loops count from 0, so that the compiler sees that no index is negative, and vectorises them.


@_jit
def _range(bits):
    low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(bits.size):
        v = bits[j]
        key = v ^ ((v >> np.int32(31)) & np.int32(0x7FFFFFFF))
        low, high = min(low, key), max(high, key)
    return low, high


@_jit
def _range_rows(bits, width):
    """Lowest and highest sort key of every block of `width` along the rows of an int32 image of floats."""
    rows, length = bits.shape
    blocks = -(-length // width)
    low, high = np.empty((rows, blocks), np.int32), np.empty((rows, blocks), np.int32)
    for r in range(rows):
        if blocks == 1:
            low[r, 0], high[r, 0] = _range(bits[r])
            continue
        for k in range(blocks):
            low[r, k], high[r, k] = _range(bits[r, k * width : (k + 1) * width])
    return low, high


@_jit
def _choose(low, high, symmetric, qmin, qmax, midpoint, above, below, eps):
    """`affine.qparams_from_range` for one block, in float32; the last value tells whether it was possible."""
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    if symmetric:
        scale = max(high / above, -low / below)
    else:
        scale = (high / np.float32(2) - low / np.float32(2)) / np.float32(qmax - qmin) * np.float32(2)
    if eps > 0:
        scale = max(scale, np.float32(eps))
    elif scale == 0:
        scale = np.float32(1)
    else:
        scale = max(scale, _SMALLEST)
    possible = low > -np.inf and high < np.inf and max(high, -low) <= _LARGEST - scale
    zero_point = midpoint
    if not symmetric and possible:
        zero_point = int(min(max(np.float32(qmin) - np.rint(low / scale), np.float32(qmin)), np.float32(qmax)))
    return scale, zero_point, possible


@register_jitable
def _code(x, s, z, low, high):
    return np.int32(min(max(np.rint(x / s) + z, low), high))


@register_jitable
def _faked(x, s, z, low, high):
    return (min(max(np.rint(x / s) + z, low), high) - z) * s


@register_jitable
def _value(code, s, z, low, high):
    return (np.float32(code) - z) * s


def _over_rows(element):
    """The loops over rows and blocks around what is done to an element; the result tells whether a NaN was met.

    Row r uses the scales of row[r]: one an element (width 1), one in all, or one a block.  `element` is jitable, not
    jitted: numba could not find a closure over a compiled function in its cache again.
    """

    @_jit
    def rows(x, out, row, scale, zero_point, width, qmin, qmax):
        low, high = np.float32(qmin), np.float32(qmax)
        bad = np.int32(0)
        for r in range(x.shape[0]):
            t = row[r]
            if width == 1:
                for j in range(x.shape[1]):
                    bad |= np.int32(x[r, j] != x[r, j])
                    out[r, j] = element(x[r, j], scale[t, j], np.float32(zero_point[t, j]), low, high)
            elif scale.shape[1] == 1:
                s, z = scale[t, 0], np.float32(zero_point[t, 0])
                for j in range(x.shape[1]):
                    bad |= np.int32(x[r, j] != x[r, j])
                    out[r, j] = element(x[r, j], s, z, low, high)
            else:
                for k in range(scale.shape[1]):
                    s, z = scale[t, k], np.float32(zero_point[t, k])
                    source, target = x[r, k * width : (k + 1) * width], out[r, k * width : (k + 1) * width]
                    for j in range(source.size):
                        bad |= np.int32(source[j] != source[j])
                        target[j] = element(source[j], s, z, low, high)
        return bad

    return rows


_quantize_rows = _over_rows(_code)
_fake_rows = _over_rows(_faked)
_dequantize_rows = _over_rows(_value)


@_jit
def _choose_rows(x, out, scale, zero_point, width, symmetric, qmin, qmax, midpoint, above, below, eps):
    """Scale, zero point and codes of every row, while it is in the cache; returns how many blocks have none."""
    bits = x.view(np.int32)
    above, below = np.float32(above), np.float32(below)
    image = np.empty(2, np.int32)
    ends = image.view(np.float32)
    this = np.zeros(1, np.int32)
    failed = 0
    for r in range(x.shape[0]):
        for k in range(scale.shape[1]):
            low, high = _range(bits[r, k * width : (k + 1) * width])
            image[0] = low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))
            image[1] = high ^ ((high >> np.int32(31)) & np.int32(0x7FFFFFFF))
            s, z, possible = _choose(ends[0], ends[1], symmetric, qmin, qmax, midpoint, above, below, eps)
            scale[r, k], zero_point[r, k] = s, z
            failed += not possible
        if scale.shape[1] > 1:
            one = slice(r, r + 1)
            _quantize_rows(x[one], out[one], this, scale[one], zero_point[one], width, qmin, qmax)
        else:
            s, z = scale[r, 0], np.float32(zero_point[r, 0])
            for j in range(x.shape[1]):
                out[r, j] = _code(x[r, j], s, z, np.float32(qmin), np.float32(qmax))
    return failed
