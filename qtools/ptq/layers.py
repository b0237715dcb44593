"""A pass over the layers of a network: what each sees and is to give, and what of the pass is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qtools.affine import blocks_of
from qtools.ptq.fuse import View, names_inside
from qtools.ptq.graph import Weight, attribute, weights
from qtools.ptq.stages import Stages, State

if TYPE_CHECKING:
    import onnx

_NOISE = 1e-10  # of a mean square: a variance that is less may be a rounding error
# Gemm computes more than a product of matrices unless these are as they are by default.
_PLAIN = {"Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0}}


class Moments:
    """Sums over data of what a least-squares problem is made of, in whatever pieces the data come."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: list[np.ndarray] = []

    def add(self, inputs: np.ndarray, outputs: np.ndarray) -> None:
        """Count in inputs (G, N, K) and the outputs (G, N, C) that are wanted for them."""
        x, y = inputs.astype(np.float64), outputs.astype(np.float64)
        sums = [x.sum(1), y.sum(1), x.mT @ x, y.mT @ x, (y * y).sum(1)]
        self._sums = [old + new for old, new in zip(self._sums, sums)] if self.count else sums
        self.count += x.shape[1]

    def means(self) -> list[np.ndarray]:
        """Of inputs (G, K) and outputs (G, C), their products (G, K, K) and (G, C, K), squares of outputs (G, C).

        Raises
        ------
        ValueError
            If there are no data, or some were NaN or infinite.
        """
        if not self.count or not all(np.isfinite(total).all() for total in self._sums):
            raise ValueError("it sees or gives NaN or infinity" if self.count else "there are no data")
        return [total / self.count for total in self._sums]

    def without_bias(self, bias: np.ndarray | None) -> list[np.ndarray]:
        """The last three means for outputs less a bias (G, C); by None less the one that is best for any weights."""
        x, y, gram, cross, power = self.means()
        if bias is None:
            spread = gram - _outer(x, x)
            variance, square = (np.diagonal(part, axis1=1, axis2=2) for part in (spread, gram))
            varies = (variance > _NOISE * square).astype(np.float64)
            return [spread * _outer(varies, varies), (cross - _outer(y, x)) * varies[:, None], power - y * y]
        return [gram, cross - _outer(bias, x), power - (2 * y - bias) * bias]


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, :, None] * b[:, None]


