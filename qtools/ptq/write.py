"""A float network and its encodings written as one ONNX file.

`write_qdq` writes integers: QuantizeLinear and DequantizeLinear nodes, as runtimes and the HTP backend read them.
`write_simulation` writes the same arithmetic in floats, as training frameworks simulate it: a second, independent way
to the same numbers.

Which tensors need an encoding is decided here too (`quantized_tensors`), for it is what the files' readers go by: ONNX
Runtime and the HTP backend take an operator as an integer one if all its floats come out of, and go into, such nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qtools.affine import LPBQ, QParams, block_ranges, dequantize, quantize
from qtools.ptq.fuse import View, claim, with_shapes
from qtools.ptq.graph import OPSET, attribute, channel_axis, copy_of, set_nodes
from qtools.qdq import onnx_type, weight_nodes

if TYPE_CHECKING:
    import onnx

Supergroup = tuple[str, ...]
SUPERGROUPS: tuple[Supergroup, ...] = tuple(
    (first, second)
    for first in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", "Sub")
    for second in ("Relu", "Clip")
)
"""Operators that run as one: what one of them hands to the next is never rounded.

Source: the op lists of AIMET 2.42's HTP configurations (v73 and newer), reduced to what ONNX writes as two nodes.
"""
# Operators that move numbers about and compute none: their output has the input's encoding.
_MOVES = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "MaxPool", "Gather", "Identity",
    "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
}  # fmt: skip
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# Operators whose float constants are settings, or state that 8 bits would ruin.
_FLOAT_CONSTANTS = {
    "Clip", "Resize", "Upsample", "Pad", "Dropout", "Range", "OneHot", "NonMaxSuppression", "RoiAlign",
    "BatchNormalization", "LSTM", "GRU", "RNN", "If", "Loop", "Scan",
}  # fmt: skip
_MOST = 2**30  # code of a bias: the other half of int32 is left to the products that are added to it
_EXACT = 2**23  # code of a bias that is as exact as a float32
_LEAST_SCALE = 2.0**-23


@dataclass(frozen=True)
class Tensors:
    """What of a network gets an encoding.

    Parameters
    ----------
    activations : dict
        Name of every computed float tensor to the tensor whose encoding it takes: itself, or, behind a Reshape and the
        like, the one that was moved.
    weights : dict
        Name of every weight to its channel axis.
    biases : dict
        Name of every bias to the (activation, weight) whose scales multiply to its own; of a bias that several nodes
        share, those of the first.
    constants : list of str
        Other constants that operators compute with.
    """

    activations: dict[str, str]
    weights: dict[str, int]
    biases: dict[str, tuple[str, str]]
    constants: list[str]


def quantized_tensors(model: onnx.ModelProto, supergroups: Sequence[Supergroup] = SUPERGROUPS) -> Tensors:
    """Decide which tensors of a prepared network are to have an encoding: those of float32.

    Raises
    ------
    ValueError
        If the network is quantized already.
    """
    view, floats = View(model), _floats(model)
    inner = _inner(view, supergroups)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in view.nodes):
        raise ValueError("the network is quantized already: it has QuantizeLinear or DequantizeLinear nodes")
    names = [entry.name for entry in model.graph.input if entry.name not in view.constants]
    activations = {name: name for name in names if name in floats}
    weights, biases, constants = {}, {}, {}
    for node in view.nodes:
        for index, name in enumerate(node.input):
            role = _role(view, node, index)
            if role == "weight":
                weights.setdefault(name, channel_axis(node, len(view.constants[name].dims)))
            elif role == "bias":
                biases.setdefault(name, (node.input[0], node.input[1]))
            elif role == "constant":
                constants[name] = None
        for name in node.output:
            if name in floats and name not in inner:
                source = node.input[0] if node.op_type in _MOVES else name
                activations[name] = activations.get(source, name)
    return Tensors(activations, weights, biases, [name for name in constants if name not in weights])


def _role(view: View, node: onnx.NodeProto, index: int) -> str | None:
    """What a float32 constant is to the node that reads it: 'weight', 'bias' or 'constant'."""
    name = node.input[index]
    if not view.is_float(name) or node.domain not in ("", "ai.onnx") or node.op_type in _FLOAT_CONSTANTS:
        return None
    if node.op_type in _WEIGHTED and index == 1 and len(view.constants[name].dims) >= 2:
        return "weight"
    return "bias" if node.op_type in _WEIGHTED and index == 2 else "constant"


def _floats(model: onnx.ModelProto) -> set[str]:
    """The tensors of float32; inferred where the file does not say."""
    from onnx import TensorProto, shape_inference

    said = {entry.name for entry in (*model.graph.value_info, *model.graph.output)}
    if any(name and name not in said for node in model.graph.node for name in node.output):
        model = shape_inference.infer_shapes(model)
    entries = (*model.graph.value_info, *model.graph.output, *model.graph.input)
    return {entry.name for entry in entries if entry.type.tensor_type.elem_type == TensorProto.FLOAT}


def _inner(view: View, supergroups: Sequence[Supergroup]) -> set[str]:
    """The tensors that pass only between operators that run as one."""
    found = set()
    for node in view.nodes:
        for group in supergroups:
            if node.op_type == group[0]:
                found.update(_passed(view, node, group[1:]))
    return found


def _passed(view: View, node: onnx.NodeProto, following: Sequence[str]) -> list[str]:
    """What is passed on from `node` through the operators `following`; empty if others follow."""
    names = []
    for op in following:
        names.append(node.output[0])
        node = view.only_reader(names[-1])
        if node is None or node.op_type != op or (op == "Clip" and node.input[0] != names[-1]):
            return []
    return names


# -- writing ---------------------------------------------------------------------------------------------------------


def write_qdq(
    model: onnx.ModelProto,
    activations: Mapping[str, QParams],
    params: Mapping[str, QParams | LPBQ],
    tensors: Tensors | None = None,
) -> onnx.ModelProto:
    """Put the encodings into a float network; tensors without one stay float.

    The tensors keep their names: what was ``x`` in the float network is the dequantized ``x`` of this one, made of the
    codes ``x.codes``; only an input is quantized and dequantized to another name.  Biases become int32, at the scale
    of their accumulator, for which `fit_biases` may have to change scales of weights.

    4-bit weights per tensor beside a bias are written with their one scale repeated for each channel: the execution
    provider of the HTP backend (onnxruntime-qnn 2.7.0) translates no other Conv of the kind, and the numbers are the
    same.

    Parameters
    ----------
    model : ModelProto
        Prepared (see `graph.prepare`).
    activations : mapping of str to QParams
        Per tensor.
    params : mapping of str to QParams or LPBQ
        Of weights and other constants, in the layout of the initializer.
    tensors : Tensors, optional
        As `quantized_tensors` gave it; its biases are the ones that are quantized.

    Raises
    ------
    ValueError
        If a tensor is not in the network, or an encoding does not fit it, or ONNX cannot write it.
    """
    return _write(model, activations, params, tensors, _Writing(_codes_constant, _codes_bias, _codes_activation))


def write_simulation(
    model: onnx.ModelProto,
    activations: Mapping[str, QParams],
    params: Mapping[str, QParams | LPBQ],
    tensors: Tensors | None = None,
) -> onnx.ModelProto:
    """The network of `write_qdq` in floats, without any QuantizeLinear or DequantizeLinear.

    Weights, biases and other constants are quantized and dequantized beforehand; every quantized activation passes
    through Div, Round, Add, Clip, Sub and Mul.  All tensors have the names they have in the other network.

    Parameters
    ----------
    model, activations, params, tensors
        As for `write_qdq`; grids that ONNX has no type for are taken too.

    Raises
    ------
    ValueError
        If a tensor is not in the network, or an encoding does not fit it.
    """
    return _write(model, activations, params, tensors, _Writing(_float_constant, _float_bias, _float_activation))


Made = tuple[list, list]
"""New nodes and initializers."""


class _Writing(NamedTuple):
    """How encodings are written."""

    constant: Callable[[str, np.ndarray, QParams | LPBQ], Made]
    bias: Callable[[str, np.ndarray, np.ndarray], Made]
    activation: Callable[[str, str, str, QParams], Made]


def _write(
    model: onnx.ModelProto,
    activations: Mapping[str, QParams],
    params: Mapping[str, QParams | LPBQ],
    tensors: Tensors | None,
    writing: _Writing,
) -> onnx.ModelProto:
    model = copy_of(model)
    tensors, view = tensors or quantized_tensors(model), View(model)
    activations = {name: _in_float32(name, encoding) for name, encoding in activations.items()}
    _check(view, activations, params, tensors)
    params = _repeat_4_bit_scales(view, fit_biases(model, activations, params, tensors))
    new = _New(view)
    for name, encoding in params.items():
        with _about(name):
            new.add(writing.constant(name, view.value(name), encoding), keep={name})
    replaced = set(params) | _write_biases(view, tensors, {**params, **activations}, new, writing)
    renamed = {}
    for name in [entry.name for entry in model.graph.input if entry.name in activations]:
        renamed[name] = view.fresh(f"{name}.dequantized")
        with _about(name):
            new.add(writing.activation(name, renamed[name], name, activations[name]), keep={renamed[name]})
    for node in view.nodes:
        _rename_inputs(node, renamed)
        made = [name for name in node.output if name in activations]
        floats = {name: view.fresh(f"{name}.float") for name in made}
        node.output[:] = [floats.get(name, name) for name in node.output]
        new.nodes.append(node)
        for name in made:
            with _about(name):
                new.add(writing.activation(floats[name], name, name, activations[name]), keep={name})
    set_nodes(model, new.nodes)
    _put_constants(model, replaced, new.constants)
    return with_shapes(model)


class _New:
    """Nodes and initializers to be, under names that are free."""

    def __init__(self, view: View) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._view, self._names = view, {node.name for node in view.nodes}

    def add(self, made: Made, keep: set[str]) -> None:
        """Take in what was made; the tensors in `keep` are meant to have their names, the others may get new ones."""
        nodes, constants = made
        names = [*(tensor.name for tensor in constants), *(name for node in nodes for name in node.output)]
        free = {name: self._view.fresh(name) for name in names if name not in keep}
        for tensor in constants:
            tensor.name = free.get(tensor.name, tensor.name)
        for node in nodes:
            node.input[:] = [free.get(name, name) for name in node.input]
            node.output[:] = [free.get(name, name) for name in node.output]
            node.name = claim(node.name, self._names)
        self.nodes += nodes
        self.constants += constants


def _check(
    view: View, activations: Mapping[str, QParams], params: Mapping[str, QParams | LPBQ], tensors: Tensors
) -> None:
    opset = max(entry.version for entry in view.model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OPSET:
        raise ValueError(f"the network has opset {opset}, encodings are written from {OPSET} on: see graph.prepare")
    unknown = [name for name in activations if name not in tensors.activations]
    unknown += [name for name in params if not view.is_float(name)]
    if unknown:
        raise ValueError(f"the network has no tensor {unknown[0]!r} that could be quantized")
    for name, encoding in activations.items():
        if isinstance(encoding, LPBQ) or encoding.scale.size != 1:
            raise ValueError(f"{name}: the encoding of an activation has one scale, this one has more")


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Say which tensor an error is about."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def _rename_inputs(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    """Rename what a node reads, in its branches too."""
    for index, name in enumerate(node.input):
        node.input[index] = renamed.get(name, name)
    for entry in node.attribute:
        for graph in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            for inner in graph.node:
                _rename_inputs(inner, renamed)


def _put_constants(model: onnx.ModelProto, replaced: set[str], constants: list[onnx.TensorProto]) -> None:
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in replaced]
    inputs = [entry for entry in model.graph.input if entry.name not in replaced]
    del model.graph.initializer[:], model.graph.input[:]
    model.graph.initializer.extend([*kept, *constants])
    model.graph.input.extend(inputs)


# -- biases ----------------------------------------------------------------------------------------------------------


def fit_biases(
    model: onnx.ModelProto,
    activations: Mapping[str, QParams],
    params: Mapping[str, QParams | LPBQ],
    tensors: Tensors | None = None,
) -> dict[str, QParams | LPBQ]:
    """The encodings of the constants as they are written: with scales of weights changed where a bias asks for it.

    A bias is an int32 at the scale of its accumulator: that of the input times that of the channel's weights.  Where
    its code would exceed 2**30, the scale of the channel (per tensor: of all weights) is raised until it does not;
    what the weights lose is small beside such a bias.  In a channel whose weights all have the code of zero the scale
    of the weights is free, and is chosen so that the bias is exact; it might otherwise be as coarse as the input.

    Parameters
    ----------
    model, activations, params, tensors
        As for `write_qdq`.

    Returns
    -------
    dict
        `params`, scales in float32.
    """
    view, tensors = View(model), tensors or quantized_tensors(model)
    fitted = {name: _in_float32(name, encoding) for name, encoding in params.items()}
    sizes: dict[str, np.ndarray] = {}
    for node in _biased(view, tensors, fitted):
        source, weight = node.input[0], node.input[1]
        if source in activations and weight in fitted and weight in view.constants:
            encoding, values = fitted[weight], view.value(weight)
            with _about(weight):
                size = _bias_sizes(view, node, _accumulator_scales(encoding), values)
            if size is not None:
                size = size / float(np.ravel(activations[source].scale)[0])
                sizes[weight] = np.maximum(sizes.get(weight, 0), size)
    for name, size in sizes.items():
        fitted[name] = _fitted(fitted[name], view.value(name), size)
    return fitted


def _biased(view: View, tensors: Tensors, params: Mapping[str, QParams | LPBQ]) -> list[onnx.NodeProto]:
    """The nodes whose bias becomes an int32: not one that was given an encoding of its own."""
    wanted = tensors.biases.keys() - (params.keys() - set(tensors.constants))
    return [
        node for node in view.nodes if node.op_type in _WEIGHTED and len(node.input) > 2 and node.input[2] in wanted
    ]


def _accumulator_scales(encoding: QParams | LPBQ) -> np.ndarray:
    """The scales that those of accumulators are made of; for LPBQ the floats of the channels."""
    return encoding.channel_scale if isinstance(encoding, LPBQ) else encoding.scale


def _bias_sizes(view: View, node: onnx.NodeProto, scale: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """The largest magnitudes of a bias, in the shape of the scales of the weights; None for plain blocks."""
    axis = channel_axis(node, weight.ndim)
    if scale.size != 1 and (scale.ndim != weight.ndim or scale.shape[axis] != scale.size):
        return None
    bias = np.abs(_spread_bias(view, node, weight).astype(np.float64))
    channels = bias.reshape(-1, weight.shape[axis]).max(axis=0)  # the groups of a ConvTranspose share the scales
    return channels.max() if scale.size == 1 else channels.reshape(scale.shape)


def _spread_bias(view: View, node: onnx.NodeProto, weight: np.ndarray) -> np.ndarray:
    """A bias with all channels on its last axis; a Gemm's may have been written as one number, or with axes of 1."""
    bias = view.value(node.input[2])
    if node.op_type != "Gemm":
        return bias
    channels = weight.shape[channel_axis(node, weight.ndim)]
    bias = np.broadcast_to(bias, (*bias.shape[:-1], channels))
    return bias.ravel() if bias.size == channels else bias


