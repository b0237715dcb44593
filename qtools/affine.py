"""The equations of linear (affine) quantization, once, for every bit width and granularity.

A real number ``x`` is stored as an integer code ``q`` on a uniform grid::

    q     = clip(round(x / scale) + zero_point, qmin, qmax)
    x_hat = (q - zero_point) * scale

The rounding is to nearest, ties to even, and happens *before* the zero point is added, as in ONNX
(QuantizeLinear, opset 21).  Two frozen types carry everything: a `Grid` says what the hardware offers,
a `QParams` what calibration chose on it.  NumPy and torch arrays take the same code, and every function
returns the kind it was given.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from array_api_compat import array_namespace, is_torch_array

Array = Any
"""A NumPy array or a torch tensor."""

SymmetricScale = Literal["qmax", "half_range", "no_clipping"]
Rule = Literal["onnx", "torchao", "article"]
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_FUSED_FROM = 1 << 20  # elements; below this a compiled kernel costs more to load than it saves


@dataclass(frozen=True)
class Grid:
    """The integer grid a tensor is stored on: what the hardware offers.

    Parameters
    ----------
    bits : int
        Width of a code, 2 to 16.
    signed : bool
        Codes are two's complement (-128..127) rather than unsigned (0..255).
    symmetric : bool
        The zero point is fixed: 0 on a signed grid, the midpoint (128) on an unsigned one.
    narrow_range : bool
        The lowest code is left unused (-127..127), so that the grid has as many codes below zero as above.
    block_size : tuple of int
        How many neighbours share one scale along each axis, -1 for the whole axis: (-1, -1) is per tensor,
        (1, -1) per channel of axis 0, (1, 128) groups of 128.  Empty: per tensor, whatever the rank.

    Examples
    --------
    >>> Grid(bits=4, signed=True).qmin, Grid(bits=4, signed=True, narrow_range=True).qmin
    (-8, -7)
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow_range: bool = False
    block_size: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bits = _as_int(self.bits, "bits")
        if not 2 <= bits <= 16:
            raise ValueError(f"bits must be 2 to 16, got {bits} (int32 exists for biases only)")
        blocks = tuple(_as_int(b, "block_size") for b in self.block_size)
        if any(b < 1 and b != -1 for b in blocks):
            raise ValueError(f"block_size entries must be at least 1, or -1 for the whole axis, got {blocks}")
        object.__setattr__(self, "bits", bits)
        object.__setattr__(self, "block_size", blocks)

    @property
    def qmin(self) -> int:
        """The lowest code."""
        return (-(1 << self.bits - 1) if self.signed else 0) + self.narrow_range

    @property
    def qmax(self) -> int:
        """The highest code."""
        return (1 << self.bits - self.signed) - 1

    @property
    def midpoint(self) -> int:
        """The zero point of a symmetric grid: 0 if signed, 2**(bits - 1) if not."""
        return 0 if self.signed else 1 << self.bits - 1

    @property
    def dtype(self) -> str:
        """The smallest byte-wide integer type that holds a code: 'int8', 'uint8', 'int16' or 'uint16'."""
        return f"{'int' if self.signed else 'uint'}{8 if self.bits <= 8 else 16}"


@dataclass(frozen=True, eq=False)
class QParams:
    """A grid together with the scale and zero point that calibration chose on it.

    Parameters
    ----------
    grid : Grid
    scale : array of float32 or float64
        Step between neighbouring codes, in units of the tensor; one per block (0-d for an empty block_size).
    zero_point : array of int32
        The code that stands for exactly 0.0; same shape as `scale`.

    Raises
    ------
    ValueError
        If shapes differ, a scale is not finite and positive, or a zero point is not a code of the grid.
    """

    grid: Grid
    scale: Array
    zero_point: Array

    def __post_init__(self) -> None:
        if tuple(self.scale.shape) != tuple(self.zero_point.shape):
            raise ValueError(
                f"scale and zero_point must have one shape, got {tuple(self.scale.shape)} "
                f"and {tuple(self.zero_point.shape)}"
            )
        xp = array_namespace(self.scale)
        if not bool(xp.all(xp.isfinite(self.scale) & (self.scale > 0))):
            raise ValueError("every scale must be finite and greater than 0")
        low, high = (0, 0) if self.grid.symmetric else (self.grid.qmin, self.grid.qmax)
        if self.grid.symmetric:
            low = high = self.grid.midpoint
        if not bool(xp.all((self.zero_point >= low) & (self.zero_point <= high))):
            raise ValueError(f"every zero_point of this grid must lie in [{low}, {high}]")


