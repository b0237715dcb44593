"""How the recipes here write what they measured: beside its place and renamed, with the computer and the day."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qtools._files import replace_json


def record(path: str | Path, values: Mapping[str, float], about: str = "", **more: Any) -> None:
    """Write values, and what else belongs to them, where the chapters look for them."""
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores" + (f"; {about}" if about else "")
    numbers = {key: float(value) for key, value in values.items()}
    replace_json(Path(path), {"values": numbers, "cpu": cpu, "date": datetime.date.today().isoformat(), **more})


def means(hits: Mapping[str, list[np.ndarray]]) -> dict[str, float]:
    """Percent of hits by name, over all sets together."""
    return {f"{name}_mean": 100 * float(np.concatenate(sets).mean()) for name, sets in hits.items()}


def ahead(hits: Mapping[str, list[np.ndarray]], other: str, suffix: str) -> dict[str, float]:
    """How many points each name is ahead of `other` on the same lines, and half the 95 % interval of that."""
    found, base = {}, np.concatenate(hits[other]).astype(float)
    for name, sets in hits.items():
        points = 100 * (np.concatenate(sets) - base)
        found[f"{name}_{suffix}"] = points.mean()
        found[f"{name}_{suffix}_95"] = 1.96 * points.std() / np.sqrt(len(points))
    return found