def _fitted(encoding: QParams | LPBQ, weight: np.ndarray, size: np.ndarray) -> QParams | LPBQ:
    """An encoding with its scales changed for a bias of `size` (in units of the input's scale)."""
    scale = _accumulator_scales(encoding)
    live = _live_blocks(encoding, weight)
    if isinstance(encoding, LPBQ):
        axis = next((axis for axis, pair in enumerate(zip(live.shape, scale.shape)) if pair[0] != pair[1]), None)
        live = live if axis is None else live.any(axis=axis, keepdims=True)
    free = ~live & (size > 0)
    new = np.where(free, np.maximum(size / _EXACT, _LEAST_SCALE), np.maximum(scale, size / _MOST)).astype(np.float32)
    if np.array_equal(new, scale):
        return encoding
    if isinstance(encoding, LPBQ):
        scaled = QParams(encoding.qparams.grid, encoding.block_scale * new, encoding.qparams.zero_point)
        return LPBQ(scaled, encoding.block_scale, new)
    return QParams(encoding.grid, new.reshape(scale.shape), encoding.zero_point)


def _live_blocks(encoding: QParams | LPBQ, weight: np.ndarray) -> np.ndarray:
    """Which blocks hold a weight that is not rounded to zero."""
    qparams = encoding.qparams if isinstance(encoding, LPBQ) else encoding
    low, high = block_ranges(weight, qparams.grid.block_size)
    return np.maximum(np.abs(low), np.abs(high)) / qparams.scale > 0.5


