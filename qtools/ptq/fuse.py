"""What a converter merges before it quantizes: fewer operators, fewer tensors, fewer roundings.

Every function changes a network in place; the network computes what it computed, up to the rounding of float32.  What
is not certain to keep the function (shapes that are not known, constants that broadcast, other types than float32)
is left alone.  `fuse` does all of it, in an order in which each step makes room for the next.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from qtools.ptq.graph import attribute, channel_axis, copy_of, drop_unused, free_name, set_nodes

if TYPE_CHECKING:
    import onnx

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_OWN_DOMAIN = ("", "ai.onnx")
_SMALL, _LARGE = 1e-30, 1e38  # between them float32 has its full accuracy
_FEW = 8  # nodes; a hard swish has no more, and a longer product need not be taken apart


class View:
    """A graph indexed: who makes a tensor, who reads it, and the constants as arrays; stale after a change.

    A node with branches (If, Loop) counts as a reader of what they read.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import numpy_helper

        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.branched: set[str] = set()
        for node in self.nodes:
            inside = set(names_inside(node))
            self.branched |= inside
            for name in (*node.input, *inside):
                if name:
                    self.readers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in model.graph.output}
        self.shapes = {
            entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim]  # 0: not known
            for entry in (*model.graph.value_info, *model.graph.input, *model.graph.output)
            if entry.type.tensor_type.HasField("shape")
        }
        self.taken = {*self.makers, *self.constants, *self.readers, *self.shapes}
        self._array = numpy_helper.to_array

    def value(self, name: str) -> np.ndarray | None:
        """A constant's array; None for what is computed."""
        return self._array(self.constants[name]) if name in self.constants else None

    def scalar(self, name: str) -> float | None:
        """A constant of one element as a number."""
        value = self.value(name)
        return float(value.ravel()[0]) if value is not None and value.size == 1 else None

    def is_float(self, name: str) -> bool:
        """Whether it is a constant of float32."""
        from onnx import TensorProto

        return name in self.constants and self.constants[name].data_type == TensorProto.FLOAT

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor, once; None if an output of the graph or a branch has it too."""
        readers = self.readers.get(name, [])
        shared = len(readers) != 1 or name in self.outputs or name in self.branched
        return None if shared else readers[0]

    def split(self, node: onnx.NodeProto) -> tuple[str, np.ndarray] | None:
        """The computed and the constant operand of a node with two inputs, in whichever order; None without both."""
        if len(node.input) != 2:
            return None
        for computed, constant in (node.input, node.input[::-1]):
            if constant in self.constants and computed not in self.constants:
                return computed, self.value(constant)
        return None

    def arithmetic(self, node: onnx.NodeProto) -> tuple[str, np.ndarray] | None:
        """`split` of an Add, Sub, Mul or Div by a finite float32 constant that stands second if the order matters."""
        if node.op_type not in ("Add", "Sub", "Mul", "Div") or node.domain not in _OWN_DOMAIN:
            return None
        if (parts := self.split(node)) is None:
            return None
        usable = parts[1].dtype == np.float32 and np.isfinite(parts[1]).all()
        ordered = node.input[0] == parts[0] or node.op_type in ("Add", "Mul")
        return parts if usable and ordered and (parts[1].all() or node.op_type != "Div") else None

    def keeps_shape(self, name: str, constant: np.ndarray) -> bool:
        """Whether a tensor combined with a constant element by element certainly has the tensor's own shape."""
        if constant.ndim == 0:
            return True
        shape = self.shapes.get(name)
        if shape is None or constant.ndim > len(shape):
            return False
        return all(size in (1, known) for size, known in zip(constant.shape[::-1], shape[::-1]))

    def fresh(self, name: str) -> str:
        """A name that no tensor has: `name` itself, or one with a number behind it; it is taken now."""
        return claim(name, self.taken)


def claim(name: str, taken: set[str]) -> str:
    """A name that is free, `name` itself or one with a number behind it; it is taken from now on."""
    free = free_name(name, taken) if name in taken else name  # the search takes time
    taken.add(free)
    return free


