"""The operators behind `qtools.npu.integer`, and the compiled loops behind these, each of which reads memory once.

Codes are kept signed: an unsigned ONNX code less 128 or 32,768, and its zero point likewise.  A `table` is a lookup of
all codes that follows, or empty.  Indices of innermost loops are unsigned where they have an offset: the compiler then
sees that none counts from the end, and vectorises the loop.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba.extending import register_jitable

from qtools.npu.integer import (
    Made,
    Reading,
    Target,
    attribute,
    fixed_code,
    reference,
    requantize_float,
    shift_of,
)

if TYPE_CHECKING:
    import onnx

    from qtools.npu.integer import Reader

_jit = numba.njit(nogil=True, cache=True, error_model="numpy")
_U = np.uint64
fixed_codes = numba.vectorize(nopython=True, cache=True)(fixed_code)
register_jitable(fixed_code)


@register_jitable
def _float_code(acc, gain, n, zero, low, high):
    """ONNX's rule, see `requantize_float`."""
    value = np.rint(gain[0].dtype.type(acc) * gain[0][n])
    return np.int32(min(max(value, low - zero), high - zero)) + np.int32(zero)


@register_jitable
def _fixed_code(acc, gain, n, zero, low, high):
    return fixed_code(np.int64(acc), gain[2], gain[0][n], gain[1][n], np.int64(zero), np.int64(low), np.int64(high))


def _requantized(element: Any) -> Any:
    @_jit
    def rows(acc, const, w_zero, gain, out, zero, low, high, table):
        """Accumulators to codes; the terms of the expansion that are known beforehand are still to be added.

        The sum of a row's codes, if the zero points of the weights ask for it, stands in one more column.
        """
        count, half = out.shape[1], table.size // 2
        for m in range(out.shape[0]):
            ones = np.int64(acc[m, count]) if acc.shape[1] > count else np.int64(0)
            row, target = acc[m], out[m]
            for n in range(count):
                full = acc.dtype.type(row[n] + const[n] - w_zero[n] * ones)
                target[n] = element(full, gain, n, zero, low, high)
            if half:
                for n in range(count):
                    target[n] = table[target[n] + half]

    return rows


_requantize = _requantized(_float_code), _requantized(_fixed_code)  # by whether in fixed point


@_jit
def _slide(x, w, const, out, channels, size, stride, dilation, x_zero):
    """Sums of a depthwise convolution of x, in which all windows lie; x and out are (n, h, w * c).

    w and const repeat the channels for some pixels side by side, so that innermost loops are long.
    """
    kind, length, run = const.dtype.type, out.shape[2], w.shape[1]
    for i in range(out.shape[0]):
        for r in range(out.shape[1]):
            acc = out[i, r]
            for s in range(0, length, run):
                acc[s : s + run] = const[: length - s]
            for tap in range(w.shape[0]):
                p, q = tap // size[1], tap % size[1]
                row, weights = x[i, r * stride[0] + p * dilation[0]], w[tap]
                for s in range(0, length, run):
                    source, target = _U(s * stride[1] + q * dilation[1] * channels), _U(s)
                    for c in range(_U(min(run, length - s))):
                        acc[target + c] += kind(kind(row[source + c] - x_zero) * weights[c])


@_jit
def _quantize(x, out, scale, zero, low, high):
    """Floats to codes as ONNX's QuantizeLinear; the result tells whether a NaN was met."""
    bad = np.int32(0)
    for i in range(x.size):
        bad |= np.int32(x[i] != x[i])
        out[i] = np.int32(min(max(np.rint(x[i] / scale) + zero, low), high))
    return bad


