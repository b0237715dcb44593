"""Encodings: the JSON files that AIMET writes and Qualcomm's converters read.

=======  ===========================  ==========================  ========  ================
version  a tensor is                  real number                 floats    blocks, LPBQ
=======  ===========================  ==========================  ========  ================
0.6.1    a list of one per channel    ``(q + offset) * scale``    yes       no
1.0.0    an entry with flat lists     ``(q + offset) * scale``    yes       flat lists
2.0.0    an entry that names its axis ``(q - zero) * scale``      left out  nested lists
2.1.0    as 2.0.0                     as 2.0.0                    left out  LPBQ as a product
=======  ===========================  ==========================  ========  ================

In the first two q is unsigned even where the tensor is signed, so a signed tensor's offset is lower by 2**(bits - 1).
AIMET's two packages mean different things by "symmetric": aimet-torch that the grid is, aimet-onnx that the codes are
signed; the latter writes its offsets as floats, by which a reader can tell.  `Encoding` holds one tensor in the
convention of `qtools.affine`, whatever the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from array_api_compat import is_torch_array

from qtools._files import replace_file
from qtools.affine import LPBQ, Grid, QParams, qparams_from_range

Flavour = Literal["aimet-torch", "aimet-onnx"]
Kind = Literal["activation", "param"]
VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
_NAMING_AXES = VERSIONS[2:]
_SECTIONS: dict[str, Kind] = {"activation_encodings": "activation", "param_encodings": "param"}
_MOST_BYTES = 512 << 20
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Encoding:
    """How one tensor is stored: as a float, or as codes on a grid, ``real = (code - zero_point) * scale``.

    Parameters
    ----------
    bits : int
        2 to 32 (32 is for biases); 16 or 32 for a float.
    signed, symmetric : bool
        As in `Grid`; a symmetric grid of unsigned codes may also have its zero point at 0 (no negative data).
    scale : ndarray of float64, optional
        Shape () per tensor, (channels,) per channel, (channels, blocks) per block, and (channels * blocks,) for blocks
        out of a 1.0.0 file, which does not say how many channels there are.  None: a float.
    zero_point : ndarray of int64, shape of `scale`, optional
        By default the middle of the grid.
    axis, block_axis : int, optional
        Of the channels and of the blocks, where known.
    block_size : int, optional
    block_scale, channel_scale : ndarrays of shape (channels, blocks) and (channels,), optional
        The integers and floats of LPBQ; `scale` becomes their product.
    scale_bits : int
        An integer of LPBQ is 1 to 2**scale_bits.

    Raises
    ------
    ValueError
        If the parts do not make an encoding.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    axis: int | None = None
    block_axis: int | None = None
    block_size: int | None = None
    block_scale: np.ndarray | None = None
    channel_scale: np.ndarray | None = None
    scale_bits: int = 4

    def __post_init__(self) -> None:
        scale, zero_point = self.scale, self.zero_point
        if self.block_scale is not None:
            integers, channel = np.asarray(self.block_scale, np.int64), np.asarray(self.channel_scale, np.float64)
            fits = integers.ndim == 2 and channel.shape == integers.shape[:1] and 1 <= self.scale_bits <= 7
            if not (fits and self.signed and self.symmetric and self.block_size):
                raise ValueError("LPBQ needs signed symmetric codes, blocks, and integers of 1 to 7 bits for each")
            _set(self, block_scale=integers, channel_scale=channel)
            scale = integers * channel[:, None]
            if not np.all((integers >= 1) & (integers <= 1 << self.scale_bits)):
                raise ValueError(f"the integers of LPBQ must be 1 to {1 << self.scale_bits}")
        if scale is None:
            if self.bits not in (16, 32):
                raise ValueError(f"a float has 16 or 32 bits, got {self.bits}")
            return
        if not 2 <= self.bits <= 32:
            raise ValueError(f"bits must be 2 to 32, got {self.bits}")
        scale = np.asarray(scale, np.float64)
        zero_point = np.asarray(np.full(scale.shape, self._middle) if zero_point is None else zero_point, np.int64)
        _set(self, scale=scale, zero_point=zero_point)
        if zero_point.shape != scale.shape or scale.ndim > (2 if self.block_size else 1):
            raise ValueError(f"scale of shape {scale.shape} and zero point of {zero_point.shape} fit no granularity")
        if not np.all((scale > 0) & (scale <= _LARGEST)):
            raise ValueError("every scale must be positive, and finite in float32")
        if not np.all((self.offset > -(1 << self.bits)) & (self.offset <= 0)):
            raise ValueError(f"every zero point must be a code of {self.dtype}")
        if self.symmetric and not any(np.all(zero_point == z) for z in {0, self._middle}):
            raise ValueError(f"a symmetric {self.dtype} grid has its zero point at {self._middle}")

    @property
    def _middle(self) -> int:
        return 0 if self.signed else 1 << self.bits - 1

    @property
    def offset(self) -> np.ndarray:
        """The zero point of unsigned codes, negated: what 0.6.1 and 1.0.0 store."""
        return -self.zero_point - ((1 << self.bits - 1) if self.signed else 0)

    @property
    def dtype(self) -> str:
        """'int8', 'uint16', 'float16' and so on."""
        return f"{'float' if self.scale is None else 'int' if self.signed else 'uint'}{self.bits}"

    @property
    def granularity(self) -> Literal["float", "tensor", "channel", "block", "LPBQ"]:
        """Who shares a scale."""
        if self.scale is None:
            return "float"
        if self.block_size:
            return "block" if self.block_scale is None else "LPBQ"
        return "channel" if self.scale.ndim else "tensor"

    @classmethod
    def from_qparams(cls, qparams: QParams | LPBQ) -> Encoding:
        """The encoding of a tensor quantized by `qtools.affine`.

        No file knows a narrow range: `qparams` has to be told again.

        Raises
        ------
        ValueError
            If the scales are neither one for all, nor one per channel, nor in blocks along one other axis.
        """
        lpbq, qparams = (qparams, qparams.qparams) if isinstance(qparams, LPBQ) else (None, qparams)
        grid, counts = qparams.grid, tuple(qparams.scale.shape)

        def axes(wanted: Any) -> list[int]:
            fitting = [axis for axis, size in enumerate(grid.block_size) if wanted(size)]
            return [axis for axis in fitting if counts[axis] > 1] or fitting[:1]

        single, blocked = axes(lambda size: size == 1), axes(lambda size: size > 1)
        if len(single) > 1 or len(blocked) > len(single):
            raise ValueError(f"no encodings file holds scales of shape {counts} for blocks of {grid.block_size}")
        order = single + blocked

        def rows(part: Any, axes: Sequence[int] = order) -> np.ndarray:
            part = np.asarray(part.detach().cpu() if is_torch_array(part) else part)
            rest = [axis for axis in range(part.ndim) if axis not in order]
            return part.transpose(*order, *rest).reshape([part.shape[axis] for axis in axes])

        parts = dict(axis=single[0] if single else None, zero_point=rows(qparams.zero_point))
        if blocked:
            parts |= dict(block_axis=blocked[0], block_size=grid.block_size[blocked[0]])
        if lpbq is None:
            return cls(grid.bits, grid.signed, grid.symmetric, rows(qparams.scale), **parts)
        integers = rows(lpbq.block_scale)
        parts |= dict(block_scale=integers, channel_scale=rows(lpbq.channel_scale, single))
        return cls(grid.bits, grid.signed, grid.symmetric, scale_bits=_scale_bits(integers), **parts)

    def placed(self, shape: Sequence[int], channel_axis: int | None = None) -> Encoding:
        """The same with its axes known, on a tensor of `shape`.

        Blocks lie along the input channels: axis 1 if the channels are axis 0, else the axis before them.

        Parameters
        ----------
        shape : sequence of int
        channel_axis : int, optional
            Needed where the file does not say, and more than one axis has as many entries as there are scales.

        Raises
        ------
        ValueError
            If the scales do not fit the shape, or fit it in more than one way.
        """
        if self.granularity in ("float", "tensor"):
            return self
        shape, rank, fitting = tuple(shape), len(shape), {}
        named = {axis + rank if axis < 0 else axis for axis in (self.axis, channel_axis) if axis is not None}
        for axis in (named or range(rank)) if len(named) < 2 else ():
            along = self.block_axis if self.block_axis is not None else 1 if axis == 0 else axis - 1
            if not (0 <= axis < rank and (not self.block_size or axis != along < rank)):
                continue
            counts = (shape[axis], *([-(-shape[along] // self.block_size)] if self.block_size else []))
            if math.prod(counts) == self.scale.size and self.scale.shape in (counts, (self.scale.size,)):
                fitting[axis] = counts, along
        if len(fitting) != 1:
            said = f"scales of shape {self.scale.shape} {'' if fitting else 'do not '}fit a tensor of shape {shape}"
            raise ValueError(said + (" in more than one way: name the channel axis" if fitting else ""))
        axis, (counts, along) = fitting.popitem()
        parts = dict(zero_point=self.zero_point.reshape(counts), block_axis=along if self.block_size else None)
        return replace(self, axis=axis, scale=self.scale.reshape(counts), **parts)

    def qparams(
        self, shape: Sequence[int] = (), channel_axis: int | None = None, *, narrow_range: bool = False
    ) -> QParams | LPBQ:
        """What `qtools.affine` quantizes a tensor of `shape` with; float32 scales where these are exact, else float64.

        Raises
        ------
        ValueError
            If it is a float, or has more than 16 bits, or as `placed`.
        """
        if self.scale is None:
            raise ValueError(f"a tensor in {self.dtype} is not quantized")
        here, rank = self.placed(shape, channel_axis), len(shape)
        sizes = [-1] * (rank if self.scale.ndim else 0)
        for axis, size in ((here.axis, 1), (here.block_axis, here.block_size)):
            if self.scale.ndim and axis is not None:
                sizes[axis] = size
        symmetric = bool(self.symmetric and np.all(self.zero_point == self._middle))
        grid = Grid(self.bits, self.signed, symmetric, narrow_range, tuple(sizes))
        exact = self.scale if self.channel_scale is None else self.channel_scale
        kind = np.float32 if np.array_equal(exact.astype(np.float32), exact) else np.float64
        zero_point = here._spread(here.zero_point, rank).astype(np.int32)
        qparams = QParams(grid, here._spread(here.scale, rank).astype(kind), zero_point)
        if self.channel_scale is None:
            return qparams
        integers, channel = (here._spread(part, rank) for part in (here.block_scale, here.channel_scale))
        return LPBQ(qparams, integers.astype(np.uint8), channel.astype(kind))

    def _spread(self, part: np.ndarray, rank: int) -> np.ndarray:
        """Rows of channels and blocks, put on their axes of a tensor of that rank."""
        counts = [1] * rank
        for axis, count in zip((self.axis, self.block_axis), part.shape):
            counts[axis] = count
        turned = part.ndim == 2 and self.block_axis < self.axis
        return (part.T if turned else part).reshape(counts if part.ndim else ())

    def retyped(self, bits: int, symmetric: bool | None = None) -> Encoding:
        """Another grid over the same range: signed if symmetric, else unsigned.

        Raises
        ------
        ValueError
            If there is no range to keep: a float, or LPBQ, or more than 16 bits.
        """
        symmetric = self.symmetric if symmetric is None else symmetric
        if self.granularity in ("float", "LPBQ"):
            raise ValueError(f"a {self.granularity} encoding has no range to put another grid on")
        if (bits, symmetric) == (self.bits, self.symmetric):
            return self
        low, high = self.scale * self.offset, self.scale * (self.offset + (1 << self.bits) - 1)
        grid = Grid(bits, signed=symmetric, symmetric=symmetric)
        chosen = qparams_from_range(low, high, grid, symmetric_scale="no_clipping")
        parts = dict(scale=chosen.scale, zero_point=chosen.zero_point)
        return replace(self, bits=bits, signed=symmetric, symmetric=symmetric, **parts)


@dataclass
class Encodings:
    """The encodings of a network, by tensor.

    Parameters
    ----------
    activations, params : dict of str to Encoding
    version : str, optional
        Of the file they come from; None if it had none.
    meta : dict
        What else the file says: producer, quantizer_args, excluded_layers.
    order : tuple of str
        All names as they stand in a 2.x file, where activations and parameters are one list.
    notes : list of str
        What is odd about the file, though it can be read.
    """

    activations: dict[str, Encoding] = field(default_factory=dict)
    params: dict[str, Encoding] = field(default_factory=dict)
    version: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> dict[str, Encoding]:
        """The activations or the params."""
        return self.activations if kind == "activation" else self.params

    def placed(self, places: Mapping[str, tuple[Sequence[int], int | None]]) -> Encodings:
        """The same with all axes known of the tensors in `places`: name to shape and channel axis.

        Raises
        ------
        ValueError
            As `Encoding.placed`, with the name before it.
        """
        moved = replace(self, activations=dict(self.activations), params=dict(self.params))
        for side in (moved.activations, moved.params):
            for name in side.keys() & places.keys():
                try:
                    side[name] = side[name].placed(*places[name])
                except ValueError as error:
                    raise ValueError(f"{_step(name)}: {error}") from None
        return moved


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path | str, *, params: Collection[str] | None = None, recompute: bool = False) -> Encodings:
    """Read an encodings file of any version.

    Parameters
    ----------
    path : path
    params : collection of str, optional
        Names of the constants, which 2.x does not tell from activations; by default what is signed or has an axis.
    recompute : bool
        Take scale and offset of 0.6.1 from min and max even where they are given, as the legacy converter does.

    Raises
    ------
    ValueError
        In one line, with the place, for whatever is wrong with the file.
    OSError
        If it cannot be opened.
    """
    return loads(_bytes(path), params=params, recompute=recompute)


def loads(text: str | bytes, *, params: Collection[str] | None = None, recompute: bool = False) -> Encodings:
    """Encodings from the text of a file; see `read`."""
    root = _parse(text)
    found = Encodings(version=_version(root))
    if found.version in _NAMING_AXES:
        every = {name: _read_2(node) for name, node in root["encodings"].named()}
        for name, encoding in every.items():
            constant = encoding.signed or encoding.axis is not None if params is None else name in params
            found.of("param" if constant else "activation")[name] = encoding
        found.order = tuple(every)
    else:
        for key, kind in _SECTIONS.items():
            if found.version == "1.0.0":
                found.of(kind).update((name, _read_1(node)) for name, node in root[key].named())
            else:
                pairs = root[key].items(dict)
                found.of(kind).update((name, _read_0(node, recompute, found.notes)) for name, node in pairs)
    known = {*_SECTIONS, "encodings", "version"}
    found.meta = {key: value for key, value in root.value.items() if key not in known}
    return found


class _Range(NamedTuple):
    """The numbers a field may hold."""

    text: str
    low: float
    high: float
    whole: bool = False

    def holds(self, value: Any) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high and (not self.whole or value % 1 == 0)


_SCALE = _Range("a positive finite number", 5e-324, _LARGEST)
_FACTOR = _SCALE._replace(high=_LARGEST / 128)  # of LPBQ: finite still when multiplied by any integer
_REAL = _Range("a finite number", -_LARGEST, _LARGEST)


def _whole(low: int, high: int) -> _Range:
    return _Range(f"a whole number from {low} to {high}", low, high, True)


_BITS, _COUNT, _AXIS = _whole(2, 32), _whole(1, 1 << 31), _whole(-8, 7)


class _Node:
    """A value in a file, with the path that leads to it."""

    def __init__(self, value: Any, path: str = "") -> None:
        self.value, self.path = value, path

    def wrong(self, expected: str) -> ValueError:
        shown = {dict: "an object", list: "a list"}.get(type(self.value)) or repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ValueError(f"{self.path or 'the file'}: expected {expected}, got {shown}")

    def child(self, step: Any, value: Any) -> _Node:
        return _Node(value, f"{self.path}/{_step(str(step))}".removeprefix("/"))

    def items(self, kind: type) -> Iterator[tuple[Any, _Node]]:
        if type(self.value) is not kind:
            raise self.wrong("an object" if kind is dict else "a list")
        pairs = self.value.items() if kind is dict else enumerate(self.value)
        return ((key, self.child(key, value)) for key, value in pairs)

    def named(self) -> Iterator[tuple[str, _Node]]:
        """The entries of a list by their names, each once."""
        seen = set()
        for _, entry in self.items(list):
            name = entry["name"].word()
            if name in seen:
                raise ValueError(f"{entry.path}/name: {_step(name)!r} stands there twice")
            seen.add(name)
            yield name, self.child(name, entry.value)

    def __contains__(self, key: str) -> bool:
        return type(self.value) is dict and key in self.value

    def __getitem__(self, key: str) -> _Node:
        self.items(dict)
        if key not in self.value:
            raise ValueError(f"{self.child(key, None).path}: is missing")
        return self.child(key, self.value[key])

    def word(self, *allowed: str) -> str:
        """A string; if some are allowed, one of them, upper or lower case."""
        if type(self.value) is not str:
            raise self.wrong("a string")
        if allowed and self.value.upper() not in allowed:
            raise self.wrong(f"one of {', '.join(allowed)}")
        return self.value.upper() if allowed else self.value

    def flag(self) -> bool:
        return self.value if type(self.value) is bool else self.word("TRUE", "FALSE") == "TRUE"

    def number(self, allowed: _Range) -> Any:
        if not allowed.holds(self.value):
            raise self.wrong(allowed.text)
        return int(self.value) if allowed.whole else float(self.value)

    def array(self, allowed: _Range, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A number or lists of numbers, in the shape asked for if there is one."""
        level, found = [self.value], ()
        while all(type(part) is list for part in level):
            lengths = {len(part) for part in level}
            if len(lengths) > 1 or 0 in lengths or len(found) == 8:
                raise self.wrong("numbers in lists of one length")
            found += (*lengths,)
            level = [value for part in level for value in part]
        for i, value in enumerate(level):
            if not allowed.holds(value):
                steps = "".join(f"/{step}" for step in np.unravel_index(i, found))
                raise _Node(value, self.path + steps).wrong(allowed.text)
        if shape is not None and found != shape:
            raise ValueError(f"{self.path}: expected numbers in the shape {shape}, got {found}")
        return np.array(level, np.int64 if allowed.whole else np.float64).reshape(found)


def _step(name: str) -> str:
    """A name as a step of a path: on one line, and not long."""
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 120 else f"{name[:117]}..."


def _set(frozen: Encoding, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def _scale_bits(integers: np.ndarray) -> int:
    return max(4, int(integers.max() - 1).bit_length())


def _bytes(path: Path | str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MOST_BYTES + 1)


def _parse(text: str | bytes) -> _Node:
    """JSON with an object outside, no key twice in any, and nothing that could not be written again."""
    twice: list[tuple[Any, str]] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice.append((content, Counter(key for key, _ in pairs).most_common(1)[0][0]))
        return content

    if len(text) > _MOST_BYTES:
        raise ValueError("the file is over 512 MB")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        root = _Node(json.loads(text, object_pairs_hook=unique))
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is not UTF-8 from byte {error.start} on") from None
    except RecursionError:
        raise ValueError("the file is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the file is {f'not JSON: {error}' if text.strip() else 'empty'}") from None
    if twice:
        raise ValueError(f"{_find(root, twice[0][0]).child(twice[0][1], None).path}: stands there twice")
    for key, node in root.items(dict):
        try:
            if not key.endswith("encodings"):  # those are looked at number by number
                json.dumps(node.value, allow_nan=False)
        except (ValueError, RecursionError):
            raise ValueError(f"{node.path}: holds a number that is not finite, or is nested too deeply") from None
    return root


def _find(root: _Node, target: Any) -> _Node:
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if node.value is target:
            return node
        if type(node.value) in (dict, list):
            nodes += (child for _, child in node.items(type(node.value)))
    return _Node(target)  # it was within what a later twin replaced


def _version(root: _Node) -> str | None:
    if "version" in root and root.value["version"] not in VERSIONS:
        raise root["version"].wrong(f"one of {', '.join(VERSIONS)}")
    return root.value.get("version")


def _type(entry: _Node, key: str, default: str | None = None) -> tuple[bool, int]:
    """Whether an entry of 0.6.1 or 1.0.0 is a float, and its bits."""
    is_int = default if "dtype" not in entry and default else entry["dtype"].word("INT", "FLOAT", "FP") == "INT"
    bits = entry[key].number(_BITS)
    if not is_int and bits not in (16, 32):
        raise entry[key].wrong("16 or 32 for a float")
    return not is_int, bits


def _unshifted(bits: int, flag: bool, offset: np.ndarray, floats: bool) -> dict[str, Any]:
    """Signedness, symmetry and zero point behind an offset and the flag beside it.

    The flag means signed if the offsets are floats (aimet-onnx), else symmetric; a symmetric tensor is signed, unless
    its offset is 0.
    """
    signed = flag and (floats or bool(np.any(offset)))
    zero_point = -offset - ((1 << bits - 1) if signed else 0)
    symmetric = flag and not (signed and np.any(zero_point))
    return dict(signed=signed, symmetric=symmetric, zero_point=zero_point)


def _read_0(node: _Node, recompute: bool, notes: list[str]) -> Encoding:
    kinds, scales, offsets, floats = set(), [], [], True
    for _, entry in node.items(list):
        entry.items(dict)
        is_float, bits = _type(entry, "bitwidth", "INT")
        kinds.add((is_float, bits, not is_float and "is_symmetric" in entry and entry["is_symmetric"].flag()))
        if is_float:
            continue
        steps, given = (1 << bits) - 1, not recompute and "scale" in entry and "offset" in entry
        ranged = not given or "min" in entry or "max" in entry
        low, high = (entry[key].number(_REAL) if ranged else 0.0 for key in ("min", "max"))
        if low > high:
            raise entry["max"].wrong(f"at least {low}, the min")
        if given:
            scale, offset = entry["scale"].number(_SCALE), entry["offset"].number(_whole(-steps, 0))
            floats &= type(entry.value["offset"]) is float
            if ranged and max(abs(low - scale * offset), abs(high - scale * (offset + steps))) > 0.01 * scale:
                notes.append(f"{entry.path}: scale and offset are not those of min and max, which converters go by")
        else:
            # As the converter has it: zero within the range, the range at least 1e-4 wide, and zero on the grid.
            low, high, floats = min(low, 0.0), max(high, 0.0, min(low, 0.0) + 1e-4), False
            scale = (high - low) / steps
            offset = max(-steps, round(low / scale))
        scales.append(scale)
        offsets.append(offset)
    if len(kinds) != 1:
        raise ValueError(f"{node.path}: expected one entry or more, all alike in bits, dtype and is_symmetric")
    is_float, bits, flag = kinds.pop()
    if is_float:
        return Encoding(bits)
    shape = (len(scales),) if len(scales) > 1 else ()
    offset = np.array(offsets, np.int64).reshape(shape)
    return Encoding(bits, scale=np.reshape(scales, shape), **_unshifted(bits, flag, offset, floats))


def _read_1(entry: _Node) -> Encoding:
    is_float, bits = _type(entry, "bw")
    if is_float:
        return Encoding(bits)
    kind = entry["enc_type"].word("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ")
    if "zero_point_shift" in entry:
        entry["zero_point_shift"].number(_whole(0, 0))  # a grid shifted by half a step has no code for zero
    scale = entry["scale"].array(_FACTOR if kind == "LPBQ" else _SCALE)
    if scale.ndim != 1 or (kind == "PER_TENSOR" and scale.size > 1):
        raise entry["scale"].wrong("a list of one number" if kind == "PER_TENSOR" else "a flat list")
    offset = entry["offset"].array(_whole(1 - (1 << bits), 0), scale.shape)
    flag, floats = entry["is_sym"].flag(), all(type(number) is float for number in entry.value["offset"])
    shape, block_size = (() if kind == "PER_TENSOR" else scale.shape), None
    if kind in ("PER_BLOCK", "LPBQ"):
        block_size = entry["block_size"].number(_COUNT)
    if kind != "LPBQ":
        parts = _unshifted(bits, flag, offset.reshape(shape), floats)
        return Encoding(bits, scale=scale.reshape(shape), block_size=block_size, **parts)
    stored = entry["compressed_bw"].number(_whole(max(2, bits - 7), bits - 1))
    integers = entry["per_block_int_scale"].array(_whole(1, 1 << bits - stored)).ravel()
    if not flag or np.any(offset != -(1 << bits - 1)):
        raise entry["offset"].wrong(f"{-(1 << bits - 1)} and is_sym, as LPBQ is symmetric")
    if integers.size % scale.size:
        raise ValueError(f"{entry.path}: expected blocks alike for all {scale.size} channels, got {integers.size}")
    parts = dict(block_scale=integers.reshape(scale.size, -1), channel_scale=scale)
    return Encoding(stored, block_size=block_size, scale_bits=bits - stored, **parts)


def _read_2(entry: _Node) -> Encoding:
    found = re.fullmatch(r"(u?)int([1-9]\d?)|float(16|32)", entry["output_dtype"].word())
    if not found or not (found[3] or _BITS.holds(int(found[2]))):
        raise entry["output_dtype"].wrong("a type like int8, uint16 or float16")
    if found[3]:
        return Encoding(int(found[3]))
    bits, signed = int(found[2]), not found[1]
    lowest = -(1 << bits - 1) if signed else 0
    allowed = _whole(lowest, lowest + (1 << bits) - 1)
    if "per_block_int_scale" in entry or "x" in entry["y_scale"]:
        at, keys = entry, ("per_block_int_scale", "per_channel_float_scale")
        if keys[0] not in entry:
            at, keys = entry["y_scale"], ("x", "x_scale")
        if not signed or ("y_zero_point" in entry and np.any(entry["y_zero_point"].array(allowed))):
            raise entry["output_dtype"].wrong("a signed type without zero points, as LPBQ is symmetric")
        parts, integers = _rows(entry, at[keys[0]].array(_whole(1, 128)))
        channel = at[keys[1]].array(_FACTOR).ravel()
        if channel.size != len(integers):
            raise at[keys[1]].wrong(f"a number for each of {len(integers)} channels")
        return Encoding(bits, block_scale=integers, channel_scale=channel, scale_bits=_scale_bits(integers), **parts)
    scale, parts = entry["y_scale"].array(_SCALE), {}
    zero_point = np.zeros(scale.shape, np.int64)
    if "y_zero_point" in entry:
        zero_point = entry["y_zero_point"].array(allowed, scale.shape)
    if scale.ndim > 1:
        (parts, scale), (_, zero_point) = _rows(entry, scale), _rows(entry, zero_point)
    elif "block_size" in entry:
        raise entry["y_scale"].wrong("lists in a list, as there are blocks")
    elif scale.ndim:
        parts = {"axis": entry["axis"].number(_AXIS)}
    # Unsigned codes with the zero point in the middle may be symmetric or not: it is the same arithmetic.
    return Encoding(bits, signed, signed and not np.any(zero_point), scale, zero_point, **parts)


def _rows(entry: _Node, part: np.ndarray) -> tuple[dict[str, int], np.ndarray]:
    """Axes and block size of an entry of 2.x, whose axis is that of the blocks; its scales as (channels, blocks)."""
    if part.ndim < 2:
        raise ValueError(f"{entry.path}: expected lists in a list, as there are blocks")
    along = entry["axis"].number(_whole(-part.ndim, part.ndim - 1)) % part.ndim
    others = [axis for axis in range(part.ndim) if axis != along]
    others = [axis for axis in others if part.shape[axis] > 1] or others[:1]
    if len(others) > 1:
        raise ValueError(f"{entry.path}: expected one axis of channels and one of blocks, got scales of {part.shape}")
    rows = np.moveaxis(part, along, -1).reshape(-1, part.shape[along])
    return {"axis": others[0], "block_axis": along, "block_size": entry["block_size"].number(_COUNT)}, rows


# -- writing ---------------------------------------------------------------------------------------------------------


def dumps(encodings: Encodings, version: str = "1.0.0", flavour: Flavour = "aimet-torch") -> str:
    """The text of an encodings file.

    Parameters
    ----------
    encodings : Encodings
    version : {'1.0.0', '0.6.1', '2.0.0', '2.1.0'}
        A file of 2.x makes the converter use its newer quantizer, which falls back to floats more readily.
    flavour : {'aimet-torch', 'aimet-onnx'}
        What "symmetric" means and how offsets look (see above), the order of keys, and whether min and max are products
        in float32 or in float64.

    Raises
    ------
    ValueError
        If the version cannot hold an encoding; what it merely leaves out, `losses` tells.
    """
    if version not in VERSIONS or flavour not in get_args(Flavour):
        known = f"{', '.join(VERSIONS)} and {', '.join(get_args(Flavour))}"
        raise ValueError(f"version and flavour must be of {known}, got {version!r} and {flavour!r}")
    head, rest = {}, dict(encodings.meta)
    if "producer" in rest:
        head["producer"] = rest.pop("producer")
    head["version"] = version
    sides = {key: encodings.of(kind).items() for key, kind in _SECTIONS.items()}
    if version == "0.6.1":
        content = {key: {name: _write_0(name, e, flavour) for name, e in side} for key, side in sides.items()}
    elif version == "1.0.0":
        content = {key: [_write_1(name, e, flavour) for name, e in side] for key, side in sides.items()}
    else:
        if twice := encodings.activations.keys() & encodings.params.keys():
            raise ValueError(f"{_step(min(twice))}: is an activation and a parameter, which {version} cannot hold")
        both, rest = encodings.activations | encodings.params, {}
        names = dict.fromkeys([*filter(both.__contains__, encodings.order), *both])
        content = {"encodings": [_write_2(name, both[name], version) for name in names if both[name].scale is not None]}
    onnx = flavour == "aimet-onnx"
    try:
        return json.dumps(head | content | rest, indent=4 if onnx else 2, sort_keys=onnx, allow_nan=False)
    except (RecursionError, TypeError) as error:
        raise ValueError(f"the meta of the encodings cannot be written: {error}") from None


def losses(encodings: Encodings, version: str = "1.0.0", flavour: Flavour = "aimet-torch") -> list[str]:
    """What a file of that version and flavour leaves out or says differently, one line each."""
    both, signs, found = encodings.activations | encodings.params, ("unsigned", "signed"), []
    if version in _NAMING_AXES:
        found = [
            f"{name}: left out, as {version} has no entry for a {e.dtype}"
            for name, e in both.items()
            if e.scale is None
        ]
        return found + [
            f"{key}: left out, as {version} has no place for it" for key in encodings.meta if key != "producer"
        ]
    for name, e in both.items() if flavour == "aimet-torch" else ():
        if e.scale is not None and (back := _unshifted(e.bits, e.symmetric, e.offset, False)["signed"]) != e.signed:
            found.append(f"{name}: the {signs[e.signed]} codes are read back as {signs[back]} ones of the same values")
    return found


def write(
    encodings: Encodings, path: Path | str, version: str = "1.0.0", flavour: Flavour = "aimet-torch"
) -> list[str]:
    """Write an encodings file, whole or not at all.

    Returns
    -------
    list of str
        The `losses`.

    Raises
    ------
    ValueError
        As `dumps`; nothing is written then.
    """
    text = dumps(encodings, version, flavour)
    replace_file(Path(path), text.encode())
    return losses(encodings, version, flavour)


def _write_0(name: str, e: Encoding, flavour: Flavour) -> list[dict[str, Any]]:
    if e.scale is None:
        return [{"bitwidth": e.bits, "dtype": "float"}]
    if e.block_size:
        raise ValueError(f"{_step(name)}: 0.6.1 has no entry for blocks; write 1.0.0 or 2.0.0")
    onnx = flavour == "aimet-onnx"
    scale, offset = e.scale.ravel(), e.offset.ravel()
    # aimet-torch multiplies in float32; converters go by min and max, so only where the scale is a float32 itself.
    narrow = not onnx and np.array_equal(scale.astype(np.float32), scale) and e.bits <= 16
    kind = np.float32 if narrow else np.float64
    low, high = (scale.astype(kind) * ends.astype(kind) for ends in (offset, offset + (1 << e.bits) - 1))
    flag = str(bool(e.signed if onnx else e.symmetric))
    same = {"bitwidth": e.bits, "dtype": "int", "is_symmetric": flag}
    columns = zip(low.tolist(), high.tolist(), scale.tolist(), _offsets(offset, flavour))
    return [dict(zip(("min", "max", "scale", "offset"), column)) | same for column in columns]


def _write_1(name: str, e: Encoding, flavour: Flavour) -> dict[str, Any]:
    if e.scale is None:
        return {"name": name, "dtype": "FLOAT", "bw": e.bits, "enc_type": "PER_TENSOR"}
    kind = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "block": "PER_BLOCK", "LPBQ": "LPBQ"}[e.granularity]
    bits, scale, offset = e.bits, e.scale.ravel(), e.offset.ravel()
    if kind == "LPBQ":
        bits += e.scale_bits
        scale, offset = e.channel_scale, np.full(e.channel_scale.shape, -(1 << bits - 1))
    entry = {"name": name, "dtype": "INT", "bw": bits}
    entry |= {"is_sym": bool(e.signed if flavour == "aimet-onnx" else e.symmetric)}
    entry |= {"scale": scale.tolist(), "offset": _offsets(offset, flavour), "enc_type": kind}
    if e.block_size:
        entry["block_size"] = e.block_size
    if kind == "LPBQ":
        entry |= {"compressed_bw": e.bits, "per_block_int_scale": e.block_scale.ravel().tolist()}
    return entry


def _write_2(name: str, e: Encoding, version: str) -> dict[str, Any]:
    blocked = e.block_size is not None
    if e.scale.ndim and (e.axis is None or (blocked and (e.scale.ndim < 2 or e.block_axis is None or e.axis < 0))):
        raise ValueError(f"{_step(name)}: {version} names the channel axis, which is unknown; see Encodings.placed")
    rank = 1 + max(e.axis or 0, e.block_axis or 0)
    entry: dict[str, Any] = {"name": name, "output_dtype": e.dtype}
    if e.granularity == "LPBQ" and version == "2.1.0":
        integers = e._spread(e.block_scale, rank).tolist()
        entry["y_scale"] = {"x": integers, "x_scale": e.channel_scale.tolist(), "axis": e.axis}
    elif e.granularity == "LPBQ":
        entry["per_channel_float_scale"] = e._spread(e.channel_scale[:, None], rank).tolist()
        entry["per_block_int_scale"] = e._spread(e.block_scale, rank).tolist()
    else:
        scale, zero_point = (e._spread(part, rank) if blocked else part for part in (e.scale, e.zero_point))
        entry["y_scale"] = scale.tolist()
        if np.any(zero_point):
            entry["y_zero_point"] = zero_point.tolist()
    if e.scale.ndim:
        entry["axis"] = e.block_axis if blocked else e.axis
    return entry | ({"block_size": e.block_size} if blocked else {})


def _offsets(offset: np.ndarray, flavour: Flavour) -> list[float]:
    return offset.astype(float if flavour == "aimet-onnx" else int).tolist()


# -- overrides -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """What an override wants of the tensors that its pattern names.

    Parameters
    ----------
    pattern : str
        A name, or one with ``*`` for any run of characters.  ``.*`` is such a run too, as in a regular expression,
        unless it is a part between two dots: in ``layers.*.weight`` the dots are dots.
    bits : int
    symmetric : bool or None
        None: as it was.
    kind : {'activation', 'param'}
    block_size : int, optional
    encoding : Encoding, optional
        Where the override comes with a scale, or is a float.
    """

    pattern: str
    bits: int
    symmetric: bool | None
    kind: Kind
    block_size: int | None = None
    encoding: Encoding | None = None

    def matches(self, name: str) -> bool:
        """Whether the pattern names this tensor."""
        first, *others = re.split(r"(?<![\w\]])\.\*|\.\*(?!\.)|\*", self.pattern)
        if not others:
            return name == first
        *middle, last = others
        at, end = len(first), len(name) - len(last)
        if not name.startswith(first) or not name.endswith(last) or at > end:
            return False
        for piece in middle:
            if (at := name.find(piece, at, end)) < 0:
                return False
            at += len(piece)
        return True


@dataclass(frozen=True)
class Overrides:
    """What a file of overrides holds: rules, and groups of operators to be fused (kept as they are)."""

    rules: tuple[Rule, ...]
    supergroups: tuple[dict[str, Any], ...] = ()


@dataclass
class Report:
    """What became of the rules.

    Parameters
    ----------
    matched : list of (Rule, list of str)
        The tensors that each rule decided.
    unmatched : list of Rule
        Those whose pattern names no tensor.
    pending : dict of str to Rule
        Tensors whose wanted type has no scale yet: they have to be calibrated.
    """

    matched: list[tuple[Rule, list[str]]] = field(default_factory=list)
    unmatched: list[Rule] = field(default_factory=list)
    pending: dict[str, Rule] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{rule.pattern}: {', '.join(names) or 'overruled everywhere'}" for rule, names in self.matched]
        lines += [f"{rule.pattern}: matches no {rule.kind}" for rule in self.unmatched]
        return "\n".join(lines + [f"{name}: to be calibrated" for name in self.pending])


def read_overrides(path: Path | str) -> Overrides:
    """Read overrides: any encodings file, or one whose entries hold no more than a type (``{"dtype": "int4"}``).

    Raises
    ------
    ValueError, OSError
        As `read`.
    """
    text = _bytes(path)
    root = _parse(text)
    if _version(root) in (None, "0.6.1"):
        rules = [_rule(name, kind, node) for key, kind in _SECTIONS.items() for name, node in root[key].items(dict)]
    else:
        rules = rules_of(loads(text))
    groups = [group for _, group in root["supergroups"].items(list)] if "supergroups" in root else []
    for group in groups:
        group["fuse"].flag()
        for _, operator in group["op_list"].items(list):
            operator.word()
    return Overrides(tuple(rules), tuple(group.value for group in groups))


def _rule(name: str, kind: Kind, node: _Node) -> Rule:
    """Of an entry of 0.6.1, or of one that is a type only: ``{"dtype": "int4", "is_symmetric": true}``."""
    if type(node.value) is not dict:
        e = _read_0(node, False, [])
        return Rule(name, e.bits, e.symmetric, kind, None, e)
    found = re.fullmatch(r"int([1-9]\d?)|(?:float|fp)(16|32)", node["dtype"].word().lower())
    if not found or not (found[2] or _BITS.holds(int(found[1]))):
        raise node["dtype"].wrong("a type like int4 or float16")
    symmetric = node["is_symmetric"].flag() if "is_symmetric" in node else None
    group = node["group_size"].number(_COUNT) if "group_size" in node else None
    bits = int(found[1] or found[2])
    return Rule(name, bits, symmetric, kind, group, Encoding(bits) if found[2] else None)


def rules_of(encodings: Encodings) -> list[Rule]:
    """One rule for each tensor of an encodings file: that it be stored just so."""
    every = ((kind, name, e) for kind in _SECTIONS.values() for name, e in encodings.of(kind).items())
    return [Rule(name, e.bits, e.symmetric, kind, e.block_size, e) for kind, name, e in every]


def apply_rules(
    rules: Iterable[Rule], activations: Collection[str] = (), params: Collection[str] = ()
) -> tuple[dict[Kind, dict[str, Rule]], Report]:
    """Which rule each tensor of a network goes by: one with its very name, else the last whose pattern matches.

    Returns
    -------
    dict
        For 'activation' and 'param', names to rules.
    Report
    """
    chosen: dict[Kind, dict[str, Rule]] = {"activation": {}, "param": {}}
    report, rules = Report(), list(rules)
    for kind, names in (("activation", set(activations)), ("param", set(params))):
        fits = []
        for rule in (rule for rule in rules if rule.kind == kind):
            wild = "*" in rule.pattern and rule.pattern not in names
            fits.append((rule, sorted(filter(rule.matches, names)) if wild else sorted({rule.pattern} & names)))
        for rule, fitting in sorted(fits, key=lambda fit: fit[0].pattern in names):
            chosen[kind].update(dict.fromkeys(fitting, rule))
        report.matched += [(rule, [n for n in fitting if chosen[kind][n] is rule]) for rule, fitting in fits if fitting]
        report.unmatched += [rule for rule, fitting in fits if not fitting]
    return chosen, report


def merge(
    base: Encodings, overrides: Encodings | Overrides | Iterable[Rule], names: Collection[str] | None = None
) -> tuple[Encodings, Report]:
    """Encodings with overrides put over them: an override's own encoding, or the type it wants over the base's range.

    A tensor that has no range for what is wanted (a float, LPBQ, other blocks) is left out, and reported as pending.

    Parameters
    ----------
    base : Encodings
    overrides : Encodings, Overrides or Rules
    names : collection of str, optional
        All tensors of the network: an encoding for any other is unmatched.  By default such an encoding is added.
    """
    rules = rules_of(overrides) if isinstance(overrides, Encodings) else [*getattr(overrides, "rules", overrides)]
    known: dict[Kind, set[str]] = {kind: set(base.of(kind)) for kind in _SECTIONS.values()}
    for rule in rules:
        if rule.encoding and "*" not in rule.pattern and (names is None or rule.pattern in names):
            known[rule.kind].add(rule.pattern)
    chosen, report = apply_rules(rules, known["activation"], known["param"])
    merged = replace(base, activations=dict(base.activations), params=dict(base.params))
    for kind, other in (("activation", "param"), ("param", "activation")):
        for name, rule in chosen[kind].items():
            old = merged.of(kind).get(name)
            if rule.encoding:
                merged.of(kind)[name] = rule.encoding
                if old is None:  # the override knows better what kind of tensor it is
                    merged.of(other).pop(name, None)
            elif (
                old.granularity in ("float", "LPBQ") or rule.bits > 16 or rule.block_size not in (None, old.block_size)
            ):
                report.pending[name] = rule
                del merged.of(kind)[name]
            else:
                merged.of(kind)[name] = old.retyped(rule.bits, rule.symmetric)
    return merged, report


# -- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """In what two files differ about one tensor.

    Parameters
    ----------
    name, what : str
    first, second : str
        What each file says.
    size : float
        Infinite for another granularity or a tensor that one lacks; doublings for bits and scale; for the zero point,
        the part of the grid that lies between the two.  0 where the real values are the same.
    """

    name: str
    what: str
    first: str
    second: str
    size: float

    def __str__(self) -> str:
        return f"{self.name}: {self.what} {self.first} against {self.second}"


def compare(a: Encodings, b: Encodings) -> list[Difference]:
    """Every difference between two files, the largest first."""
    found, (ours, theirs) = [], (e.activations | e.params for e in (a, b))
    for name in dict.fromkeys([*ours, *theirs]):
        pair = ours.get(name), theirs.get(name)
        if None in pair:
            found.append(Difference(name, "encoding", *("none" if e is None else e.dtype for e in pair), math.inf))
        else:
            found += [Difference(name, what, str(x), str(y), size) for what, x, y, size in _differences(*pair)]
    return sorted(found, key=lambda difference: -difference.size)


def _differences(a: Encoding, b: Encoding) -> Iterator[tuple[str, Any, Any, float]]:
    floats = a.scale is None, b.scale is None
    if a.dtype != b.dtype:
        yield "type", a.dtype, b.dtype, math.inf if floats[0] != floats[1] else float(abs(a.bits - b.bits))
    if any(floats):
        return
    if a.symmetric != b.symmetric:
        yield "symmetric", a.symmetric, b.symmetric, 0.0
    if a.scale.size != b.scale.size:
        yield "granularity", f"{a.granularity} ({a.scale.size})", f"{b.granularity} ({b.scale.size})", math.inf
        return
    (one, two), (here, there) = (e.scale.ravel() for e in (a, b)), (-e.offset.ravel() for e in (a, b))
    doublings, apart = np.abs(np.log2(one) - np.log2(two)), np.abs(here - there) / 2**a.bits
    if np.any(one != two):
        worst = doublings.argmax()
        yield "scale", f"{one[worst]:.6g}", f"{two[worst]:.6g}", float(doublings[worst])
    if a.bits == b.bits and apart.any():
        worst = apart.argmax()
        yield "zero point", here[worst], there[worst], float(apart[worst])


def suspicious(encodings: Encodings) -> list[str]:
    """What a file may hold, but hardly was meant: dead channels, scales that float32 rounds to nothing; a line each."""
    found = list(encodings.notes)
    for name, e in (encodings.activations | encodings.params).items():
        scale = np.empty(0) if e.scale is None else e.scale
        for bad, why in (
            (np.isclose(scale, 2.0**-23, rtol=1e-6, atol=0), "is the smallest that AIMET writes: no data were seen"),
            (scale < np.finfo(np.float32).smallest_normal, "is zero or subnormal in float32"),
        ):
            if bad.any():
                found.append(f"{_step(name)}: the scale of {int(bad.sum())} of {bad.size} {why}")
    return found
