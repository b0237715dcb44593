"""The automatic checks behind the exercises at the end of every chapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from qtools.affine import Grid, fake_quantize, qparams_from_range
from qtools.metrics import sqnr_db


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


_CHECKS: dict[str, tuple[Callable[..., bool | None], str]] = {
    "1.1": (_grid_of_a_range, "Does your grid hold zero exactly when the range is [1, 2]?"),
    "1.2": (_bits_for, "b bits make 2**b - 1 steps, and n steps give 20 log10(n) dB. Round up."),
    "1.3": (_better_than_min_max, "Try several limits below the largest value and keep the best."),
}