@dataclass(frozen=True, eq=False)
class Layer:
    """A node that multiplies windows of its inputs with a constant weight that is its alone.

    Parameters
    ----------
    node : NodeProto
    weight : Weight
    groups : int
        G, of C output channels each, which share K inputs.
    bias : ndarray (G, C)
    bias_name : str
        Of the initializer, if it is this node's alone and has a number for each channel; else empty.
    """

    node: onnx.NodeProto
    weight: Weight
    groups: int
    bias: np.ndarray
    bias_name: str

    def grouped(self, part: np.ndarray, block_size: tuple[int, ...] = ()) -> np.ndarray:
        """The weights, or what blocks of them have one of each, as float64 (G, C, K)."""
        shape = self.weight.values.shape
        for axis, (_, size) in enumerate(blocks_of(shape, block_size)):
            if part.shape[axis] > 1:
                part = np.repeat(part, size, axis).take(range(shape[axis]), axis)
        rows = replace(self.weight, values=np.broadcast_to(part, shape)).rows
        return rows.reshape(self.groups, -1, rows.shape[1]).astype(np.float64)

    def data(self, x: np.ndarray, y: np.ndarray, most: int, seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (G, N, K) and outputs (G, N, C) at no more than `most` positions of every sample.

        Parameters
        ----------
        x, y : ndarray
            What the node reads and gives.
        most : int
        seed : sequence of int
            Of the generator that draws positions where there are more.
        """
        convolution = self.weight.op == "Conv"
        sizes = y.shape[2:] if convolution else (int(np.prod(y.shape[1:-1])),)
        chosen = np.arange(count := int(np.prod(sizes)))
        if count > most:
            chosen = np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
        if not convolution:
            x, y = (part.reshape(-1, count, part.shape[-1])[:, chosen] for part in (x, y))
            return x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
        # Both as (samples, channels, positions, places in the kernel).
        x, y = self._windows(x, sizes, chosen), y.reshape(*y.shape[:2], count, 1)[:, :, chosen]
        x, y = (part.reshape(len(part), self.groups, -1, *part.shape[2:]).transpose(1, 0, 3, 2, 4) for part in (x, y))
        return tuple(part.reshape(self.groups, part.shape[1] * len(chosen), -1) for part in (x, y))

    def _windows(self, x: np.ndarray, sizes: Sequence[int], chosen: np.ndarray) -> np.ndarray:
        kernel = np.array(self.weight.values.shape[2:])
        ones, same = [1] * len(kernel), attribute(self.node, "auto_pad", b"")
        strides, dilations = (np.array(attribute(self.node, name, ones)) for name in ("strides", "dilations"))
        missing = np.maximum((np.array(sizes) - 1) * strides + (kernel - 1) * dilations + 1 - x.shape[2:], 0)
        begin = np.array(attribute(self.node, "pads", [0] * 2 * len(kernel)))[: len(kernel)]
        begin = {b"SAME_UPPER": missing // 2, b"SAME_LOWER": missing - missing // 2}.get(same, begin)
        x = np.pad(x, [(0, 0), (0, 0), *zip(begin, np.maximum(missing - begin, 0))])
        starts = np.array(np.unravel_index(chosen, sizes)) * strides[:, None]
        places = np.indices(kernel).reshape(len(kernel), -1) * dilations[:, None]
        starts, places = (np.ravel_multi_index(tuple(part), x.shape[2:]) for part in (starts, places))
        return x.reshape(*x.shape[:2], -1)[:, :, starts[:, None] + places]


def layers(model: onnx.ModelProto, wanted: Collection[str]) -> list[Layer]:
    """The layers whose weights are `wanted`, in order.

    There is none for the weight of a ConvTranspose, for one that several nodes read or that holds several matrices,
    for a Gemm with factors or transposed inputs, and where a bias is computed.
    """
    view, found, result = View(model), weights(model), []
    for node in view.nodes:
        weight, name = found.get(node.name), node.input[2] if len(node.input) > 2 else ""
        if weight is None or weight.name not in wanted or view.only_reader(weight.name) is None:
            continue
        bias, channels = view.value(name) if name else np.zeros(1), weight.values.shape[weight.channel_axis]
        linear = weight.op == "Conv" or (weight.op != "ConvTranspose" and weight.values.ndim == 2)
        linear &= all(attribute(node, key, value) == value for key, value in _PLAIN.get(weight.op, {}).items())
        if linear and bias is not None and bias.size in (1, channels):
            groups = attribute(node, "group", 1) if weight.op == "Conv" else 1
            own = bias.shape == (channels,) and view.is_float(name) and view.only_reader(name) is not None
            bias = np.broadcast_to(bias.ravel(), channels).reshape(groups, -1).astype(np.float64)
            result.append(Layer(node, weight, groups, bias, name if own else ""))
    return result


class Chain:
    """A network that all samples run through step by step.

    Parameters
    ----------
    model : ModelProto
    names : sequence of str
        The tensors to stop at, in the order of the network.
    feeds : list of dict
        As `feeds` gives them.
    fed : dict, optional
        Initializers to be taken from here; what it holds may change between the steps.
    """

    def __init__(
        self, model: onnx.ModelProto, names: Iterable[str], feeds: Iterable[State], fed: State | None = None
    ) -> None:
        view, made, cuts = View(model), set(), []
        for name in names:
            waiting = [name]
            cuts += [name] if name in view.makers and name not in made else []
            while waiting:
                maker = view.makers.get(waiting.pop())
                if maker is not None and not made.issuperset(maker.output):
                    made.update(maker.output)
                    waiting += [*maker.input, *names_inside(maker)]
        self._fed, self._states, self._done = {} if fed is None else fed, [dict(feed) for feed in feeds], 0
        # Pieces are small: on a busy machine threads that wait for each other would cost more than they save.
        self._stages = _Once(model, cuts, self._fed, threads=1)

    def reach(self, name: str) -> list[np.ndarray]:
        """One of the tensors, for every sample; they are to be reached in order.

        Raises
        ------
        ValueError
            If ONNX Runtime does not take a sample.
        """
        if name in self._stages.cuts[self._done :]:
            for number, state in enumerate(self._states):
                try:
                    self._states[number] = self._stages.run(self._done, {**state, **self._fed})
                except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
                    raise ValueError(f"sample {number} does not run: {str(error).strip().splitlines()[0]}") from None
            self._done += 1
        return [state[name] for state in self._states]


class _Once(Stages):
    """Stages that are passed once: only the latest session is kept, for each holds on to memory of its own."""

    def session(self, piece: int, to: int) -> tuple:
        self._sessions = {(piece, to): super().session(piece, to)}
        return self._sessions[piece, to]


def feeds(model: onnx.ModelProto, samples: Iterable[Mapping[str, np.ndarray] | np.ndarray]) -> list[State]:
    """Samples as `calibrate.calibrate` takes them, each as a mapping.

    Raises
    ------
    ValueError
        If there is none, if one lacks an input or is no array, or holds NaN or infinity.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    names = [entry.name for entry in model.graph.input if entry.name not in constants]
    found = [dict(sample if isinstance(sample, Mapping) else {names[0]: sample}) for sample in samples]
    for number, feed in enumerate(found):
        if set(feed) != set(names) or not all(isinstance(x, np.ndarray) for x in feed.values()):
            raise ValueError(f"sample {number}: expected an array for {', '.join(names)}")
        if not all(np.isfinite(x).all() for x in feed.values()):
            raise ValueError(f"sample {number} holds NaN or infinity")
    if not found:
        raise ValueError("there are no samples")
    return found


# -- what is finished ------------------------------------------------------------------------------------------------


class Progress:
    """Arrays that a pass has found so far, and a note on each layer; also in a file if there is a path.

    Parameters
    ----------
    path : path, optional
    made_of : str
        What the result depends on.

    Attributes
    ----------
    arrays : dict of str to ndarray
    notes : dict
        By layer; what JSON can hold.

    Raises
    ------
    ValueError
        If the file is damaged, or made of something else.
    """

    def __init__(self, path: Path | str | None, *made_of: str) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        self._path, self._made_of = path and Path(path), made_of
        self.arrays: State = {}
        self.notes: dict[str, Any] = {}
        if not path or not self._path.exists():
            return
        try:
            self.arrays = load(self._path.read_bytes())
            told = self.arrays.pop("qtools.notes").tobytes()
            fits = self.arrays.pop("qtools.sum").tobytes() == self._sum(told)
        except (SafetensorError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{path} is damaged or that of another call: delete it, or name another file")
        self.notes = json.loads(told)

    def add(self, layer: str, note: Any, arrays: State) -> None:
        """A layer is finished; the old file is there until the new one is."""
        from safetensors.numpy import save

        from qtools._files import replace_file

        self.notes[layer] = note
        self.arrays |= arrays
        if self._path:
            told = json.dumps(self.notes).encode()
            more = {
                "qtools.notes": np.frombuffer(told, np.uint8),
                "qtools.sum": np.frombuffer(self._sum(told), np.uint8),
            }
            replace_file(self._path, save({**self.arrays, **more}))

    def _sum(self, told: bytes) -> bytes:
        return hashlib.sha256("\n".join([digest(self.arrays), *self._made_of]).encode() + told).digest()


def digest(arrays: State) -> str:
    """SHA-256 of arrays and their names, in hexadecimal."""
    found = hashlib.sha256()
    for name, x in sorted(arrays.items()):
        found.update(f"{name} {x.dtype} {x.shape}".encode() + x.tobytes())
    return found.hexdigest()