def names_inside(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors named within the branches of a node, those of the graph around it among them."""
    for entry in node.attribute:
        for graph in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            yield from (entry.name for entry in (*graph.input, *graph.output, *graph.initializer))
            for inner in graph.node:
                yield from (*inner.input, *inner.output)
                yield from names_inside(inner)


def fuse(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a prepared network (see `graph.prepare`) with everything merged that can be.

    Constants are taken for constants: one that the file also lists as an input is an input no more.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(copy_of(model), data_prop=True)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    drop_neutral(model)
    fuse_hard_swish(model)
    while fold_scale_shift_back(model) + fold_scale_shift_forward(model):
        pass
    drop_unused(model)
    return with_shapes(model)


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the types and shapes of all tensors there are, and of no others."""
    import onnx

    there = {name for node in model.graph.node for name in node.output}
    kept = [entry for entry in model.graph.value_info if entry.name in there]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def drop_neutral(model: onnx.ModelProto) -> None:
    """Take out Identity and Dropout, multiplications and divisions by 1, additions and subtractions of 0."""
    view, renamed, kept = View(model), {}, []
    for node in view.nodes:
        source = _neutral_source(view, node)
        if source and node.output[0] not in view.outputs and node.output[0] not in view.branched:
            renamed[node.output[0]] = renamed.get(source, source)
        else:
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    set_nodes(model, kept)


def _neutral_source(view: View, node: onnx.NodeProto) -> str | None:
    if node.domain not in _OWN_DOMAIN:
        return None
    if node.op_type == "Identity":
        return node.input[0]
    if node.op_type == "Dropout":
        masked = any(name in view.readers or name in view.outputs for name in node.output[1:])
        training = len(node.input) > 2 and node.input[2] and view.scalar(node.input[2]) != 0
        return None if masked or training else node.input[0]
    neutral = {"Mul": 1, "Div": 1, "Add": 0, "Sub": 0}.get(node.op_type)
    if neutral is None or (parts := view.split(node)) is None:
        return None
    if node.op_type in ("Div", "Sub") and parts[0] != node.input[0]:
        return None
    return parts[0] if (parts[1] == neutral).all() and view.keeps_shape(*parts) else None


# -- hard swish ------------------------------------------------------------------------------------------------------


def fuse_hard_swish(model: onnx.ModelProto) -> int:
    """Recognize ``x * clip(x + 3, 0, 6) / 6``, however it is written, and write it as HardSwish.

    The factors may come in any order, the sixth as a Div, as a Mul or within the Clip, the Clip as a HardSigmoid.
    Returns how many there were.
    """
    from onnx import helper

    view, replaced, gone = View(model), {}, set()
    names = {node.name for node in view.nodes}
    for node in view.nodes:
        found = _hard_swish(view, node)
        inner = {id(part) for part in found[1]} if found else set()
        if found and not gone & inner:
            name = claim(f"{node.name}.fused", names)
            replaced[id(node)] = helper.make_node("HardSwish", [found[0]], list(node.output), name=name)
            gone |= inner - {id(node)}
    set_nodes(model, [replaced.get(id(node), node) for node in view.nodes if id(node) not in gone])
    return len(replaced)


def _hard_swish(view: View, last: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]] | None:
    """Source and nodes of a hard swish that ends in `last`."""
    product = _product(view, last)
    if product is None or len(product[1]) != 2:
        return None
    factor, tensors, nodes = product
    for source, gate in (tensors, tensors[::-1]):
        clipped = _clipped(view, source, gate)
        if clipped is None:
            continue
        slope, shift, high, inner = clipped
        # x * clip(slope * x + shift, 0, high) * factor, made to a clip at 6 by the factor 6 / high
        pairs = (slope * 6, high), (shift * 2, high), (factor * high, 1)
        if all(math.isclose(*pair, rel_tol=1e-6) for pair in pairs):
            return source, nodes + inner
    return None


def _product(view: View, last: onnx.NodeProto) -> tuple[float, list[str], list[onnx.NodeProto]] | None:
    """What `last` multiplies, taken apart as far as nothing else reads the parts: constant, tensors, nodes."""
    factor, tensors, nodes, todo = 1.0, [], [], [last]
    while todo:
        node = todo.pop()
        nodes.append(node)
        parts = view.arithmetic(node)
        if len(nodes) > _FEW or node.op_type not in ("Mul", "Div") or node.domain not in _OWN_DOMAIN:
            return None
        if parts is None and (node.op_type == "Div" or any(name in view.constants for name in node.input)):
            return None
        if parts is not None and (parts[1].size != 1 or not view.keeps_shape(*parts)):
            return None
        if parts is not None:
            factor *= float(parts[1].ravel()[0]) ** (1 if node.op_type == "Mul" else -1)
        for name in node.input if parts is None else parts[:1]:
            maker = view.makers.get(name)
            inner = maker is not None and view.only_reader(name) is not None
            if inner and maker.op_type in ("Mul", "Div"):
                todo.append(maker)
            else:
                tensors.append(name)
    return factor, tensors, nodes