def choose_qparams(
    x: Array, grid: Grid, *, symmetric_scale: SymmetricScale = "qmax", eps: float | None = None
) -> QParams:
    """Scale and zero point from the smallest and largest value of every block (min-max calibration).

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
    grid : Grid
    symmetric_scale, eps
        See `qparams_from_range`.

    Raises
    ------
    TypeError
        If `x` is not an array of floats.
    ValueError
        If `x` is empty, or holds NaN or infinity, or does not have the rank that `grid.block_size` names.

    Examples
    --------
    >>> p = choose_qparams(np.array([-1.0, 0.5, 1.55], np.float32), Grid(bits=8))
    >>> round(float(p.scale), 6), int(p.zero_point)
    (0.01, 100)
    """
    low, high = block_ranges(x, grid.block_size)
    return qparams_from_range(low, high, grid, symmetric_scale=symmetric_scale, eps=eps)


def qparams_from_range(
    low: Array, high: Array, grid: Grid, *, symmetric_scale: SymmetricScale = "qmax", eps: float | None = None
) -> QParams:
    """Scale and zero point of a grid that covers [low, high], widened to contain zero.

    Parameters
    ----------
    low, high : float arrays of one shape
        The range of every block.
    grid : Grid
    symmetric_scale : {'qmax', 'half_range', 'no_clipping'}
        What the largest magnitude maps to on a symmetric grid; with 8 bits: ``absmax / 127`` (llama2.c,
        ONNX Runtime int8), ``absmax / 127.5`` (torchao SYMMETRIC, ONNX Runtime int4), or
        ``max(high / 127, -low / 128)`` (AIMET min-max, torchao SYMMETRIC_NO_CLIPPING_ERR).
        On a narrow grid all three agree.
    eps : float, optional
        Smallest scale; AIMET uses 2**-23.  By default a range of zero width gets scale 1 (any scale stores
        zero exactly, and 1 is one that every converter takes), and subnormal scales are raised to the
        smallest normal float.

    Raises
    ------
    ValueError
        If a range is reversed or not finite.
    """
    _check_options(grid, symmetric_scale, eps)
    low, high = _working(low), _working(high)
    xp = array_namespace(low, high)
    if not bool(xp.all(xp.isfinite(low) & xp.isfinite(high) & (low <= high))):
        raise ValueError("cannot choose a scale: the range holds NaN or infinity, or low is above high")
    zero = xp.zeros_like(low)
    low, high = xp.minimum(low, zero), xp.maximum(high, zero)
    if grid.symmetric:
        above, below = symmetric_divisors(grid, symmetric_scale)
        scale = _floor_scale(xp, xp.maximum(high / above, -low / below), eps)
        zero_point = xp.full_like(low, grid.midpoint, dtype=xp.int32)
    else:
        # Halved before the difference is taken, so that a range like [-3e38, 3e38] does not overflow.
        scale = _floor_scale(xp, (high / 2 - low / 2) / (grid.qmax - grid.qmin) * 2, eps)
        zero_point = xp.clip(grid.qmin - xp.round(low / scale), grid.qmin, grid.qmax)
        zero_point = xp.astype(zero_point, xp.int32)
    # The ends of the grid lie up to half a step beyond the data; they must be numbers too.
    if bool(xp.any(xp.maximum(high, -low) > float(xp.finfo(scale.dtype).max) - scale)):
        raise ValueError(f"the range is too wide for {grid.bits} bits in {scale.dtype}: scale the tensor down first")
    return QParams(grid, scale, zero_point)


def symmetric_divisors(grid: Grid, symmetric_scale: SymmetricScale) -> tuple[float, float]:
    """What the largest and the (negated) smallest value are divided by; the larger quotient is the scale.

    Raises
    ------
    ValueError
        If the rule is unknown.

    Examples
    --------
    >>> symmetric_divisors(Grid(4, signed=True, symmetric=True), "half_range")
    (7.5, 7.5)
    """
    below, above = grid.midpoint - grid.qmin, grid.qmax - grid.midpoint
    divisors = {"qmax": (above, above), "half_range": ((above + below) / 2,) * 2, "no_clipping": (above, below)}
    if symmetric_scale not in divisors:
        raise ValueError(f"symmetric_scale must be one of {get_args(SymmetricScale)}, got {symmetric_scale!r}")
    return divisors[symmetric_scale]


