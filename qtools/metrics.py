"""Error measures, one definition each; NumPy and torch arrays alike, summed in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace

Array = Any


def mse(x: Array, y: Array) -> float:
    """Mean squared error, in the square of the tensor's unit.

    Examples
    --------
    >>> mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    2.0
    """
    return float(_mean(_difference(x, y) ** 2))


def rmse(x: Array, y: Array) -> float:
    """Root of the mean squared error, in the tensor's unit."""
    return math.sqrt(mse(x, y))


def mae(x: Array, y: Array) -> float:
    """Mean absolute error, in the tensor's unit."""
    return float(_mean(abs(_difference(x, y))))


def max_error(x: Array, y: Array) -> float:
    """Largest absolute error, in the tensor's unit."""
    return float(array_namespace(x).max(abs(_difference(x, y))))


def sqnr_db(x: Array, y: Array) -> float:
    """Signal-to-quantization-noise ratio of `y` against the reference `x`, in decibels.

    ``10 * log10(sum(x**2) / sum((x - y)**2))``: infinite when `y` equals `x`, minus infinite when the
    signal is zero and the noise is not.

    Examples
    --------
    >>> sqnr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    20.0
    """
    noise = _mean(_difference(x, y) ** 2)
    signal = _mean(_double(x) ** 2)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal != 0 else -math.inf


def _double(x: Array) -> Array:
    xp = array_namespace(x)
    return x.astype(np.float64) if isinstance(x, np.ndarray) else xp.astype(x, xp.float64)


def _mean(x: Array) -> float:
    return float(array_namespace(x).mean(x))


def _difference(x: Array, y: Array) -> Array:
    if tuple(x.shape) != tuple(y.shape):
        raise ValueError(f"cannot compare shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if math.prod(x.shape) == 0:
        raise ValueError("cannot measure the error of an empty tensor")
    return _double(x) - _double(y)