def _clipped(view: View, source: str, gate: str) -> tuple[float, float, float, list[onnx.NodeProto]] | None:
    """`gate` as ``clip(slope * source + shift, 0, high)``: slope, shift, high and the nodes."""
    maker = view.makers.get(gate)
    if maker is None or view.only_reader(gate) is None or maker.domain not in _OWN_DOMAIN:
        return None
    if maker.op_type == "HardSigmoid" and maker.input[0] == source:
        return attribute(maker, "alpha", 0.2), attribute(maker, "beta", 0.5), 1.0, [maker]
    if maker.op_type != "Clip" or len(maker.input) < 3 or not all(view.is_float(name) for name in maker.input[1:]):
        return None
    low, high = (view.scalar(name) for name in maker.input[1:3])
    line = _line(view, source, maker.input[0])
    return None if low != 0 or not high > 0 or line is None else (*line[:2], high, [maker, *line[2]])


def _line(view: View, source: str, name: str) -> tuple[float, float, list[onnx.NodeProto]] | None:
    """`name` as ``slope * source + shift``: slope, shift and the nodes; None if it is something else."""
    slope, shift, nodes = 1.0, 0.0, []
    while name != source:
        node = view.makers.get(name)
        parts = view.arithmetic(node) if node is not None else None
        if parts is None or parts[1].size != 1 or len(nodes) == _FEW or view.only_reader(name) is None:
            return None
        if not view.keeps_shape(*parts):
            return None
        value = float(parts[1].ravel()[0])
        if node.op_type in ("Mul", "Div"):
            slope *= value if node.op_type == "Mul" else 1 / value
        else:
            shift += slope * (value if node.op_type == "Add" else -value)
        nodes.append(node)
        name = parts[0]
    return slope, shift, nodes


# -- scales and shifts -----------------------------------------------------------------------------------------------


def fold_scale_shift_back(model: onnx.ModelProto) -> int:
    """Multiply constants that scale or shift the result of a convolution or a product into its weights and bias.

    Returns how many were folded.
    """
    view, gone = View(model), set()
    for node in view.nodes:
        parts = view.arithmetic(node)
        before = view.makers.get(parts[0]) if parts is not None else None
        if before is None or view.only_reader(parts[0]) is None or not foldable(view, before):
            continue
        constant = per_channel(view, parts[1], before)
        if constant is None or (before.op_type == "MatMul" and node.op_type in ("Add", "Sub")):
            continue
        scale, shift = _as_scale_shift(node.op_type, constant)
        if rescale(view, before, scale, shift):
            before.output[0] = node.output[0]
            view.makers[node.output[0]] = before
            gone.add(id(node))
    set_nodes(model, [node for node in view.nodes if id(node) not in gone])
    return len(gone)


def fold_scale_shift_forward(model: onnx.ModelProto) -> int:
    """Multiply a scalar that scales or shifts what only one convolution or product reads into that one's weights.

    A shift is folded only where no zero padding stands between: padding adds zeros, not shifts.  Returns how many were
    folded.
    """
    view, gone = View(model), set()
    for node in reversed(view.nodes):
        parts = view.arithmetic(node)
        if parts is None or parts[1].size != 1 or not view.keeps_shape(*parts):
            continue
        after = view.only_reader(node.output[0])
        if after is None or not foldable(view, after) or after.input[0] != node.output[0]:
            continue
        scale, shift = _as_scale_shift(node.op_type, parts[1].astype(np.float64).ravel())
        if shift is not None:
            if after.op_type not in ("Conv", "Gemm") or pads(after):
                continue
            weight = view.value(after.input[1]).astype(np.float64)
            axes = tuple(axis for axis in range(weight.ndim) if axis != channel_axis(after, weight.ndim))
            shift = shift * weight.sum(axis=axes)
        if rescale(view, after, scale, shift, bias_too=False):
            after.input[0] = parts[0]
            view.readers[parts[0]] = [after if reader is node else reader for reader in view.readers[parts[0]]]
            gone.add(id(node))
    set_nodes(model, [node for node in view.nodes if id(node) not in gone])
    return len(gone)


