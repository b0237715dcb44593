"""How the tensors of a checkpoint are stored once they are quantized: formats, and patterns that give them to names."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qtools.affine import Grid
from qtools.llm._shards import FLOATS, Stored

Method = Literal["nearest", "clip", "gptq", "descent"]
KEEP = "keep"
_HEAD = {"*embed_tokens.weight": "int8 channel", "*lm_head.weight": "int8 channel"}
SCHEMES: dict[str, dict[str, str]] = {
    "w4": {"*_proj.weight": "int4 g128", **_HEAD},
    "w8": {"*_proj.weight": "int8 channel", **_HEAD},
    "article": {"*_proj.weight": "int8 channel", "*.self_attn.*_proj.weight": "int4 g128", **_HEAD},
}
"""Patterns and formats for networks whose tensors are named as those of Llama."""

_TYPES = {"int4": (4, True), "uint4": (4, False), "int8": (8, True), "uint8": (8, False)}
SCALES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""Types of scales, and their names in safetensors."""


@dataclass(frozen=True)
class Format:
    """How a weight matrix is stored.

    Parameters
    ----------
    bits : {4, 8}
    symmetric : bool
        Signed codes around 0, else unsigned ones with a zero point.
    group : int
        How many neighbours in a row share a scale; -1 for a row, 0 for all of the tensor.
    lpbq : bool
        Scales that are integers of 4 bits times one float per row; see `affine.choose_lpbq`.
    scale : {'float16', 'bfloat16', 'float32'}
        How scales are stored; codes are chosen for the scale as it is stored.
    method : {'nearest', 'clip', 'gptq', 'descent'}
        Round to nearest; or choose the scale of each group by what it does to the outputs, and then round to nearest
        (AWQ's clipping), or with `rounding.GPTQ`, or with `rounding.Descent`.  All but the first need moments.

    Raises
    ------
    ValueError
        If these do not go together.
    """

    bits: int = 4
    symmetric: bool = True
    group: int = 128
    lpbq: bool = False
    scale: str = "float16"
    method: Method = "nearest"

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or self.group < -1 or self.group == 1 or self.scale not in SCALES:
            raise ValueError(f"a format has 4 or 8 bits, groups of 2 or more and scales of {'|'.join(SCALES)}: {self}")
        if self.method not in get_args(Method) or (self.lpbq and not (self.symmetric and self.group > 0)):
            raise ValueError(f"LPBQ is signed and in groups, and a method is one of {'|'.join(get_args(Method))}")

    @classmethod
    def parse(cls, text: str) -> Format:
        """A format from words: a type (int4, uint4, int8, uint8), then at will ``g128``, ``channel`` (as if none) or
        ``tensor``, ``lpbq``, the type of scales (by default float16 for groups, else float32), and the method.

        Examples
        --------
        >>> Format.parse("uint4 g32 gptq")
        Format(bits=4, symmetric=False, group=32, lpbq=False, scale='float16', method='gptq')
        """
        known: dict[str, tuple[str, Any]] = {"channel": ("group", -1), "tensor": ("group", 0), "lpbq": ("lpbq", True)}
        known |= {word: ("scale", word) for word in SCALES} | {word: ("method", word) for word in get_args(Method)}
        kind, *words = text.split() or [""]
        numbers = {word: ("group", int(word[1:])) for word in words if re.fullmatch(r"g[1-9]\d{0,8}", word)}
        pairs = [(known | numbers).get(word) for word in words]
        if kind not in _TYPES or None in pairs or len(dict(pairs)) < len(pairs):
            raise ValueError(f"{text!r} is no format such as 'int4 g128', 'uint4 g32 gptq' or 'int8 channel float32'")
        found = {"group": -1} | dict(pairs)
        small = found["group"] > 0 and "lpbq" not in found
        return cls(*_TYPES[kind], **{"scale": "float16" if small else "float32"} | found)

    def __str__(self) -> str:
        kind = next(name for name, parts in _TYPES.items() if parts == (self.bits, self.symmetric))
        group = {0: "tensor", -1: "channel"}.get(self.group, f"g{self.group}")
        return " ".join([kind, group, *["lpbq"] * self.lpbq, self.scale, self.method])

    @property
    def grid(self) -> Grid:
        """The grid of a matrix in this format."""
        blocks = {0: (-1, -1), -1: (1, -1)}.get(self.group, (1, self.group))
        return Grid(self.bits, signed=self.symmetric, symmetric=self.symmetric, block_size=blocks)

    def parts(self, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type (as safetensors names it) and shape of what a matrix is stored as."""
        blocks = (rows if self.group else 1, -(-columns // self.group) if self.group > 0 else 1)

        def packed(kind: str, *shape: int) -> tuple[str, tuple[int, ...]]:
            return ("U8", ((math.prod(shape) + 1) // 2,)) if self.bits == 4 else (kind, shape)

        found = {"codes": packed("I8" if self.symmetric else "U8", rows, columns)}
        found["scale"] = SCALES[self.scale], (rows, 1) if self.lpbq else blocks
        small = ["block_scale"] * self.lpbq + ["zero_point"] * (not self.symmetric)
        return found | {name: packed("U8", *blocks) for name in small}


def assign(scheme: Mapping[str, str], tensors: Mapping[str, Stored]) -> dict[str, Format]:
    """Formats of the tensors that a scheme quantizes; see `weights.quantize`.

    Raises
    ------
    ValueError
        If a name without ``*`` is that of no tensor, a format is none, or a tensor does not fit its format.
    """
    found: dict[str, Format | None] = {}
    forms = {pattern: None if text == KEEP else Format.parse(text) for pattern, text in scheme.items()}
    for pattern in sorted(forms, key=lambda pattern: "*" not in pattern):  # a name beats all patterns
        names = fnmatch.filter(tensors, re.sub(r"[\[?]", r"[\g<0>]", pattern))
        if not names and "*" not in pattern:
            raise ValueError(f"the scheme names {pattern!r}, and the checkpoint has no such tensor")
        found |= dict.fromkeys(names, forms[pattern])
    for name, form in found.items():
        _, kind, shape, *_ = tensors[name]
        if form and (kind not in FLOATS or len(shape) != 2 or not math.prod(shape)):
            raise ValueError(f"{name} is {kind} of shape {shape}, and only a matrix of floats can become {form}")
        if form and form.lpbq and shape[1] <= form.group:
            raise ValueError(f"{name} has shape {shape}, and LPBQ needs rows of at least two blocks")
    if not any(found.values()):
        raise ValueError("the scheme quantizes no tensor of this checkpoint")
    return {name: form for name, form in found.items() if form}
