"""Qualcomm's chips as figures with sources (``data/soc.yaml``), and the rates that `qtools.npu.roofline` works with."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pydantic
import yaml

from qtools.npu import htp

TABLE = Path(__file__).resolve().parents[2] / "data/soc.yaml"
REFERENCE = "sm8650"
"""The chip whose networks were fitted; its rates are carried over to the others by ratios."""

_UNITS = {
    "ratio": 1, "exponent": 1, "MB": 2**20, "GB/s": 1e9, "TOPS": 1e12, "TMAC/s": 1e12, "GMAC/s": 1e9, "us": 1e-6,
}  # fmt: skip
Number = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
Words = Annotated[str, pydantic.StringConstraints(strip_whitespace=True, min_length=2)]


class Figure(pydantic.BaseModel, extra="forbid", frozen=True):
    """One number of one source; `si` is it in bytes, seconds, operations or multiply-accumulates a second."""

    value: Number
    unit: Words
    kind: Literal["published", "derived", "fitted"]
    source: Words

    @pydantic.field_validator("unit")
    @classmethod
    def _known(cls, unit: str) -> str:
        if unit not in _UNITS:
            raise ValueError(f"the unit is one of {', '.join(_UNITS)}, got {unit!r}")
        return unit

    @property
    def si(self) -> float:
        return self.value * _UNITS[self.unit]


class SoC(pydantic.BaseModel, extra="forbid", frozen=True):
    """A chip, or a named view of one (`of`): its figures by name, the first of each the one that is used."""

    name: Words
    of: str | None = None
    figures: dict[str, Annotated[list[Figure], pydantic.Field(min_length=1)]]

    def si(self, figure: str) -> float:
        """The figure that is used, in SI units; ValueError if no source gives one."""
        if figure not in self.figures:
            raise ValueError(f"no source gives the figure {figure!r} of {self.name}")
        return self.figures[figure][0].si


@dataclass(frozen=True)
class Rates:
    """What a computer can do in a second, and what it loses: all that the time model knows of it.

    Parameters
    ----------
    matrix, depthwise : float
        Multiply-accumulates a second; `depthwise` for activations of one byte, those of n bytes take n times as long.
    vector, bandwidth : float
        Bytes a second: of what all other operators read and write inside the chip, and of main memory.
    node, fixed : float
        Seconds for every operator, and for every run.
    overlap : float
        p in (work^p + memory^p)^(1/p): 1 one after the other, infinite entirely side by side.
    vtcm : float
        Bytes of activations that stay inside the chip.
    channels, tile : int
        Channels are rounded up to a multiple, and rows to what a tile of so many bytes holds of that many channels (0:
        not at all).  Hao et al., arXiv 2509.23324, section 3.1.2: 32 x 32 of fp16 in 2 KiB.
    """

    matrix: float
    depthwise: float
    vector: float
    bandwidth: float
    node: float
    fixed: float
    overlap: float
    vtcm: float
    channels: int = 32
    tile: int = 2048


def load(path: Path | str = TABLE) -> dict[str, SoC]:
    """The chips of a file by key; ValueError if a figure lacks its unit, kind or source, or a chip is unknown."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} must map chips to their figures")
    chips = {}
    for key, entry in content.items():
        try:
            chips[key] = SoC.model_validate(entry)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{path}: {'.'.join(map(str, (key, *first['loc'])))}: {first['msg']}") from None
        if (chips[key].of or key) not in htp.SOCS:
            raise ValueError(f"{path}: no such chip as {key}: there are {', '.join(htp.SOCS)}")
    return chips


@functools.cache
def table() -> dict[str, SoC]:
    """The chips of ``data/soc.yaml``, read once."""
    return load()


def chip(key: str) -> SoC:
    """A chip of the table, whatever the case of its key; ValueError if there is none."""
    if key.lower() not in table():
        raise ValueError(f"unknown SoC {key!r}: choose from {', '.join(table())}")
    return table()[key.lower()]


def identity(key: str) -> tuple[str, str]:
    """Hexagon architecture and SoC id of a chip or a view of one, such as ``("v75", "57")``."""
    return htp.SOCS[chip(key).of or key.lower()]


def rates(key: str, precision: str) -> Rates:
    """The fitted rates of the `REFERENCE` chip, carried to another by the ratios ``times_...`` of the table.

    The matrix unit scales as U-Net's throughput does, memory as the peak of the DRAM, everything else as the median
    latency of the same networks on both chips.

    Precisions are 'float' (fp16) and 'w8a8', 'w8a16', 'w4a8', 'w4a16': bits of weights and of activations.

    Raises
    ------
    ValueError
        If there is no such chip or precision, or the ratios are not known.
    """
    if precision not in ("float", "w8a8", "w8a16", "w4a8", "w4a16"):
        raise ValueError(f"no times were published for the precision {precision!r}: float, w8a8, w8a16, w4a8 or w4a16")
    this, base = chip(key), table()[REFERENCE]
    if "times_bandwidth" not in this.figures:
        able = ", ".join(name for name, other in table().items() if "times_bandwidth" in other.figures)
        raise ValueError(f"too little is published on {this.name} to predict times: choose from {able}")
    floating, bits = precision == "float", 8 if precision.endswith("a8") else 16
    unit, passes = ("fp16", 1) if floating else ("int8", bits / 8)  # 16-bit activations go through twice
    speed = this.si("times_float" if floating else f"times_w8a{bits}")
    return Rates(
        matrix=base.si(f"matrix_{unit}") * this.si(f"times_{unit}") / passes,
        depthwise=base.si("depthwise") * speed,
        vector=base.si("vector") * speed,
        bandwidth=base.si("bandwidth") * this.si("times_bandwidth"),
        node=base.si("node") / speed,
        fixed=base.si(f"fixed_{bits}") / speed,
        overlap=base.si("overlap"),
        vtcm=this.si("vtcm"),
    )