@_jit
def _lookup(x, out, table):
    for i in range(x.size):
        out[i] = table[x[i] + table.size // 2]


def look_up(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    if not len(table):
        return x
    codes = np.empty_like(x, table.dtype)
    _lookup(x.ravel("K"), codes.ravel("K"), table)
    return codes


def quantize(out: Target, _: Any, x: np.ndarray) -> np.ndarray:
    codes = np.empty(x.shape, out.empty.dtype)
    if _quantize(np.ascontiguousarray(x).ravel(), codes.ravel(), out.reading.scale, *out.ends):
        raise ValueError("the input holds NaN")
    return codes


def _rows(
    out: Target, table: np.ndarray, acc: np.ndarray, const: np.ndarray, zero: np.ndarray, gain: tuple[Any, ...]
) -> np.ndarray:
    """Codes (m, n) of accumulators; `const`, `zero` and `gain` are of n."""
    codes = np.empty((len(acc), len(const)), table.dtype)
    _requantize[out.fixed](acc, const, zero, gain, codes, *out.ends, table)
    return codes


# -- products --------------------------------------------------------------------------------------------------------


def carried(x: np.ndarray, w: np.ndarray, bound: int) -> np.ndarray:
    """A product of integer matrices, in floats: fast on any machine, and exact.

    `bound` is the largest sum of absolute products: up to 2**24 every partial sum is a whole number that float32 holds,
    in whatever order the terms are added; up to 2**53, one that float64 holds.
    """
    if bound > 2**53:
        raise ValueError("its sums need more than 53 bits")
    kind = np.float32 if bound <= 2**24 else np.float64
    return np.matmul(x.astype(kind), w.astype(kind, copy=False)).astype(np.int32 if bound < 2**31 else np.int64)


@functools.cache
def multiplies_int8() -> bool:
    """Whether torch has fast products of 8-bit matrices here, and exact ones: older processors saturate pairs."""
    import torch

    x, w = torch.full((16, 64), -128, dtype=torch.int8), torch.full((64, 16), -128, dtype=torch.int8)
    pairs = [(a, b) for a in (x, ~x) for b in (w, ~w)]  # ~x is 127
    fast = torch.backends.mkldnn.is_available()
    return fast and all(bool((torch._int_mm(a, b) == 64 * int(a[0, 0]) * int(b[0, 0])).all()) for a, b in pairs)


class _Matrix:
    """Constant weights (k, n) that codes are multiplied by, the zero points folded into constants.

    Scales of blocks are replaced by integers: their ratio to a fraction of the channel's largest, with as many bits as
    float64 leaves to the sums.  Multiplied into the weights, as the small integers of LPBQ are from the start, they
    leave one accumulator a channel.
    """

    def __init__(
        self, codes: np.ndarray, weight: Reading, bias: Any, reading: Reading, out: Target, alpha: float = 1.0
    ) -> None:
        codes, zero, scale = np.broadcast_arrays(codes, weight.zero, weight.scale)
        weights, unit, bits = codes - zero, scale.max(0), 8 * reading.kind.itemsize
        if blocked := not (scale == scale[:1]).all():
            sums = np.abs(weights * (scale / unit)).sum(0).max()
            unit = unit * np.float32(0.5 ** min(23, 51 - bits - math.ceil(math.log2(sums + 1))))
            weights = weights * np.rint(scale / unit.astype(np.float64)).astype(np.int64)
        step = np.float32(alpha) * reading.scale * unit  # of an accumulator
        self.bias = np.rint(np.broadcast_to(bias, step.shape) / step.astype(np.float64)).astype(np.int64)
        ends = [weights * (int(end) - reading.zero) for end in reading.codes[[0, -1]]]
        high, low = np.maximum(*ends).sum(0) + self.bias, np.minimum(*ends).sum(0) + self.bias
        self.out, self.weights, self.bound = out, weights, int(max(high.max(), -low.min()))
        self.gain = out.gain(step / out.reading.scale, self.bound)
        # Weights that fit into 8 bits only as they are, not centred, need the sum of the row's codes besides.
        self.zero, fits = np.zeros(len(step), np.int32), [abs(2 * part + 1).max() < 256 for part in (weights, codes)]
        ready = weights
        if not fits[0] and fits[1] and not blocked and (zero == zero[:1]).all():
            self.zero, ready = zero[0].astype(np.int32), np.hstack([codes, np.ones((len(codes), 1), np.int64)])
        largest = int(np.abs(ready).sum(0).max())
        self.int8 = abs(2 * ready + 1).max() < 256 and largest < 2**24 and multiplies_int8()
        self.sums = largest << bits - 1
        kind = np.int8 if self.int8 else np.float32 if self.sums <= 2**24 else np.float64
        self.ready = ready.astype(kind, order="C")
        lower = 128 if self.int8 and bits == 16 else 0  # see below
        const = self.bias - (reading.zero - lower) * weights.sum(0)
        self.const = const.astype(np.int32 if self.bound < 2**31 else np.int64)

    def __call__(self, table: np.ndarray, x: np.ndarray) -> np.ndarray:
        import torch

        if not self.int8:
            acc = carried(x, self.ready, self.sums).astype(self.const.dtype, copy=False)
        else:  # 16-bit codes in two products: 256 times the upper byte, the lower one, less 128 to be signed
            parts = [x] if x.itemsize == 1 else [(x >> 8).astype(np.int8), ((x & 255) - 128).astype(np.int8)]
            # Windows in a row may overlap in memory, which torch does not see.
            inputs, w = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts), torch.from_numpy(self.ready)
            acc, *lower = (torch._int_mm(part, w).numpy() for part in inputs)
            acc = (acc.astype(self.const.dtype) << 8) + lower[0] if lower else acc
        return _rows(self.out, table, acc, self.const, self.zero, self.gain)


def _matmul(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """MatMul and Gemm."""
    if node.input[1] not in read.weights or read.weights[node.input[1]][0].ndim != 2:
        return _matmul_of_two(read, node, out)
    (source, reading), (codes, weight) = read.tensors[node.input[0]], read.weights[node.input[1]]
    bias = read.real(node.input[2]) * attribute(node, "beta", 1.0) if len(node.input) > 2 else np.zeros(1)
    if attribute(node, "transA", 0) or bias.size not in (1, bias.shape[-1]):
        raise ValueError("a transposed first operand, and a bias that differs from row to row, are not known here")
    if attribute(node, "transB", 0):
        codes, weight = codes.T, weight._replace(scale=weight.scale.T, zero=weight.zero.T)
    matrix = _Matrix(codes, weight, bias.ravel(), reading, out, attribute(node, "alpha", 1.0))
    read.bits[node.name or node.output[0]] = matrix.bound.bit_length() + 1

    def run(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        return matrix(table, np.ascontiguousarray(x).reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return run, [source], out.empty


def _matmul_of_two(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    sources, (first, second) = read.operands(node)
    if node.op_type == "Gemm":
        raise ValueError("a Gemm is known here with constant weights only")
    factor, reach = first.scale * second.scale / out.reading.scale, first.reach * second.reach

    def run(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        bound, count = x.shape[-1] * reach, y.shape[-1]
        acc = carried(x - np.int32(first.zero), y - np.int32(second.zero), bound)
        none, gain = np.zeros(count, np.int32), out.gain(np.full(count, factor), bound)
        made = _rows(out, table, acc.reshape(-1, count), none.astype(acc.dtype), none, gain)
        return made.reshape(acc.shape)

    return run, sources, out.empty


# -- pictures: (n, h, w, c) in memory --------------------------------------------------------------------------------


def _window(node: onnx.NodeProto, size: Sequence[int]) -> tuple[Any, ...]:
    """What slides over pictures: size, stride, dilation, pads before and behind; auto_pad if SAME; ceil_mode.

    A picture of one axis has one row.
    """
    axes, auto = len(size), attribute(node, "auto_pad", "NOTSET")
    if axes not in (1, 2):
        raise ValueError("it is known here for pictures of one or two axes only")
    pads = [0] * 2 * axes if auto == "VALID" else attribute(node, "pads", [0] * 2 * axes)
    steps = (attribute(node, name, [1] * axes) for name in ("strides", "dilations"))
    parts = [(only, *part)[-2:] for only, part in zip((1, 1, 1, 0, 0), (size, *steps, pads[:axes], pads[axes:]))]
    return *parts, auto if auto.startswith("SAME") else "", bool(attribute(node, "ceil_mode", 0))


@functools.lru_cache(maxsize=4096)
def _fit(window: tuple[Any, ...], shape: tuple[int, int]) -> Any:
    """How many windows there are, how large a canvas they fill, and where on it the picture begins: pairs."""
    found, (*parts, same, ceil) = [], window
    for length, size, stride, dilation, start, end in zip(shape, *parts):
        reach = (size - 1) * dilation + 1
        if same:
            total = max((-(-length // stride) - 1) * stride + reach - length, 0)
            start = (total + (same == "SAME_LOWER")) // 2
            end = total - start
        steps = length + start + end - reach
        count = (-(-steps // stride) if ceil else steps // stride) + 1
        count -= ceil and (count - 1) * stride >= length + start  # none begins behind the picture and its pad
        if count < 1:
            raise ValueError(f"its windows are larger than a picture of {shape[0]} x {shape[1]}")
        found.append((count, (count - 1) * stride + reach, start))
    return tuple(zip(*found))


def _canvas(x: np.ndarray, window: tuple[Any, ...], fill: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Pictures with what the windows see around them, and the numbers of windows down and along."""
    (n, height, width, channels), (counts, (high, wide), (top, left)) = x.shape, _fit(window, x.shape[1:3])
    if not (top or left or high > height or wide > width):
        return x, counts
    canvas, x = np.full((n, high, wide, channels), fill, x.dtype), x[:, : high - top, : wide - left]
    canvas[:, top : top + x.shape[1], left : left + x.shape[2]] = x
    return canvas, counts


def _windows(x: np.ndarray, window: tuple[Any, ...], fill: int) -> np.ndarray:
    """All windows as a view (n, rows, columns, *size, c)."""
    x, counts = _canvas(x, window, fill)
    (n, down, along, one), (size, (p, q), (s, t)) = x.strides, window[:3]
    strides = (n, down * p, along * q, down * s, along * t, one)
    return np.ndarray((len(x), *counts, *size, x.shape[3]), x.dtype, x, 0, strides)


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((x if x.ndim == 4 else x[:, :, None]).transpose(0, 2, 3, 1))


def _channels_first(x: np.ndarray, rank: int) -> np.ndarray:
    """The same memory seen as ONNX sees it."""
    return x.transpose(0, 3, 1, 2) if rank == 4 else x[:, 0].transpose(0, 2, 1)


def _conv(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    (source, reading), (codes, weight) = read.tensors[node.input[0]], read.weights[node.input[1]]
    groups, (filters, depth, *size) = attribute(node, "group", 1), codes.shape
    bias = np.broadcast_to(read.real(node.input[2]) if len(node.input) > 2 else np.zeros(1), filters)
    window, depthwise = _window(node, size), depth == 1 and filters == groups > 1
    # A matrix for each group; its rows are in the order of a window: down, along, channels.
    parts = np.broadcast_arrays(codes, weight.zero, weight.scale)
    parts = [part.reshape(filters, depth, -1).transpose(2, 1, 0).reshape(-1, filters) for part in parts]
    matrices = []
    for one in np.split(np.arange(filters), 1 if depthwise else groups):
        codes, zero, scale = (part[:, one] for part in parts)
        matrices.append(_Matrix(codes, Reading(scale, zero, weight.kind), bias[one], reading, out))
    read.bits[node.name or node.output[0]] = max(matrix.bound for matrix in matrices).bit_length() + 1

    def run(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        windows = _windows(_channels_last(x), window, reading.zero)
        shape, shares = windows.shape[:3], np.split(windows, groups, axis=-1) if groups > 1 else [windows]
        made = [matrix(table, share.reshape(math.prod(shape), -1)) for matrix, share in zip(matrices, shares)]
        return _channels_first((np.hstack(made) if groups > 1 else made[0]).reshape(*shape, filters), x.ndim)

    if not depthwise:
        return run, [source], out.empty
    matrix, times = matrices[0], max(1, 256 // filters) if window[1][1] == 1 else 1
    kind, none = np.int16 if np.abs(matrix.weights).max() < 2**15 else np.int32, np.zeros_like(matrix.const)
    w = np.tile(matrix.weights, times).astype(kind, order="C")
    const = np.tile(matrix.bias, times).astype(none.dtype)

    def slide(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        canvas, (rows, columns) = _canvas(_channels_last(x), window, reading.zero)
        acc, canvas = np.empty((len(x), rows, columns * filters), none.dtype), canvas.reshape(*canvas.shape[:2], -1)
        _slide(canvas, w, const, acc, filters, *window[:3], reading.zero)
        made = _rows(out, table, acc.reshape(-1, filters), none, matrix.zero * 0, matrix.gain)
        return _channels_first(made.reshape(len(x), rows, columns, filters), x.ndim)

    return slide, [source], out.empty


def _average(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """AveragePool, GlobalAveragePool and ReduceMean: sums, whose multipliers go by the number of terms.

    ONNX Runtime's QLinearAveragePool adds the zero point before it rounds, its QLinearGlobalAveragePool behind that.
    """
    (source, reading), op = read.tensors[node.input[0]], node.op_type
    axes = read.reals[node.input[1]].tolist() if len(node.input) > 1 else attribute(node, "axes", None)
    keep, padded = op[0] == "G" or bool(attribute(node, "keepdims", 1)), attribute(node, "count_include_pad", 0)
    window = _window(node, attribute(node, "kernel_shape", ())) if op == "AveragePool" else None
    if window and window[-1] and padded:
        raise ValueError("count_include_pad with ceil_mode is not known here")

    def run(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        if window:
            inside = _channels_last(np.ones((1, 1, *x.shape[2:]), np.int64))
            count = _windows(inside, window, padded).sum((3, 4))
            total = _windows(_channels_last(x), window, reading.zero).sum((3, 4), dtype=np.int64)
            total -= math.prod(window[0]) * reading.zero
        else:
            reduced = tuple(range(2, x.ndim) if op[0] == "G" else axes or range(x.ndim))
            count = math.prod(x.shape[axis] for axis in reduced)
            total = x.sum(reduced, dtype=np.int64, keepdims=keep) - count * reading.zero
        factor, ends = reading.scale / (out.reading.scale * np.float32(count)), (out.low, out.high)
        if out.fixed:
            mantissa, shift, before = out.gain(np.asarray(factor), reading.reach * int(np.max(count)))
            made = fixed_codes(total, before, mantissa, shift, out.reading.zero, *ends)
        elif window:
            made = np.rint(total.astype(np.float32) * factor + np.float32(out.reading.zero)).clip(*ends)
        else:
            made = requantize_float(total, factor, out.reading.zero, *ends)
        made = look_up(table, made.astype(out.empty.dtype))
        return _channels_first(made, x.ndim) if window else made

    return run, [source], out.empty


# -- other operators -------------------------------------------------------------------------------------------------


def curve(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """A function of one tensor: a table of what ONNX's reference makes of all its codes."""
    numbers = {part for part in node.input if part in read.weights or part in read.reals}
    names = {part for part in node.input if part} - numbers
    if len(names) != 1 or any(read.real(part).size > 1 for part in numbers):
        raise ValueError("it is known here for one tensor of codes and single numbers only")
    [name] = names
    source, reading = read.tensors[name]
    with np.errstate(all="ignore"):
        feeds = {part: read.real(part).astype(np.float32) for part in numbers} | {name: reading.reals}
        real = reference(node, feeds)[0].ravel()
    return look_up, [source], out.reading.of(real).clip(out.low, out.high)


def _pair(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """Add, Sub, Mul or Div: of 8-bit codes all pairs are looked up, of wider ones a quotient of integers is rounded.

    The table holds what ONNX Runtime's QLinearAdd computes (fused multiply-adds of float32, all zero points in one
    term), and its QLinearMul; both add the zero point before they round.
    """
    op, (sources, readings) = node.op_type, read.operands(node)
    ratios = [reading.scale / out.reading.scale for reading in readings]
    ratios[1] = -ratios[1] if op == "Sub" else ratios[1]
    factor = readings[0].scale * readings[1].scale / out.reading.scale if op == "Mul" else ratios[0] / readings[1].scale
    bits = 26 - math.ceil(math.log2(factor if op in ("Mul", "Div") else max(map(abs, ratios))))
    times = [int(np.rint(part * 2.0**bits)) for part in (*ratios, factor)]

    def rounded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = a - np.int64(readings[0].zero), b - np.int64(readings[1].zero)
        top, under = {"Mul": x * y * times[2], "Div": x * times[2]}.get(op, x * times[0] + y * times[1]), 1 << bits
        if op == "Div":
            top, under = top * np.where(y < 0, -1, 1), np.maximum(np.abs(y), 1) << bits
        return ((2 * top + under) // (2 * under) + out.reading.zero).clip(out.low, out.high)

    def tabled(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = (codes.astype(np.float64) + shift_of(reading.kind) for codes, reading in zip((a, b), readings))
        zeros = [np.float32(reading.zero + shift_of(reading.kind)) for reading in (*readings, out.reading)]
        if op in ("Add", "Sub"):
            term = zeros[2] - np.float32(np.float64(ratios[0]) * zeros[0] + ratios[1] * zeros[1])
            value = (x * ratios[0] + (y * ratios[1] + term).astype(np.float32)).astype(np.float32)
        else:
            x, y = (x - zeros[0]).astype(np.float32), (y - zeros[1]).astype(np.float32)
            y = np.float32(1) / np.where(y == 0, np.float32(1e-9), y) if op == "Div" else y
            value = x * y * factor + zeros[2]
        return (np.rint(value) - shift_of(out.reading.kind)).clip(out.low, out.high)

    def number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.int16) << 8) + b  # of a pair; it wraps around, so that each has its own

    def run(table: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return look_up(table, number(a, b) if narrow else rounded(a, b).astype(out.empty.dtype))

    narrow, table = max(reading.kind.itemsize for reading in readings) == 1, out.empty
    if narrow:
        a, b = (part.ravel() for part in np.meshgrid(readings[0].codes, readings[1].codes))
        table = np.empty(1 << 16, out.empty.dtype)
        table[number(a, b).astype(np.int64) + (1 << 15)] = tabled(a, b)
    single = [name in read.values and read.values[name].size == 1 for name in sources]
    if any(single):  # all pairs with one number
        operands = [read.values[s] if only else reading.codes for s, only, reading in zip(sources, single, readings)]
        return look_up, [sources[single[0]]], run(table, *operands).ravel()
    return run, sources, table


def _softmax(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """exp(x - max) from a table of integers of 31 bits, over their sum; both modes are the same."""
    source, reading = read.tensors[node.input[0]]
    axis, factor = attribute(node, "axis", -1), int(np.rint(2.0**12 / out.reading.scale))
    powers = np.rint((2**31 - 1) * np.exp(-np.arange(reading.codes.size) * np.float64(reading.scale))).astype(np.int64)

    def run(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        shares = powers[np.subtract(x.max(axis, keepdims=True), x, dtype=np.int32)]
        total = shares.sum(axis, keepdims=True) << 12
        made = (shares * factor + (total >> 1)) // total + out.reading.zero
        return look_up(table, made.clip(out.low, out.high).astype(out.empty.dtype))

    return run, [source], out.empty


def _normalize(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    """LayerNormalization and RMSNormalization of the last axis, in fixed point with 16 bits behind the point.

    With n entries, (x - mean) / sqrt(variance + epsilon) is (n x - sum) / sqrt(n sum(x**2) - sum**2 + extra).
    """
    (source, reading), weight, centred = read.tensors[node.input[0]], read.real(node.input[1]), node.op_type[0] == "L"
    count, unit = weight.size, np.abs(weight).max() / 2**15
    bias = read.real(node.input[2]) if len(node.input) > 2 else np.zeros(count)
    if attribute(node, "axis", -1) != -1 or weight.ndim != 1 or count > 2**14 or not unit:
        raise ValueError("it is known here for the last axis, of up to 16,384 entries")
    weight, bias = (np.rint(part).astype(np.int64) for part in (weight / unit, bias / unit * 2**16))
    extra = int(min(attribute(node, "epsilon", 1e-5) * count**2 / float(reading.scale) ** 2, 2.0**61))
    gain = out.gain(np.full(count, unit / 2**16 / out.reading.scale, np.float32), 2**40)

    def run(table: np.ndarray, x: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(x).reshape(-1, count).astype(np.int64) - reading.zero
        total = rows.sum(1, keepdims=True) * centred
        square = count * (rows**2).sum(1, keepdims=True) - total**2 + extra
        # The root of a number of 61 or 62 bits: what floats make of it is off by one at most.
        shift = np.maximum(62 - np.frexp(square.astype(np.float64))[1], 0) // 2
        square <<= 2 * shift
        root = np.sqrt(square.astype(np.float64)).astype(np.int64)
        root += ((root + 1) ** 2 <= square).astype(np.int64) - (root**2 > square)
        top, root = (count * rows - total) << (16 + shift), np.maximum(root, 1)
        ratio = np.sign(top) * ((np.abs(top) + (root >> 1)) // root)
        return _rows(out, table, ratio * weight, bias, np.zeros(count, np.int32), gain).reshape(x.shape)

    return run, [source], out.empty


def _concat(read: Reader, node: onnx.NodeProto, out: Target) -> Made:
    sources, readings = read.operands(node)
    tables = [out.reading.of(reading.reals).clip(out.low, out.high) for reading in readings]
    axis = attribute(node, "axis", 0)
    return lambda _, *parts: np.concatenate([*map(look_up, tables, parts)], axis), sources, None


MAKERS: dict[str, Callable[[Reader, onnx.NodeProto, Target], Made]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _pair),
    **dict.fromkeys(("MatMul", "Gemm"), _matmul),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "ReduceMean"), _average),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalize),
    **{"Conv": _conv, "Softmax": _softmax, "Concat": _concat},
}


def move(node: onnx.NodeProto, reading: Reading, constants: Mapping[str, np.ndarray]) -> Callable[..., Any]:
    """What puts codes elsewhere, in the place of a step's run."""
    op, source, feeds = node.op_type, node.input[0], dict(constants)
    if op == "Transpose":
        order = attribute(node, "perm", None)
        return lambda _, x: x.transpose(order)
    if op == "Reshape":
        lengths = constants[node.input[1]].tolist()
        return lambda _, x: x.reshape([length or x.shape[axis] for axis, length in enumerate(lengths)])
    if op == "Flatten":
        axis = attribute(node, "axis", 1)
        return lambda _, x: x.reshape(math.prod(x.shape[:axis]), -1)
    if op == "MaxPool":
        window, least = _window(node, attribute(node, "kernel_shape", ())), int(reading.codes[0])
        return lambda _, x: _channels_first(_windows(_channels_last(x), window, least).max((3, 4)), x.ndim)
    if op == "Pad" and len(node.input) > 2 and node.input[2]:
        feeds[node.input[2]] = reading.of(constants[node.input[2]])
    return lambda _, x: list(reference(node, {source: x, **feeds}))
