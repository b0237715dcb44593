"""Float networks as files give them, made fit for quantization: one opset, fixed shapes, no dead arithmetic.

Every step takes an ONNX model and returns another; the one given stays as it was.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

OPSET = 21  # the first with 16-bit and 4-bit codes and blocked scales
_FOLD_UP_TO = 1 << 24  # elements; a constant any larger is left to be computed
_DEFAULT = ("", "ai.onnx")
_DRAWS = {"Bernoulli", "Multinomial", "Dropout"}  # beside Random…: another result at every run


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

    model = _upgraded(model)
    _fix_inputs(model, input_shapes or {})
    try:
        _fold_constants(model)
        _fold_batch_norms(model)
        drop_unused(model)
        _name_nodes(model)
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(f"the shapes of this network contradict each other: {_first_line(error)}") from None


def _upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx
    from onnx import inliner, version_converter

    opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not opsets:
        raise ValueError("not an ONNX network: it imports no opset of the default domain")
    try:
        onnx.checker.check_model(model)
        # The converter drops local functions; written out they are nodes like any other.
        model = inliner.inline_local_functions(model) if model.functions else copy_of(model)
        if opsets[0] < OPSET:
            model = version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises types of its own, and plain RuntimeErrors
        raise ValueError(f"not a network that can be brought to opset {OPSET}: {_first_line(error)}") from None
    model.ir_version = max(model.ir_version, 10)
    # Files of the first years list their constants among the inputs too, as defaults that a caller could replace.
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def weights(model: onnx.ModelProto) -> dict[str, Weight]:
    """All constant weights of Conv, ConvTranspose, Gemm and MatMul nodes, by node name, in order.

    Those of a ConvTranspose in groups are left out: they have no axis of output channels.

    Raises
    ------
    ValueError
        If two such nodes have one name, as in a network that was not prepared.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        known = node.domain in _DEFAULT and node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        grouped = node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1
        if known and not grouped and node.input[1] in constants:
            values = numpy_helper.to_array(constants[node.input[1]])
            if values.ndim >= 2:
                if node.name in found:
                    raise ValueError(f"two nodes are called {node.name!r}: prepare the network first")
                depthwise = node.op_type == "Conv" and values.shape[1] == 1 and attribute(node, "group", 1) > 1
                axis = channel_axis(node, values.ndim)
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

    model = copy_of(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, array in values.items():
        if name not in constants or tuple(constants[name].dims) != array.shape:
            raise ValueError(f"the network has no initializer {name!r} of shape {array.shape}")
        dtype = numpy_helper.to_array(constants[name]).dtype
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array, dtype), name))
    return model


# -- steps of prepare, each in place ---------------------------------------------------------------------------------


