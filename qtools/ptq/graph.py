"""Float networks as files give them, made fit for quantization: one opset, fixed shapes, no dead arithmetic.

Every step takes an ONNX model and returns another; the one given stays as it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

OPSET = 21  # the first with 16-bit and 4-bit codes and blocked scales
_FOLD_UP_TO = 1 << 24  # elements; a constant any larger is left to be computed


@dataclass(frozen=True)
class Weight:
    """The constant operand of a Conv, ConvTranspose, Gemm or MatMul.

    Parameters
    ----------
    node, op, name : str
        Name and type of the node, name of the initializer.
    values : ndarray
    channel_axis : int
        Axis of the output channels.
    depthwise : bool
        A convolution with one input channel a group.
    """

    node: str
    op: str
    name: str
    values: np.ndarray
    channel_axis: int
    depthwise: bool = False

    @property
    def rows(self) -> np.ndarray:
        """As a matrix: one row for each output channel, its inputs side by side."""
        return np.moveaxis(self.values, self.channel_axis, 0).reshape(self.values.shape[self.channel_axis], -1)

    def from_rows(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `rows`: such a matrix in the layout of the weight."""
        first = np.moveaxis(self.values, self.channel_axis, 0)
        return np.moveaxis(rows.reshape(first.shape), 0, self.channel_axis)