def _write_biases(
    view: View, tensors: Tensors, encodings: Mapping[str, QParams | LPBQ], new: _New, writing: _Writing
) -> set[str]:
    """Write every bias once for each scale it is read at; returns the initializers that are replaced."""
    plain = {name for name, encoding in encodings.items() if _accumulator_scales(encoding).size == 1}
    found = [
        node for node in _biased(view, tensors, encodings) if node.input[0] in plain and node.input[1] in encodings
    ]
    readers = {id(node) for node in found}
    written: dict[tuple[str, bytes], str] = {}
    replaced: set[str] = set()
    for node in found:
        name, weight = node.input[2], view.value(node.input[1])
        values, scale = _bias_and_scale(view, node, encodings, weight)
        key = (name, scale.tobytes())
        if key not in written:
            # The name goes to the first, unless something reads the float tensor besides.
            shared = name in encodings or name in view.branched or name in view.outputs
            keeps = not shared and name not in replaced and all(id(node) in readers for node in view.readers[name])
            written[key] = name if keeps else view.fresh(f"{name}.at.{node.name or node.output[0]}")
            replaced |= {name} if keeps else set()
            new.add(writing.bias(written[key], values, scale), keep={written[key]})
        node.input[2] = written[key]
    return replaced


def _bias_and_scale(
    view: View, node: onnx.NodeProto, encodings: Mapping[str, QParams | LPBQ], weight: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A bias and its scale: one for all, or one for each entry of the last axis."""
    encoding, source = encodings[node.input[1]], np.float32(np.ravel(encodings[node.input[0]].scale)[0])
    scale = _accumulator_scales(encoding)
    values = view.value(node.input[2]) if weight is None else _spread_bias(view, node, weight)
    if scale.size > 1:
        scale = _channel_scales(node, encoding, weight)
        groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
        scale = np.tile(scale, groups) if scale.size > 1 else scale
    scale = np.maximum(source * np.ravel(scale), np.finfo(np.float32).tiny)
    needed = np.abs(values).reshape(-1, scale.size).max(axis=0) if scale.size > 1 else np.abs(values).max(initial=0)
    # Only the accumulators of plain blocks can still be too fine here: they are nobody's, so any scale will do.
    scale = np.where(needed / scale.astype(np.float64) > 2**31 - 1, needed / _MOST, scale).astype(np.float32)
    return values, scale if scale.size > 1 else scale.reshape(())


def _channel_scales(node: onnx.NodeProto, encoding: QParams | LPBQ, weight: np.ndarray) -> np.ndarray:
    """One scale for each channel; of plain blocks the finest that holds anything, for they have no common one."""
    scale, axis = _accumulator_scales(encoding), channel_axis(node, weight.ndim)
    if scale.shape[axis] == scale.size:
        return scale.ravel()
    live = np.ones(scale.shape, bool) if isinstance(encoding, LPBQ) else _live_blocks(encoding, weight)
    if scale.shape[axis] != weight.shape[axis]:
        return scale[live].min(keepdims=True) if live.any() else scale.min(keepdims=True).ravel()
    scale, live = (np.moveaxis(part, axis, 0).reshape(scale.shape[axis], -1) for part in (scale, live))
    return np.where(live | ~live.any(axis=1, keepdims=True), scale, np.inf).min(axis=1)


# -- encodings -------------------------------------------------------------------------------------------------------


def _in_float32(name: str, encoding: QParams | LPBQ) -> QParams | LPBQ:
    """The same encoding in NumPy and float32, which is what a file holds."""
    with _about(name), np.errstate(over="ignore", under="ignore"):
        if isinstance(encoding, LPBQ):
            channel = np.asarray(encoding.channel_scale, np.float32)
            block = np.asarray(encoding.block_scale)
            zero_point = np.asarray(encoding.qparams.zero_point)
            return LPBQ(QParams(encoding.qparams.grid, block * channel, zero_point), block, channel)
        scale = np.asarray(encoding.scale, np.float32)
        return QParams(encoding.grid, scale, np.asarray(encoding.zero_point))


def _repeat_4_bit_scales(view: View, params: dict[str, QParams | LPBQ]) -> dict[str, QParams | LPBQ]:
    """The one scale of a 4-bit weight repeated for every channel, if a convolution has a bias too (see `write_qdq`)."""
    params = dict(params)
    for node in view.nodes:
        encoding = params.get(node.input[1]) if len(node.input) > 2 and node.input[2] else None
        convolution = node.op_type in ("Conv", "ConvTranspose")
        if not convolution or not isinstance(encoding, QParams) or encoding.grid.bits != 4 or encoding.scale.size != 1:
            continue
        weight = view.value(node.input[1])
        axis = channel_axis(node, weight.ndim)
        blocks = tuple(1 if other == axis else -1 for other in range(weight.ndim))
        shape = tuple(size if other == axis else 1 for other, size in enumerate(weight.shape))
        scale, zero_point = (np.broadcast_to(part.ravel()[0], shape) for part in (encoding.scale, encoding.zero_point))
        params[node.input[1]] = QParams(replace(encoding.grid, block_size=blocks), scale, zero_point)
    return params


def _qparams(encoding: QParams | LPBQ) -> QParams:
    return encoding.qparams if isinstance(encoding, LPBQ) else encoding


# -- as codes --------------------------------------------------------------------------------------------------------


def _codes_constant(name: str, values: np.ndarray, encoding: QParams | LPBQ) -> Made:
    if isinstance(encoding, LPBQ) and encoding.channel_scale.size == 1:
        encoding = encoding.qparams  # a chain of scales needs an axis of channels
    return weight_nodes(name, quantize(values, _qparams(encoding)), encoding)


def _codes_bias(name: str, values: np.ndarray, scale: np.ndarray) -> Made:
    from onnx import helper, numpy_helper

    parts = {"codes": _bias_codes(values, scale), "scale": scale, "zero_point": np.zeros(scale.shape, np.int32)}
    constants = [numpy_helper.from_array(np.ascontiguousarray(part), f"{name}.{key}") for key, part in parts.items()]
    inputs = [tensor.name for tensor in constants]
    attributes = {"axis": values.ndim - 1} if scale.ndim else {}
    return [helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dequantize", **attributes)], constants


def _bias_codes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.rint(values / scale.astype(np.float64)).astype(np.int32)


def _codes_activation(source: str, target: str, name: str, qparams: QParams) -> Made:
    from onnx import TensorProto, helper

    scale, zero_point = f"{name}.scale", f"{name}.zero_point"
    constants = [
        helper.make_tensor(scale, TensorProto.FLOAT, [], [qparams.scale.item()]),
        helper.make_tensor(zero_point, onnx_type(qparams.grid), [], [qparams.zero_point.item()]),
    ]
    codes = f"{name}.codes"
    return [
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [codes], name=f"{name}.quantize"),
        helper.make_node("DequantizeLinear", [codes, scale, zero_point], [target], name=f"{name}.dequantize"),
    ], constants


# -- as floats -------------------------------------------------------------------------------------------------------


def _float_constant(name: str, values: np.ndarray, encoding: QParams | LPBQ) -> Made:
    from onnx import numpy_helper

    qparams = _qparams(encoding)
    return [], [numpy_helper.from_array(dequantize(quantize(values, qparams), qparams), name)]


def _float_bias(name: str, values: np.ndarray, scale: np.ndarray) -> Made:
    from onnx import numpy_helper

    return [], [numpy_helper.from_array(_bias_codes(values, scale).astype(np.float32) * scale, name)]


def _float_activation(source: str, target: str, name: str, qparams: QParams) -> Made:
    from onnx import TensorProto, helper

    numbers = {
        "scale": qparams.scale.item(),
        "zero_point": qparams.zero_point.item(),
        "qmin": qparams.grid.qmin,
        "qmax": qparams.grid.qmax,
    }
    constants = [helper.make_tensor(f"{name}.{key}", TensorProto.FLOAT, [], [part]) for key, part in numbers.items()]
    scale, zero_point, qmin, qmax = (tensor.name for tensor in constants)
    steps = [
        ("Div", [source, scale], f"{name}.divided"),
        ("Round", [f"{name}.divided"], f"{name}.rounded"),
        ("Add", [f"{name}.rounded", zero_point], f"{name}.shifted"),
        ("Clip", [f"{name}.shifted", qmin, qmax], f"{name}.codes"),
        ("Sub", [f"{name}.codes", zero_point], f"{name}.centred"),
        ("Mul", [f"{name}.centred", scale], target),
    ]
    return [helper.make_node(op, inputs, [made], name=f"{made}.{op}") for op, inputs, made in steps], constants