def quantize(x: Array, qparams: QParams, *, rule: Rule = "onnx", out: Array | None = None) -> Array:
    """Real numbers to integer codes.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Infinities saturate.  The arithmetic is float32, or float64 for a float64 `x`.
    qparams : QParams
    rule : {'onnx', 'torchao', 'article'}
        ``round(x / s) + zp`` (ONNX, the default), ``round(x * (1 / s)) + zp`` (torchao), or
        ``round(x / s + zp)`` (zero point inside the rounding).  They differ at ties and in the last bit.
    out : array of `qparams.grid.dtype`, optional
        Where to write the codes: contiguous, shape and kind of `x`.  After an error its content is undefined.

    Returns
    -------
    array of `qparams.grid.dtype`, shape of `x`

    Raises
    ------
    TypeError
        If `x` is not an array of floats.
    ValueError
        If `x` holds NaN, or its shape does not fit `qparams`.

    Examples
    --------
    >>> p = QParams(Grid(bits=8), np.float32(0.5), np.int32(101))
    >>> quantize(np.array([0.25, 0.75, 1e9], np.float32), p).tolist()
    [101, 103, 255]
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {get_args(Rule)}, got {rule!r}")
    _check_float(x)
    _check_out(out, x, qparams.grid.dtype)
    if rule == "onnx" and (fused := _fused_for(x, qparams.grid, qparams)):
        return fused.quantize(x, qparams, out)
    xp = array_namespace(x)
    x, scale, zero_point = _operands(x, qparams)
    with np.errstate(over="ignore", invalid="ignore"):
        q = _rounded(xp, x, scale, zero_point, rule)
    if bool(xp.any(xp.isnan(q))):
        raise ValueError("cannot quantize NaN: no code stands for it")
    q = xp.clip(q, qparams.grid.qmin, qparams.grid.qmax)
    return _into(out, xp.astype(q, getattr(xp, qparams.grid.dtype)))


def dequantize(codes: Array, qparams: QParams, dtype: Any = None, *, out: Array | None = None) -> Array:
    """Integer codes back to real numbers: ``(q - zero_point) * scale``.

    Parameters
    ----------
    codes : integer array, as `quantize` returns it
    qparams : QParams
    dtype : dtype, optional
        Of the result; by default that of the scale.
    out : array, optional
        Where to write the result: contiguous, shape and kind of `codes`, of the result's dtype.

    Raises
    ------
    TypeError
        If `codes` are not integers.
    """
    if "int" not in str(codes.dtype):
        raise TypeError(f"dequantize takes integer codes, got {codes.dtype}")
    _check_out(out, codes, qparams.scale.dtype if dtype is None else dtype)
    if dtype is None and (fused := _fused_for(codes, qparams.grid, qparams)):
        return fused.dequantize(codes, qparams, out)
    xp = array_namespace(codes)
    scale, zero_point = _spread(qparams, tuple(codes.shape), xp, codes)
    x = (xp.astype(codes, scale.dtype) - xp.astype(zero_point, scale.dtype)) * scale
    return _into(out, x if dtype is None else xp.astype(x, dtype))


def fake_quantize(x: Array, qparams: QParams, *, out: Array | None = None) -> Array:
    """Quantize and dequantize at once: the float that the code stands for, in the dtype of `x`.

    Raises
    ------
    TypeError, ValueError
        As `quantize`.

    Examples
    --------
    >>> p = QParams(Grid(bits=4, signed=True), np.float32(0.5), np.int32(0))
    >>> fake_quantize(np.array([0.6, 100.0], np.float32), p).tolist()
    [0.5, 3.5]
    """
    _check_float(x)
    _check_out(out, x, x.dtype)
    if fused := _fused_for(x, qparams.grid, qparams):
        return fused.fake_quantize(x, qparams, out)
    return dequantize(quantize(x, qparams), qparams, dtype=x.dtype, out=out)


def choose_and_quantize(
    x: Array,
    grid: Grid,
    *,
    symmetric_scale: SymmetricScale = "qmax",
    eps: float | None = None,
    out: Array | None = None,
) -> tuple[Array, QParams]:
    """`choose_qparams`, then `quantize`; on large arrays both happen while a block is in the cache.

    Returns
    -------
    codes : array of `grid.dtype`
    qparams : QParams
    """
    _check_float(x)
    _check_out(out, x, grid.dtype)
    _check_options(grid, symmetric_scale, eps)
    if math.prod(x.shape) and (fused := _fused_for(x, grid)):
        return fused.choose_and_quantize(x, grid, symmetric_scale, eps, out)
    qparams = choose_qparams(x, grid, symmetric_scale=symmetric_scale, eps=eps)
    return quantize(x, qparams, out=out), qparams


def block_ranges(x: Array, block_size: tuple[int, ...]) -> tuple[Array, Array]:
    """Smallest and largest value of every block.

    Returns
    -------
    low, high : arrays of float32 (float64 for a float64 `x`), one entry per block
        Blocks at the end of an axis may be shorter.

    Raises
    ------
    TypeError, ValueError
        As `choose_qparams`.
    """
    _check_float(x)
    blocks = blocks_of(tuple(x.shape), block_size)
    if math.prod(x.shape) == 0:
        raise ValueError(f"cannot take the range of an empty tensor of shape {tuple(x.shape)}")
    if fused := _fused_for(x, Grid(block_size=block_size)):
        return fused.block_ranges(x, block_size)
    xp = array_namespace(x)
    if not block_size:
        return xp.min(x := _working(x)), xp.max(x)
    low = high = _working(x)
    for axis, (count, size) in enumerate(blocks):
        low = xp.min(_split(xp, low, axis, count, size), axis=axis + 1)
        high = xp.max(_split(xp, high, axis, count, size), axis=axis + 1)
    return low, high


def blocks_of(shape: tuple[int, ...], block_size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Number of blocks and length of a block along every axis; empty for an empty `block_size`.

    Raises
    ------
    ValueError
        If `block_size` names another rank than `shape` has.

    Examples
    --------
    >>> blocks_of((4, 300), (1, 128))
    [(4, 1), (3, 128)]
    """
    if block_size and len(block_size) != len(shape):
        raise ValueError(
            f"block_size {block_size} names {len(block_size)} axes, the tensor of shape {shape} has another rank"
        )
    sizes = [n if b == -1 else min(b, max(n, 1)) for n, b in zip(shape, block_size)]
    return [(1 if b == -1 else -(-n // size), size) for n, b, size in zip(shape, block_size, sizes)]


@dataclass(frozen=True, eq=False)
class LPBQ:
    """Low-power block quantization: block scales that are small integers times one float per channel.

    Parameters
    ----------
    qparams : QParams
        What the codes are quantized with; its scale is ``block_scale * channel_scale``.
    block_scale : array of uint8, shape of `qparams.scale`
        1 to 2**bits of a block scale, 16 by default.
    channel_scale : array of float, shape of `qparams.scale` with 1 along the blocked axis
    """

    qparams: QParams
    block_scale: Array
    channel_scale: Array


def choose_lpbq(x: Array, grid: Grid, *, symmetric_scale: SymmetricScale = "qmax", scale_bits: int = 4) -> LPBQ:
    """Block scales as `choose_qparams` finds them, rounded to small integers times one float per channel.

    The channel's float is its largest block scale over ``2**scale_bits``, as in AIMET and ExecuTorch; QNN calls the
    encoding BLOCKWISE_EXPANSION.  A block that is all zero gets the smallest integer.

    Parameters
    ----------
    x : array of floats
        Weights: one axis of channels, one that is blocked, any others of length 1.
    grid : Grid
        Symmetric, with blocks along one axis.
    symmetric_scale
        See `qparams_from_range`.
    scale_bits : int
        1 to 7.

    Raises
    ------
    TypeError, ValueError
        As `choose_qparams`; or if grid or shape are not as above, or a row has fewer than two blocks.

    Examples
    --------
    >>> w = np.array([[7.0, 0, 3.5, 0]], np.float32)
    >>> choose_lpbq(w, Grid(4, signed=True, symmetric=True, block_size=(1, 2))).block_scale.tolist()
    [[16, 8]]
    """
    bits = _as_int(scale_bits, "scale_bits")
    blocked = [axis for axis, size in enumerate(grid.block_size) if size > 1]
    if not grid.symmetric or len(blocked) != 1 or not 1 <= bits <= 7:
        raise ValueError(f"LPBQ needs a symmetric grid, blocks along one axis, and scales of 1 to 7 bits, got {grid}")
    plain = choose_qparams(x, grid, symmetric_scale=symmetric_scale)
    axis, counts = blocked[0], tuple(plain.scale.shape)
    if counts[axis] < 2 or sum(count > 1 for count in counts) > 2:
        raise ValueError(f"LPBQ needs rows of at least two blocks and one axis of channels, got blocks of {counts}")
    xp = array_namespace(plain.scale)
    low, high = block_ranges(x, grid.block_size)
    empty = (low == 0) & (high == 0)  # their scale is a stand-in and must not count
    scale = xp.where(empty, xp.zeros_like(plain.scale), plain.scale)
    channel = xp.max(scale, axis=axis, keepdims=True) / 2**bits
    channel = _floor_scale(xp, channel, None)
    block = xp.clip(xp.round(scale / channel), 1, 2**bits)
    rounded = QParams(grid, block * channel, plain.zero_point)
    return LPBQ(rounded, xp.astype(block, xp.uint8), channel)


def bits_per_weight(grid: Grid, shape: tuple[int, ...], *, scale_bits: int = 16, channel_bits: int = 0) -> float:
    """Storage of a quantized tensor with its scales and zero points, in bits per element.

    Parameters
    ----------
    grid : Grid
    shape : tuple of int
        Of the tensor.
    scale_bits : int
        Of one scale: 16 for half precision, 32 for single, 4 for the integers of LPBQ.
    channel_bits : int
        Of what is stored once per row of axis 0 besides: 16 or 32 for LPBQ's channel scales.

    Raises
    ------
    ValueError
        If the tensor has no elements.

    Examples
    --------
    >>> bits_per_weight(Grid(4, signed=True, symmetric=True, block_size=(1, 128)), (4096, 4096))
    4.125
    """
    if not math.prod(shape):
        raise ValueError(f"a tensor of shape {shape} has no weights to count bits for")
    blocks = math.prod(count for count, _ in blocks_of(shape, grid.block_size))
    zero_point = 0 if grid.symmetric else grid.bits
    rows = shape[0] if shape else 1
    return grid.bits + (blocks * (scale_bits + zero_point) + rows * channel_bits) / math.prod(shape)


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """Two 4-bit codes a byte, the first in the low nibble (as ONNX and Qualcomm's packed weights store them).

    Parameters
    ----------
    codes : integer ndarray, any shape
        Values in -8..7 or 0..15.

    Returns
    -------
    ndarray of uint8, one-dimensional, ceil(codes.size / 2) bytes; an odd last high nibble is 0.

    Examples
    --------
    >>> f"{pack_int4(np.array([10, 4], np.uint8))[0]:08b}"
    '01001010'
    """
    flat = np.asarray(codes).ravel()
    if flat.dtype.kind not in "iu":
        raise TypeError(f"pack_int4 takes integer codes, got {flat.dtype}")
    if flat.size and not (flat.min() >= -8 and flat.max() <= 15 and (flat.min() >= 0 or flat.max() <= 7)):
        raise ValueError(f"4-bit codes lie in -8..7 or 0..15, got {flat.min()}..{flat.max()}")
    nibbles = np.zeros(-(-flat.size // 2) * 2, np.uint8)
    nibbles[: flat.size] = flat.astype(np.uint8) & 0xF
    return nibbles[0::2] | nibbles[1::2] << 4


def unpack_int4(packed: np.ndarray, shape: tuple[int, ...], *, signed: bool) -> np.ndarray:
    """The inverse of `pack_int4`.

    Raises
    ------
    ValueError
        If `packed` does not hold exactly the bytes that `shape` needs.

    Examples
    --------
    >>> unpack_int4(pack_int4(np.array([-8, 7, 3])), (3,), signed=True).tolist()
    [-8, 7, 3]
    """
    size = math.prod(shape)
    packed = np.asarray(packed, np.uint8).ravel()
    if packed.size != -(-size // 2):
        raise ValueError(f"{size} 4-bit codes take {-(-size // 2)} bytes, got {packed.size}")
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2], nibbles[1::2] = packed & 0xF, packed >> 4
    codes = nibbles[:size].reshape(shape)
    # A nibble of 8 or more is negative in two's complement: flip its sign bit, then subtract it.
    return (codes ^ 8).astype(np.int8) - np.int8(8) if signed else codes


# -- helpers ---------------------------------------------------------------------------------------------------------


def _as_int(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _check_float(x: Array) -> None:
    if isinstance(x, np.ma.MaskedArray) or not (isinstance(x, np.ndarray | np.generic) or is_torch_array(x)):
        raise TypeError(f"expected a NumPy or torch array, got {type(x).__name__}")
    name = str(x.dtype).removeprefix("torch.")
    if name not in _FLOATS:
        raise TypeError(
            f"expected an array of {', '.join(_FLOATS)}, got {name}: quantization maps real numbers to codes"
        )


def _check_options(grid: Grid, symmetric_scale: SymmetricScale, eps: float | None) -> None:
    symmetric_divisors(grid, symmetric_scale)
    if eps is not None and not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, or None, got {eps!r}")


def _check_out(out: Array | None, x: Array, dtype: Any) -> None:
    if out is None:
        return
    name = str(dtype).removeprefix("torch.") if is_torch_array(x) else np.dtype(dtype).name
    same_kind = is_torch_array(out) == is_torch_array(x) and hasattr(out, "dtype")
    if not same_kind or out.shape != x.shape or str(out.dtype).removeprefix("torch.") != name:
        raise ValueError(f"out must be of the kind and shape {tuple(x.shape)} of the input, and hold {dtype}")
    if not (out.is_contiguous() if is_torch_array(out) else out.flags.c_contiguous and out.flags.writeable):
        raise ValueError("out must be contiguous and writeable")


def _rounded(xp: Any, x: Array, scale: Array, zero_point: Array, rule: Rule) -> Array:
    if rule == "onnx":
        return xp.round(x / scale) + zero_point
    if rule == "torchao":
        return xp.round(x * (1 / scale)) + zero_point
    return xp.round(x / scale + zero_point)


def _into(out: Array | None, result: Array) -> Array:
    if out is None:
        return result
    out[...] = result
    return out


def _working(x: Array) -> Array:
    """`x` in the precision the arithmetic is done in: float64 stays, everything narrower becomes float32."""
    xp = array_namespace(x)
    if str(x.dtype).endswith("float64"):
        return x
    return (
        xp.astype(x, xp.float32, copy=False)
        if xp.__name__.endswith("torch")
        else np.asarray(x).astype(np.float32, copy=False)
    )


def _fused_for(x: Array, grid: Grid, qparams: QParams | None = None) -> Any:
    """The compiled kernels, if `x` is large enough and lies in memory as they want it; else None."""
    if math.prod(x.shape) < _FUSED_FROM:
        return None
    from qtools import _fused

    return _fused if _fused.takes(x, grid.block_size, qparams) else None


def _split(xp: Any, x: Array, axis: int, count: int, size: int) -> Array:
    """Axis `axis` as (count, size); a short last block is filled up with its own last value."""
    missing = count * size - x.shape[axis]
    if missing:
        last = xp.take(x, xp.asarray([x.shape[axis] - 1] * missing), axis=axis)
        x = xp.concat([x, last], axis=axis)
    return xp.reshape(x, (*x.shape[:axis], count, size, *x.shape[axis + 1 :]))


def _spread(qparams: QParams, shape: tuple[int, ...], xp: Any, like: Array) -> tuple[Array, Array]:
    """Scale and zero point so that they broadcast against a tensor of `shape`, of the kind of `like`."""
    scale, zero_point = (_to_kind(part, like) for part in (qparams.scale, qparams.zero_point))
    blocks = blocks_of(shape, qparams.grid.block_size)
    if tuple(scale.shape) != tuple(count for count, _ in blocks):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} does not fit a tensor of shape {shape} "
            f"in blocks {qparams.grid.block_size}"
        )
    for axis, (_, size) in enumerate(blocks):
        if 1 < size < shape[axis]:
            index = xp.arange(shape[axis]) // size
            scale, zero_point = xp.take(scale, index, axis=axis), xp.take(zero_point, index, axis=axis)
    return scale, zero_point


def _to_kind(part: Array, like: Array) -> Array:
    if not is_torch_array(like):
        return np.asarray(part)
    import torch

    return torch.as_tensor(part, device=like.device)


def _operands(x: Array, qparams: QParams) -> tuple[Array, Array, Array]:
    xp = array_namespace(x)
    x = _working(x)
    scale, zero_point = _spread(qparams, tuple(x.shape), xp, x)
    narrowed = xp.astype(scale, x.dtype)
    if scale.dtype != x.dtype and not bool(xp.all(xp.isfinite(narrowed) & (narrowed > 0))):
        raise ValueError(
            f"a scale of {scale.dtype} is out of the range of {x.dtype}, in which {x.dtype} data are divided"
        )
    return x, narrowed, xp.astype(zero_point, x.dtype)


def _floor_scale(xp: Any, scale: Array, eps: float | None) -> Array:
    if eps is not None:
        return xp.clip(scale, eps, None)
    smallest = xp.full_like(scale, float(xp.finfo(scale.dtype).smallest_normal))
    return xp.where(scale == 0, xp.ones_like(scale), xp.maximum(scale, smallest))
