"""Compiled kernels that read float16, bfloat16 and float32 weights as they lie in a file, and write packed codes.

Bit for bit they do what `qtools.affine` does in float32.  Ranges are taken on the integer image of the floats, as in
`qtools._fused`; a half becomes a float by shifting its bits into place, which multiplying by 2**112 makes exact.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import register_jitable

from qtools.llm._shards import FLOATS

_jit = numba.njit(nogil=True, cache=True)


def ranges(weights: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value (rows, blocks), in float32, of every `width` neighbours in a row.

    Where there is a NaN among them, one of the two is.  `weights` are of a type in `_shards.FLOATS`, (rows, columns).
    """
    narrow = weights.dtype.itemsize == 2
    image, sign = (np.int16, 0x7FFF) if narrow else (np.int32, 0x7FFFFFFF)
    keys = (_ranges_16 if narrow else _ranges_32)(weights.view(image), width)
    return tuple((k ^ (k >> 8 * k.itemsize - 1 & image(sign))).view(weights.dtype).astype(np.float32) for k in keys)


def codes(
    weights: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, width: int, qmin: int, qmax: int
) -> np.ndarray:
    """Codes of weights without NaN, as bytes (rows, columns), negative ones in two's complement.

    Parameters
    ----------
    weights : ndarray of a type in `_shards.FLOATS`, shape (rows, columns)
    scale, zero_point : ndarray of shape (rows, blocks)
        One for every `width` neighbours in a row.
    """
    out = np.empty(weights.shape, np.uint8)
    image = weights.view(np.uint16 if weights.dtype.itemsize == 2 else np.uint32)
    limits = np.float32(qmin), np.float32(qmax)
    _CODES[weights.dtype](image, scale.astype(np.float32), zero_point.astype(np.float32), width, *limits, out)
    return out


def pack(values: np.ndarray) -> np.ndarray:
    """`affine.pack_int4` of uint8 codes in one pass; what is above the lower four bits is cut off."""
    flat = np.ascontiguousarray(values).ravel()
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    out = np.empty(flat.size // 2, np.uint8)
    _pack(flat.view("<u2"), out)
    return out


@_jit
def _pack(pairs, out):
    for j in range(out.size):
        pair = pairs[j]
        out[j] = np.uint8((pair & np.uint16(0x0F)) | np.uint16((pair >> np.uint16(4)) & np.uint16(0xF0)))


def _make_ranges(kind: Any, shift: int, mask: int) -> Any:
    shift, mask, lowest = kind(shift), kind(mask), kind(-mask - 1)

    @_jit
    def rows(bits, width):
        low = np.empty((bits.shape[0], -(-bits.shape[1] // width)), bits.dtype)
        high = np.empty_like(low)
        for r in range(low.shape[0]):
            for k in range(low.shape[1]):
                part = bits[r, k * width : (k + 1) * width]
                least, most = mask, lowest
                for j in range(part.size):
                    value = part[j]
                    key = kind(value ^ ((value >> shift) & mask))
                    least, most = min(least, key), max(most, key)
                low[r, k], high[r, k] = least, most
        return low, high

    return rows


def _make_codes(value: Any) -> Any:
    @_jit
    def rows(bits, scale, zero_point, width, low, high, out):
        for r in range(scale.shape[0]):
            for k in range(scale.shape[1]):
                source, target = bits[r, k * width : (k + 1) * width], out[r, k * width : (k + 1) * width]
                s, z = scale[r, k], zero_point[r, k]
                for j in range(source.size):
                    code = min(max(np.rint(value(source[j]) / s) + z, low), high)
                    target[j] = np.uint8(np.int32(code))

    return rows


@register_jitable
def _half(bits):
    number, sign = np.uint32(bits & np.uint16(0x7FFF)), np.uint32(bits & np.uint16(0x8000))
    return np.uint32(number << np.uint32(13) | sign << np.uint32(16)).view(np.float32) * np.float32(2.0**112)


@register_jitable
def _brain(bits):
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@register_jitable
def _single(bits):
    return np.uint32(bits).view(np.float32)


_ranges_16, _ranges_32 = _make_ranges(np.int16, 15, 0x7FFF), _make_ranges(np.int32, 31, 0x7FFFFFFF)
_CODES = {FLOATS["F16"]: _make_codes(_half), FLOATS["BF16"]: _make_codes(_brain), FLOATS["F32"]: _make_codes(_single)}
