"""A key-value cache whose numbers are really stored in 16, 8, 4 or 2 bits.

`KVCache` keeps packed bytes; `taps`, the fake quantizers, send keys and values through the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qtools.affine import Grid, QParams, choose_qparams, dequantize, quantize
from qtools.llm.llama import Taps

if TYPE_CHECKING:
    from torch import Tensor

Grain = Literal["tensor", "token", "channel"]

_FINEST = 2.0**-14  # the smallest step: the smallest normal number of the half precision that steps are stored in
# What shares a step among (batch, heads, groups, tokens of a group, head_dim).
_BLOCKS = {"tensor": (-1,) * 5, "token": (1, 1, 1, 1, -1), "channel": (1, 1, 1, -1, 1)}


@dataclass(frozen=True)
class Scheme:
    """How a cache stores its numbers; anything that is not listed is a `ValueError`.

    Parameters
    ----------
    bits : {16, 8, 4, 2}
        16 is half precision, and none of what follows matters.
    keys, values : {'token', 'channel', 'tensor'}
        What shares a step: the head_dim numbers of a token and head; `group` tokens of a channel of a head, which wait
        in half precision until they are complete; or the whole tensor of a layer, with the range of the first tokens
        that come (the prompt), to which later ones are clipped.
    symmetric : bool
        The range is as wide below zero as above, and no zero point is stored.
    group : int
        Tokens that share a step per channel.

    References
    ----------
    Z. Liu et al., KIVI, ICML 2024, section 3: keys per channel, in groups with a residual, and values per token.
    """

    bits: int
    keys: Grain = "token"
    values: Grain = "token"
    symmetric: bool = False
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4, 2) or not {self.keys, self.values} <= set(_BLOCKS) or self.group < 1:
            raise ValueError(f"a cache stores 16, 8, 4 or 2 bits per {', '.join(_BLOCKS)}, groups of 1 or more: {self}")


class Store:
    """The keys, or the values, of one layer."""

    def __init__(self, scheme: Scheme, grain: Grain) -> None:
        self._bits, self._grain, self._group = scheme.bits, grain, scheme.group if grain == "channel" else 1
        self._grid = Grid(min(scheme.bits, 8), symmetric=scheme.symmetric, block_size=_BLOCKS[grain])
        self._kept: dict[str, Tensor] = {}  # codes, steps, zero points, and numbers that wait
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, all that it keeps together."""
        return sum(part.numel() * part.element_size() for part in self._kept.values())

    def append(self, x: Tensor) -> Tensor:
        """Add numbers (batch, heads, tokens, head_dim); returns all that it holds, as float32.

        Raises
        ------
        ValueError
            If `x` holds NaN or what half precision does not, or head_dim codes do not fill whole bytes.
        """
        if x.shape[-1] * self._bits % 8 or not bool(x.half().isfinite().all()):
            raise ValueError(f"a cache takes numbers up to 65504 in rows of whole bytes, got shape {tuple(x.shape)}")
        self.length += x.shape[2]
        if self._bits == 16 or self._grain == "channel":
            x = self._keep("waiting", x.half())
            ready = 0 if self._bits == 16 else x.shape[2] // self._group * self._group
            x, self._kept["waiting"] = x[:, :, :ready].float(), x[:, :, ready:].clone()
        if x.shape[2]:
            qparams = self._choose(x := x.unflatten(2, (-1, self._group)))
            self._keep("codes", pack(quantize(x, qparams), self._bits))
        waiting = self._kept.get("waiting")
        return _joined(self._unpacked(), waiting if waiting is None else waiting.float())

    def _choose(self, x: Tensor) -> QParams:
        if self._grain == "tensor" and "scale" in self._kept:
            return self._qparams()
        chosen = choose_qparams(x, self._grid)
        scale = chosen.scale.clamp_min(_FINEST).half()
        self._keep("scale", scale)
        if not self._grid.symmetric:
            self._keep("zero", chosen.zero_point.byte())
        return QParams(self._grid, scale.float(), chosen.zero_point)

    def _unpacked(self) -> Tensor | None:
        codes = self._kept.get("codes")
        return codes if codes is None else dequantize(unpack(codes, self._bits), self._qparams()).flatten(2, 3)

    def _qparams(self) -> QParams:
        scale, zero = self._kept["scale"].float(), self._kept.get("zero")
        return QParams(self._grid, scale, (scale * 0 + self._grid.midpoint if zero is None else zero).int())

    def _keep(self, name: str, new: Tensor) -> Tensor:
        self._kept[name] = _joined(self._kept.get(name), new)
        return self._kept[name]


class KVCache:
    """Keys and values of so many layers, for `Llama`."""

    def __init__(self, layers: int, scheme: Scheme) -> None:
        self._layers = [(Store(scheme, scheme.keys), Store(scheme, scheme.values)) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""
        return self._layers[-1][1].length

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, steps and zero points included."""
        return sum(store.nbytes for pair in self._layers for store in pair)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (batch, heads, tokens, head_dim) of a layer; returns those of all tokens, as stored."""
        return tuple(store.append(x) for store, x in zip(self._layers[layer], (keys, values)))


def taps(keys: Scheme | None, values: Scheme | None) -> Taps:
    """Fake quantizers of keys, of values, or of both: what a cache that gets all tokens at once makes of them."""
    return Taps(
        keys=keys and (lambda layer, x: Store(keys, keys.keys).append(x)),
        values=values and (lambda layer, x: Store(values, values.values).append(x)),
    )


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8, 4 or 2 bits (..., n) in bytes (..., n * bits / 8), the first code in the lowest bits."""
    parts = codes.byte().unflatten(-1, (-1, 8 // bits))
    return sum(parts[..., i] << bits * i for i in range(8 // bits))


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes of `pack`."""
    import torch

    return torch.stack([packed >> i & (1 << bits) - 1 for i in range(0, 8, bits)], -1).flatten(-2)


def _joined(*parts: Tensor | None) -> Tensor:
    import torch

    return torch.cat([part for part in parts if part is not None], 2)