def _fix_inputs(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> None:
    inputs = {entry.name: entry for entry in model.graph.input}
    named: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        if name not in inputs:
            raise ValueError(f"the network has no input {name!r}: it has {', '.join(inputs)}")
        dims = inputs[name].type.tensor_type.shape.dim
        sizes = _sizes(name, shape, len(dims))
        for dim, size in zip(dims, sizes):
            if dim.dim_value > 0 and dim.dim_value != size:  # some exporters write -1 for "any"
                raise ValueError(f"the input {name!r} has a fixed size of {dim.dim_value}, got {size}: {sizes}")
            named.setdefault(dim.dim_param, set()).add(size)
            dim.dim_value = size
    # A size that inputs share by its name is fixed in all of them; some exporters call all unknown ones "?".
    shared = {param: sizes.pop() for param, sizes in named.items() if param and len(sizes) == 1}
    for entry in inputs.values():
        for dim in entry.type.tensor_type.shape.dim:
            if dim.dim_param in shared:
                dim.dim_value = shared[dim.dim_param]
    # What was inferred for other shapes would contradict the new ones.
    del model.graph.value_info[:]
    for output in model.graph.output if shapes else ():
        for dim in output.type.tensor_type.shape.dim:
            dim.Clear()


def _sizes(name: str, shape: Sequence[int], rank: int) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise ValueError(f"the shape of the input {name!r} must be whole numbers, got {shape!r}") from None
    if len(sizes) != rank or any(size < 1 for size in sizes):
        raise ValueError(f"the input {name!r} has {rank} axes, of positive size; got {sizes}")
    return sizes


def _fold_constants(model: onnx.ModelProto) -> None:
    """Compute once what depends on constants and known shapes only; what ONNX's reference evaluates, bit for bit."""
    from onnx import numpy_helper, shape_inference

    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {entry.name: _known_shape(entry) for entry in (*inferred.value_info, *inferred.input)}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    outputs = {output.name for output in model.graph.output}
    kept = []
    for node in model.graph.node:
        result = None
        if node.op_type == "Shape" and node.domain in _DEFAULT and shapes.get(node.input[0]) is not None:
            span = slice(attribute(node, "start", 0), attribute(node, "end", None))
            result = [np.array(shapes[node.input[0]], np.int64)[span]]
        elif not outputs & set(node.output) and _is_constant(node, values, shapes):
            result = _evaluated(model, node, values)
        if result is None or outputs & set(node.output):
            kept.append(node)
            continue
        for name, value in zip(node.output, result):
            values[name] = np.asarray(value)
            model.graph.initializer.append(numpy_helper.from_array(values[name], name))
    set_nodes(model, kept)


def _evaluated(model: onnx.ModelProto, node: onnx.NodeProto, values: Mapping[str, np.ndarray]) -> list | None:
    """A node's results, or None where the reference cannot tell: then it stays, and ONNX Runtime computes it."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    feeds = {name: values[name] for name in node.input if name}
    try:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ]
        entries = [helper.make_tensor_value_info(name, 0, None) for name in node.output]
        alone = helper.make_graph([node], "constant", inputs, entries)
        single = helper.make_model(alone, opset_imports=model.opset_import, ir_version=model.ir_version)
        result = ReferenceEvaluator(single).run(None, feeds)
    except Exception:
        return None
    fits = all(isinstance(part, np.ndarray | np.generic) and part.dtype.kind in "biuf" for part in result)
    return result if fits and len(result) == len(node.output) else None


def _fold_batch_norms(model: onnx.ModelProto) -> None:
    """Multiply each BatchNormalization that follows a convolution or a Gemm, and nothing else, into its weights."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    for node in model.graph.node:
        uses.update(_read_by(node) - set(node.input))  # by the branches inside it
    uses.update(output.name for output in model.graph.output)
    taken = {*uses, *constants, *(name for node in model.graph.node for name in node.output)}
    makers = {name: node for node in model.graph.node for name in node.output}
    kept = []
    for node in model.graph.node:
        before = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        if not _can_fold(node, before, constants, uses):
            kept.append(node)
            continue
        gain, shift, mean, variance = (numpy_helper.to_array(constants[name]) for name in node.input[1:5])
        factor = gain / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        weight = numpy_helper.to_array(constants[before.input[1]])
        has_bias = len(before.input) > 2 and before.input[2]
        bias = numpy_helper.to_array(constants[before.input[2]]) if has_bias else np.zeros_like(shift)
        spread = [1] * weight.ndim
        spread[channel_axis(before, weight.ndim)] = -1
        folded = (weight * factor.reshape(spread)).astype(weight.dtype)
        constants[before.input[1]].CopyFrom(numpy_helper.from_array(folded, before.input[1]))
        bias_name = before.input[2] if has_bias else free_name(f"{before.input[1]}.bias", taken)
        folded_bias = numpy_helper.from_array(((bias - mean) * factor + shift).astype(weight.dtype), bias_name)
        if has_bias:
            constants[bias_name].CopyFrom(folded_bias)
        else:
            del before.input[2:]
            before.input.append(bias_name)
            model.graph.initializer.append(folded_bias)
        before.output[0] = node.output[0]
    set_nodes(model, kept)


def _can_fold(
    node: onnx.NodeProto,
    before: onnx.NodeProto | None,
    constants: Mapping[str, onnx.TensorProto],
    uses: Mapping[str, int],
) -> bool:
    if before is None or before.op_type not in ("Conv", "ConvTranspose", "Gemm") or uses[node.input[0]] != 1:
        return False
    if attribute(node, "training_mode", 0) or any(node.output[1:]):
        return False
    # A transposed convolution in groups keeps its output channels on two axes; a Gemm may scale its operands.
    if before.op_type == "ConvTranspose" and attribute(before, "group", 1) != 1:
        return False
    if before.op_type == "Gemm" and (attribute(before, "alpha", 1.0), attribute(before, "beta", 1.0)) != (1.0, 1.0):
        return False
    own = [name for name in before.input[1:] if name]
    shared = any(uses[name] > 1 for name in own)
    return not shared and all(name in constants for name in (*own, *node.input[1:5]))


def drop_unused(model: onnx.ModelProto) -> None:
    needed, kept = {output.name for output in model.graph.output}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= _read_by(node)
            kept.append(node)
    set_nodes(model, kept[::-1])
    used = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(used)


def _name_nodes(model: onnx.ModelProto) -> None:
    """Give every node a name of its own."""
    taken: set[str] = set()
    named = Counter(node.name for node in model.graph.node)
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = free_name(node.name or f"{node.op_type}.{index}", taken | set(named))
        taken.add(node.name)


# -- helpers ---------------------------------------------------------------------------------------------------------


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
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


def free_name(name: str, taken: Collection[str]) -> str:
    """`name`, or `name` with a number behind it if it is taken."""
    return next(free for free in (name, *(f"{name}.{n}" for n in range(2, len(taken) + 3))) if free not in taken)


def _is_constant(
    node: onnx.NodeProto, values: Mapping[str, np.ndarray], shapes: Mapping[str, list[int] | None]
) -> bool:
    """Whether a node gives the same result whenever it runs, and not too large a one."""
    if node.domain not in _DEFAULT or node.op_type.startswith("Random") or node.op_type in _DRAWS:
        return False
    if any(entry.HasField("g") or entry.graphs for entry in node.attribute):
        return False
    if not all(not name or name in values for name in node.input):
        return False
    sizes = [math.prod(shapes[name]) for name in node.output if shapes.get(name) is not None]
    if node.op_type == "ConstantOfShape":
        sizes.append(math.prod(int(size) for size in values[node.input[0]]))
    return all(size <= _FOLD_UP_TO for size in sizes)


def _known_shape(entry: onnx.ValueInfoProto) -> list[int] | None:
    if not entry.type.tensor_type.HasField("shape"):
        return None
    dims = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in entry.type.tensor_type.shape.dim]
    return dims if all(size > 0 for size in dims) else None


def attribute(node: onnx.NodeProto, name: str, default: float | int | None) -> float | int | None:
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def channel_axis(node: onnx.NodeProto, rank: int) -> int:
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return rank - 1 if node.op_type == "MatMul" else 1