def foldable(view: View, node: onnx.NodeProto) -> bool:
    """Whether a node's weights are float32 constants of its own."""
    if node.op_type not in _LINEAR or node.domain not in _OWN_DOMAIN or len(node.input) < 2:
        return False
    # A transposed convolution in groups keeps its output channels on two axes; a Gemm may scale its operands.
    if node.op_type == "ConvTranspose" and attribute(node, "group", 1) != 1:
        return False
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
        return False
    own = all(view.is_float(name) and view.only_reader(name) is not None for name in node.input[1:] if name)
    return own and len(view.constants[node.input[1]].dims) >= 2


def per_channel(view: View, constant: np.ndarray, before: onnx.NodeProto) -> np.ndarray | None:
    """A constant as one number per output channel of `before`; None if it varies along another axis or enlarges."""
    weight = view.constants[before.input[1]].dims
    channels, rank = weight[channel_axis(before, len(weight))], len(weight)
    if before.op_type == "MatMul":
        # The rank of the result is that of the larger operand; a vector on the left loses an axis instead.
        rank = len(view.shapes.get(before.output[0], view.shapes.get(before.input[0], ())))
    position = rank - 1 if before.op_type == "MatMul" else 1
    if constant.ndim > max(rank, 1):
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    sizes = {size for axis, size in enumerate(shape) if axis != position}
    if sizes - {1} or (shape and shape[position] not in (1, channels)):
        return None
    return np.broadcast_to(constant.astype(np.float64).ravel(), channels)


def _as_scale_shift(op: str, constant: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    return {
        "Mul": lambda: (constant, None),
        "Div": lambda: (1 / constant, None),
        "Add": lambda: (None, constant),
        "Sub": lambda: (None, -constant),
    }[op]()


def rescale(
    view: View, node: onnx.NodeProto, scale: np.ndarray | None, shift: np.ndarray | None, *, bias_too: bool = True
) -> bool:
    """Scale the weights (and the bias) of a node, then shift its bias; False, and nothing done, if float32 is left."""
    old = view.value(node.input[1]).astype(np.float64)
    has_bias = len(node.input) > 2 and bool(node.input[2])
    weight, bias = old, view.value(node.input[2]).astype(np.float64) if has_bias else None
    if scale is not None:
        spread = [1] * weight.ndim
        spread[channel_axis(node, weight.ndim)] = -1
        weight = weight * scale.reshape(spread)
        bias = bias * scale if bias is not None and bias_too else bias
    if shift is not None:
        bias = shift if bias is None else bias + shift
    if not _fits(weight, old, channel_axis(node, weight.ndim)) or (
        bias is not None and np.abs(bias).max(initial=0) > _LARGE
    ):
        return False
    put(view, node.input[1], weight)
    if has_bias:
        put(view, node.input[2], bias)
    elif bias is not None:
        del node.input[2:]
        node.input.append(view.fresh(f"{node.input[1]}.bias"))
        view.readers[node.input[2]] = [node]
        _add_constant(view, node.input[2], bias)
    return True


def _fits(new: np.ndarray, old: np.ndarray, axis: int) -> bool:
    """Whether the largest weight of every channel stays where float32 is accurate, if it was there before."""
    others = tuple(other for other in range(new.ndim) if other != axis)
    new, old = np.abs(new).max(axis=others, initial=0), np.abs(old).max(axis=others, initial=0)
    return bool(np.all((new <= _LARGE) & ((new >= _SMALL) | (new == 0) | (old < _SMALL))))


def put(view: View, name: str, values: np.ndarray) -> None:
    """Give a constant of float32 other values, in place."""
    from onnx import numpy_helper

    view.constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))


def _add_constant(view: View, name: str, values: np.ndarray) -> None:
    from onnx import numpy_helper

    initializers = view.model.graph.initializer
    initializers.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
    view.constants[name] = initializers[-1]


def pads(node: onnx.NodeProto) -> bool:
    """Whether a convolution or pool adds borders to what it reads."""
    if attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return True
    return any(attribute(node, "pads", None) or ())


def count(model: onnx.ModelProto) -> Mapping[str, int]:
    """How many nodes there are of each type."""
    return Counter(node.op_type for node in model.graph.node)