def prepare(model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]] | None = None) -> onnx.ModelProto:
    """Bring a float network up to `OPSET`, fix its input shapes, fold constants and BatchNorms, name every node.

    Parameters
    ----------
    model : ModelProto
        Opset 7 or newer, all operators of the default domain.
    input_shapes : mapping of str to shape, optional
        For inputs with symbolic or unknown dimensions; the others may be left out.

    Raises
    ------
    ValueError
        If the model is not valid ONNX or cannot be brought to the opset, or an input is unknown or does not have the
        rank or the fixed dimensions of the shape given.
    """
    import onnx
    from onnx import version_converter

    try:
        onnx.checker.check_model(model)
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        model = version_converter.convert_version(model, OPSET) if opset < OPSET else _copy(model)
    except StopIteration:
        raise ValueError("the model imports no opset of the default ONNX domain") from None
    except (onnx.checker.ValidationError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"not a network that can be brought to opset {OPSET}: {reason}") from None
    model.ir_version = max(model.ir_version, 10)
    _fix_inputs(model, input_shapes or {})
    _fold_constants(model)
    _fold_batch_norms(model)
    _drop_unused(model)
    _name_nodes(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def weights(model: onnx.ModelProto) -> dict[str, Weight]:
    """All constant weights of Conv, ConvTranspose, Gemm and MatMul nodes, by node name, in order."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and node.input[1] in constants:
            values = numpy_helper.to_array(constants[node.input[1]])
            if values.ndim >= 2:
                depthwise = node.op_type == "Conv" and values.shape[1] == 1 and _attribute(node, "group", 1) > 1
                axis = _channel_axis(node, values.ndim)
                found[node.name] = Weight(node.name, node.op_type, node.input[1], values, axis, depthwise)
    return found


def replace_weights(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The same network with other values in some of its initializers, such as quantized and dequantized weights.

    Raises
    ------
    ValueError
        If there is no initializer of a name, or it has another shape.
    """
    from onnx import numpy_helper

    model = _copy(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in values.items():
        if name not in constants or tuple(constants[name].dims) != array.shape:
            raise ValueError(f"the network has no initializer {name!r} of shape {array.shape}")
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
    return model


# -- steps of prepare, each in place ---------------------------------------------------------------------------------


def _fix_inputs(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {entry.name: entry for entry in model.graph.input if entry.name not in constants}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ValueError(f"the network has no input {name!r}: it has {', '.join(inputs)}")
        dims = inputs[name].type.tensor_type.shape.dim
        if len(dims) != len(shape) or any(size < 1 for size in shape):
            raise ValueError(f"the input {name!r} has {len(dims)} axes, of positive size; got {tuple(shape)}")
        for dim, size in zip(dims, shape):
            if dim.dim_value > 0 and dim.dim_value != size:  # some exporters write -1 for "any"
                raise ValueError(f"the input {name!r} has a fixed size of {dim.dim_value}, got {size}: {tuple(shape)}")
            dim.dim_value = int(size)
    # What was inferred for other shapes would contradict the new ones.
    del model.graph.value_info[:]
    if shapes:
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")


def _fold_constants(model: onnx.ModelProto) -> None:
    """Compute once what depends on constants and known shapes only; what ONNX's reference evaluates, bit for bit."""
    from onnx import helper, numpy_helper, shape_inference
    from onnx.reference import ReferenceEvaluator

    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {entry.name: _known_shape(entry) for entry in (*inferred.value_info, *inferred.input)}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    kept = []
    for node in model.graph.node:
        result = None
        if node.op_type == "Shape" and shapes.get(node.input[0]) is not None:
            span = slice(_attribute(node, "start", 0), _attribute(node, "end", None))
            result = [np.array(shapes[node.input[0]], np.int64)[span]]
        elif _is_constant(node, values):
            feeds = {name: values[name] for name in node.input if name}
            entries = [helper.make_tensor_value_info(name, 0, None) for name in node.output]
            inputs = [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                for name, value in feeds.items()
            ]
            alone = helper.make_graph([node], "constant", inputs, entries)
            single = helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
            result = ReferenceEvaluator(single).run(None, feeds)
        if result is None or outputs & set(node.output) or sum(np.size(part) for part in result) > _FOLD_UP_TO:
            kept.append(node)
            continue
        for name, value in zip(node.output, result):
            values[name] = np.asarray(value)
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))
    _set_nodes(model, kept)


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    """Multiply each BatchNormalization that follows a convolution or a Gemm, and nothing else, into its weights."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    uses.update(output.name for output in model.graph.output)
    makers = {name: node for node in model.graph.node for name in node.output}
    kept = []
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if not _can_fold(node, before, constants, uses):
            kept.append(node)
            continue
        gain, shift, mean, variance = (numpy_helper.to_array(constants[name]) for name in node.input[1:5])
        factor = gain / np.sqrt(variance + _attribute(node, "epsilon", 1e-5))
        weight = numpy_helper.to_array(constants[before.input[1]])
        bias = numpy_helper.to_array(constants[before.input[2]]) if len(before.input) > 2 else np.zeros_like(shift)
        spread = [1] * weight.ndim
        spread[_channel_axis(before, weight.ndim)] = -1
        folded = (weight * factor.reshape(spread)).astype(weight.dtype)
        constants[before.input[1]].CopyFrom(numpy_helper.from_array(folded, before.input[1]))
        bias_name = before.input[2] if len(before.input) > 2 else f"{before.input[1]}.bias"
        folded_bias = numpy_helper.from_array(((bias - mean) * factor + shift).astype(weight.dtype), bias_name)
        if len(before.input) > 2:
            constants[bias_name].CopyFrom(folded_bias)
        else:
            before.input.append(bias_name)
            model.graph.initializer.append(folded_bias)
        before.output[0] = node.output[0]
    _set_nodes(model, kept)


def _can_fold(
    node: onnx.NodeProto,
    before: onnx.NodeProto | None,
    constants: Mapping[str, onnx.TensorProto],
    uses: Mapping[str, int],
) -> bool:
    if before is None or before.op_type not in ("Conv", "ConvTranspose", "Gemm") or uses[node.input[0]] != 1:
        return False
    # A transposed convolution in groups keeps its output channels on two axes; a Gemm may scale its operands.
    if before.op_type == "ConvTranspose" and _attribute(before, "group", 1) != 1:
        return False
    if before.op_type == "Gemm" and (_attribute(before, "alpha", 1.0), _attribute(before, "beta", 1.0)) != (1.0, 1.0):
        return False
    shared = any(uses[name] > 1 for name in before.input[1:])
    return not shared and all(name in constants for name in (*before.input[1:], *node.input[1:5]))


def _drop_unused(model: onnx.ModelProto) -> None:
    needed, kept = {output.name for output in model.graph.output}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= _read_by(node)
            kept.append(node)
    _set_nodes(model, kept[::-1])
    used = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(used)


def _name_nodes(model: onnx.ModelProto) -> None:
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            name = f"{node.op_type}.{index}"
            node.name = name if name not in taken else f"{name}.unnamed"


# -- helpers ---------------------------------------------------------------------------------------------------------


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    nodes = list(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _read_by(node: onnx.NodeProto) -> set[str]:
    """The tensors a node reads, those of the branches inside it too."""
    names = set(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names |= _read_by(inner)
    return names


def _is_constant(node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> bool:
    if (
        node.domain not in ("", "ai.onnx")
        or node.op_type.startswith("Random")
        or node.op_type in ("If", "Loop", "Scan")
    ):
        return False
    return all(not name or name in values for name in node.input)


def _known_shape(entry: onnx.ValueInfoProto) -> list[int] | None:
    if not entry.type.tensor_type.HasField("shape"):
        return None
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in entry.type.tensor_type.shape.dim]
    return dims if math.prod(dims) > 0 or not dims else None


def _attribute(node: onnx.NodeProto, name: str, default: float | int | None) -> float | int | None:
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _channel_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _attribute(node, "transB", 0)):
        return 0
    return rank - 1 if node.op_type == "MatMul" else 1
