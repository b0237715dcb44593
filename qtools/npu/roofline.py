"""How long a network takes on the NPU: its layers counted, and a time model with nine rates of the chip.

A run does two things side by side: it streams weights (and activations too large for the chip) from DRAM, and it works
on what is there, one operator after another.  With ``work`` and ``memory`` the seconds of either alone,

    seconds = fixed + (work^p + memory^p)^(1/p).

Work adds up, over the operators, padded multiply-accumulates / matrix rate, depthwise ones / their rate, the bytes that
all other operators move / vector rate, and a constant for each; memory is bytes / bandwidth.  It is the roofline of
Williams, Waterman and Patterson (CACM 52(4), 2009) with p in the place of their maximum, over the whole run because
weights are fetched ahead of the operator that needs them.  ``data/recipes/roofline_fit.py`` fits and tests the rates.
"""

from __future__ import annotations

import csv
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from qtools.npu.soc import Rates, table

if TYPE_CHECKING:
    import onnx
    import torch

Kind = Literal["matrix", "depthwise", "vector", "move", "concat"]
LAYER_TABLE = Path(__file__).resolve().parents[2] / "data/model_layers.csv"
_OPERATORS = {
    "activation": "relu relu6 hardtanh clip clamp leakyrelu prelu elu selu celu silu swish mish hardswish hardsigmoid"
    " sigmoid tanh gelu softplus",
    "free": "reshape view flatten unflatten squeeze unsqueeze select unbind identity dropout detach alias expand t"
    " unsafeview contiguous quantizelinear dequantizelinear",
    "move": "transpose permute slice split splitwithsizes chunk gather gathernd gatherelements scatternd"
    " scatterelements pad constantpadnd tile depthtospace spacetodepth pixelshuffle roll flip repeat clone copy tocopy"
    " stack embedding indexselect getitem narrow swapaxes movedim",
    "vector": "add sub rsub mul div pow sqrt rsqrt reciprocal exp log erf abs neg floor ceil round sign max min maximum"
    " minimum sum mean prod l2 argmax argmin topk softmax logsoftmax where equal greater less greaterorequal"
    " lessorequal and or not cast to sin cos cumsum maskedfill norm batchnorm layernorm groupnorm instancenorm rmsnorm"
    " lrn averagepool avgpool maxpool resize upsample upsamplebilinear upsamplenearest interpolate",
    "matrix": "conv convtranspose convolution linear gemm matmul mm bmm addmm baddbmm",
    "concat": "cat concat",
}
_GROUP = {name: group for group, names in _OPERATORS.items() for name in names.split()}
_HEAD_DIM = 64  # of attention in a layer table, which does not tell


class Precision(NamedTuple):
    """Bits of weights and of activations; floating point has no scales."""

    weight_bits: int
    act_bits: int
    floating: bool = False


PRECISIONS = {
    "float": Precision(16, 16, True), "w8a8": Precision(8, 8), "w8a16": Precision(8, 16), "w4a8": Precision(4, 8),
    "w4a16": Precision(4, 16), "float32": Precision(32, 32, True),
}  # fmt: skip
"""By name; 'float' is fp16, as the NPU runs float networks, 'float32' is for CPUs."""


@dataclass(frozen=True)
class Layer:
    """One operator of the compiled network, with all that was folded into it.

    `weights`, `inputs` and `outputs` count elements, biases among the weights; `rows`, `depth` and `channels` are those
    of the matrix product (pixels, input channels a group, output channels), 0 where not known; `nodes` is into how many
    operators it is split, `weight_bits` differs from the precision's, `cache` are bytes of DRAM beside the weights.
    """

    name: str
    op: str
    kind: Kind
    macs: int = 0
    weights: int = 0
    inputs: int = 0
    outputs: int = 0
    rows: int = 0
    depth: int = 0
    channels: int = 0
    nodes: int = 1
    weight_bits: int | None = None
    cache: int = 0

    @property
    def operations(self) -> int:
        """Twice the multiply-accumulates; elements where there are none."""
        return 2 * self.macs or max(self.inputs, self.outputs)


@dataclass(frozen=True)
class Network:
    """Layers in order, and operators that are not known here (counted as element-wise work on what they touch)."""

    layers: tuple[Layer, ...]
    unknown: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)


class Traffic(NamedTuple):
    """Bytes that a layer reads and writes, wherever they lie; a key-value cache counts as weights."""

    weights: float
    activations: float
    scales: float


def traffic(layer: Layer, precision: Precision) -> Traffic:
    """Bytes of weights, of activations read and written, and of one float32 scale for each output channel."""
    bits = layer.weight_bits or precision.weight_bits
    scales = 4.0 * layer.channels if layer.weights and not precision.floating else 0.0
    moved = (layer.inputs + layer.outputs) * precision.act_bits / 8
    return Traffic(layer.weights * bits / 8 + layer.cache, moved, scales)


def intensity(layer: Layer, precision: Precision) -> float:
    """Operations a byte, as if every byte came from DRAM: to be compared with `ridge`."""
    return layer.operations / max(sum(traffic(layer, precision)), 1e-9)


def ridge(rates: Rates) -> float:
    """Operations a byte above which the matrix unit, and below which DRAM is the limit."""
    return 2 * rates.matrix / rates.bandwidth


class Work(NamedTuple):
    """What a layer costs, in units of the rates: padded MACs, depthwise MACs x bytes, bytes, operators, DRAM bytes."""

    matrix: float
    depthwise: float
    vector: float
    nodes: float
    dram: float


def work(layer: Layer, precision: Precision, rates: Rates) -> Work:
    """A layer's cost; of the rates only the sizes count.  Activations that together fit into the VTCM stay there."""
    moved, width = traffic(layer, precision), precision.act_bits / 8
    spilled = moved.activations if moved.activations / layer.nodes > rates.vtcm else 0.0
    dram = moved.weights + moved.scales + spilled
    if layer.kind == "matrix":
        return Work(layer.macs * _padding(layer, width, rates), 0.0, 0.0, layer.nodes, dram)
    if layer.kind == "depthwise":
        return Work(0.0, layer.macs * width, 0.0, layer.nodes, dram)
    if layer.kind == "concat" and precision.floating:  # only addresses; integers are brought to one scale
        return Work(0.0, 0.0, 0.0, 0.0, dram)
    return Work(0.0, 0.0, moved.activations, layer.nodes, dram)


def _padding(layer: Layer, width: float, rates: Rates) -> float:
    """How many times as many multiply-accumulates whole tiles hold."""
    rows = rates.tile / (rates.channels * width) if rates.tile else 1
    sizes = ((layer.rows, rows), (layer.depth, rates.channels), (layer.channels, rates.channels))
    return math.prod(math.ceil(size / step) * step / size for size, step in sizes if size)


def seconds(cost: np.ndarray, rates: Rates) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of work and of memory, each alone, for `Work` as an array (..., 5)."""
    each = np.array([1 / rates.matrix, 1 / rates.depthwise, 1 / rates.vector, rates.node])
    return cost[..., :4] @ each, cost[..., 4] / rates.bandwidth


def overlapped(busy: np.ndarray | float, memory: np.ndarray | float, p: float) -> Any:
    """(busy^p + memory^p)^(1/p), without underflow."""
    larger = np.maximum(np.maximum(busy, memory), 1e-30)
    return larger * ((busy / larger) ** p + (memory / larger) ** p) ** (1 / p)


class LayerTime(NamedTuple):
    """A layer's part of a run, and the largest of its compute, memory and operator overhead, each taken alone."""

    layer: Layer
    seconds: float
    bound: Literal["compute", "memory", "overhead"]


@dataclass(frozen=True)
class Prediction:
    """A predicted run: its seconds, those of work and of memory alone, the part of each layer (all but `fixed`)."""

    seconds: float
    busy: float
    memory: float
    layers: tuple[LayerTime, ...]


def predict(network: Network | Sequence[Layer], precision: Precision, rates: Rates) -> Prediction:
    """The time model; a layer's part is how fast the total grows with it (by Euler's theorem the parts add up).

    Raises ValueError if there are no layers.
    """
    layers = network.layers if isinstance(network, Network) else tuple(network)
    if not layers:
        raise ValueError("the network has no layers that take time")
    cost = np.array([work(layer, precision, rates) for layer in layers])
    busy, memory = seconds(cost, rates)
    total = float(overlapped(busy.sum(), memory.sum(), rates.overlap))
    power = rates.overlap - 1
    parts = busy * (busy.sum() / total) ** power + memory * (memory.sum() / total) ** power
    overhead = cost[:, 3] * rates.node
    largest = np.argmax([busy - overhead, memory, overhead], axis=0)
    bounds = np.array(["compute", "memory", "overhead"])[largest].tolist()
    times = tuple(map(LayerTime, layers, parts.tolist(), bounds))
    return Prediction(rates.fixed + total, float(busy.sum()), float(memory.sum()), times)


def article_seconds(network: Network, operations: float | None = None, bandwidth: float | None = None) -> float:
    """The article's formula, read so: per convolution or linear layer, one byte an element, summed,

    max(2 x MACs / operations, (weights + inputs + outputs) / bandwidth); 36e12 and 50e9 by default.
    """
    given = table()["article"]
    operations, bandwidth = operations or given.si("int8"), bandwidth or given.si("bandwidth")
    return sum(
        max(2 * layer.macs / operations, (layer.weights + layer.inputs + layer.outputs) / bandwidth)
        for layer in network.layers
        if layer.macs and layer.weights
    )


class _Builder:
    """Collects layers; what the compiler folds into the layer before becomes part of that."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.unknown: dict[str, None] = {}

    def add(self, layer: Layer, source: int | None, absorbed: bool = False) -> int | None:
        """Index of the layer that holds the result: a new one, or `source`, which made the input.

        `absorbed`: a constant for each channel, or a gate x * f(x); these go where an activation goes.
        """
        op, before = plain(layer.op), None if source is None else self.layers[source]
        group = "activation" if absorbed else _GROUP.get(op)
        if group == "free":
            return source
        if before is not None and before.outputs == layer.outputs:
            product = before.kind in ("matrix", "depthwise")
            takes = product or plain(before.op) in ("add", "batchnorm")
            if (product and op == "batchnorm") or (takes and group == "activation"):
                return source
        if group is None and not layer.macs:
            self.unknown[layer.op] = None
        self.layers.append(layer)
        return len(self.layers) - 1


def plain(op: str) -> str:
    """One spelling of a name: ``BatchNormalization``, ``batch_norm`` and ``native_batch_norm`` are ``batchnorm``."""
    op = op.lower().replace("_", "").replace("normalization", "norm").replace("withindices", "")
    return re.sub(r"^(native|adaptive|global|reduce)|[123]d$", "", op)


def simple_layer(name: str, op: str, read: int, written: int, weights: int = 0, nodes: int = 1) -> Layer:
    """A layer without multiply-accumulates."""
    group = _GROUP.get(plain(op))
    kind: Kind = group if group in ("move", "concat") else "vector"
    return Layer(name, op, kind, weights=weights, inputs=read, outputs=written, nodes=nodes)


def from_table(name: str, path: Path | str = LAYER_TABLE) -> Network:
    """A network of a table like ``data/model_layers.csv``; ValueError if it has none of this name, as `from_rows`."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row.get("model") for row in rows))
    if name not in names:
        raise ValueError(f"{path} has no network {name!r}: it has {', '.join(map(str, names)) or 'none'}")
    return from_rows([row for row in rows if row["model"] == name])


def from_rows(rows: Sequence[Mapping[str, Any]]) -> Network:
    """Layers of rows with op, kernel, groups, macs, weight_elems, input_elems, output_elems, in order of execution.

    Each is taken to read what the one before it wrote.  Raises ValueError if a number is missing or not a count.
    """
    builder = _Builder()
    keys = ("groups", "macs", "weight_elems", "input_elems", "output_elems")
    for index, row in enumerate(rows):
        try:
            groups, macs, weights, read, written = numbers = [int(row[key] or 0) for key in keys]
            kernel = math.prod(int(size) for size in row["kernel"].split("x")) if row["kernel"] else 1
        except (KeyError, ValueError, TypeError):
            raise ValueError(f"layer {index} must have a kernel and whole numbers as {', '.join(keys)}") from None
        if min(numbers) < 0 or kernel < 1:
            raise ValueError(f"layer {index} has a negative number")
        layer = replace(simple_layer(f"{index}", row["op"], read, written, weights), macs=macs)
        if "dot_product" in row["op"]:
            builder.layers += _attention(layer)
            continue
        if macs:
            normed = plain(rows[index + 1]["op"]) == "batchnorm" if index + 1 < len(rows) else False
            layer = _shaped(layer, kernel, max(groups, 1), biased=not normed)
        builder.add(layer, len(builder.layers) - 1 if builder.layers else None)
    return Network(tuple(builder.layers), tuple(builder.unknown))


def _shaped(layer: Layer, kernel: int, groups: int, biased: bool) -> Layer:
    """With rows, depth and channels found from the counts, if those fit together."""
    products = layer.macs // max(layer.outputs, 1)
    for bias in (biased, not biased):
        channels, rest = divmod(layer.weights, products + bias)
        if channels and not rest and layer.outputs % channels == 0 and channels % groups == 0:
            kind = "depthwise" if groups > 1 and products == kernel else "matrix"
            rows = layer.outputs // channels
            return replace(layer, kind=kind, rows=rows, depth=products // kernel, channels=channels)
    return replace(layer, kind="matrix")


def _attention(layer: Layer) -> list[Layer]:
    """Scores, scale or mask, softmax and mixture, of one attention operator."""
    scores, part = layer.macs // (2 * _HEAD_DIM), layer.inputs // 3
    first = replace(layer, op="attention", kind="matrix", macs=layer.macs // 2, inputs=2 * part, outputs=scores)
    between = [simple_layer(layer.name, op, scores, scores) for op in ("mul", "softmax")]
    return [first, *between, replace(first, inputs=scores + part, outputs=layer.outputs)]


def from_onnx(model: onnx.ModelProto) -> Network:
    """Layers of an ONNX network with fixed shapes, float or with QuantizeLinear and DequantizeLinear nodes.

    Nodes that depend on constants and shapes only are left out.  Raises ValueError if the shape of a tensor is unknown.
    """
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # protobuf and the shape inference raise types of their own
        raise ValueError(f"the shapes of this network cannot be inferred: {str(error).splitlines()[0]}") from None
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = set(shapes)
    for entry in (*graph.input, *graph.value_info, *graph.output):
        sizes = tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        if entry.type.tensor_type.HasField("shape") and min(sizes, default=1) > 0:
            shapes.setdefault(entry.name, sizes)
    builder, sources = _Builder(), {}
    for index, node in enumerate(graph.node):
        inputs = [name for name in node.input if name]
        if node.op_type in ("Constant", "Shape", "Size") or (inputs and constants.issuperset(inputs)):
            constants.update(node.output)
            continue
        computed = [name for name in inputs if name not in constants]
        made = [sources.get(name) for name in computed]
        source = made[0] if made else None
        if _GROUP.get(plain(node.op_type)) != "free":
            layer = _onnx_layer(node, index, shapes, computed)
            channels = 0 if source is None else builder.layers[source].channels
            gate = node.op_type == "Mul" and len(made) == 2 and made[0] == made[1]
            constant = node.op_type in ("Add", "Sub", "Mul", "Div") and 0 < layer.weights <= channels
            source = builder.add(layer, source, absorbed=gate or constant)
        sources.update(dict.fromkeys(node.output, source))
    return Network(tuple(builder.layers), tuple(builder.unknown))


def _onnx_layer(node: onnx.NodeProto, index: int, shapes: Mapping[str, tuple[int, ...]], computed: list[str]) -> Layer:
    from onnx import helper

    names = [name for name in node.input if name] + [node.output[0]]
    if unknown := [name for name in names if name not in shapes]:
        raise ValueError(f"the size of the tensor {unknown[0]!r} is not known: the inputs must have fixed sizes")
    read = sum(math.prod(shapes[name]) for name in computed)
    fixed = sum(math.prod(shapes[name]) for name in node.input if name and name not in computed)
    written = sum(math.prod(shapes[name]) for name in node.output if name in shapes)
    op, result = node.op_type, shapes[node.output[0]]
    layer = simple_layer(node.name or f"{op}.{index}", op, read, written, fixed)
    if layer.kind == "move":  # its constants are indices, or a table of which it reads what it writes
        return replace(layer, weights=0, inputs=read if node.input[0] in computed else written)
    if _GROUP.get(plain(op)) != "matrix" or op == "Attention":
        return layer
    left, right = shapes[node.input[0]], shapes[node.input[1]]
    kind: Kind = "matrix"
    if op in ("Conv", "ConvTranspose"):
        group = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == "group"), 1)
        grid, depth = (result, right[1]) if op == "Conv" else (left, right[0] // group)
        kind = "depthwise" if group > 1 and depth == 1 else kind
        macs, rows, channels = math.prod(grid) * math.prod(right[1:]), math.prod(grid) // grid[1], result[1]
    else:
        depth = math.prod(left) // result[0] if op == "Gemm" else left[-1]
        macs, channels = math.prod(result) * depth, right[-1] if op == "MatMul" and len(right) > 1 else result[-1]
        # In a batch of products each is padded.
        rows = left[-2] if len(right) > 2 and len(left) > 1 else math.prod(result) // channels
    return replace(layer, kind=kind, macs=macs, rows=rows, depth=depth, channels=channels)


def from_torch(module: torch.nn.Module, *inputs: torch.Tensor) -> Network:
    """Layers of a torch module, by running it once on `inputs` and watching its operators (ATen's)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    owned = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    rows: list[dict[str, Any]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            flat = [one for arg in args for one in (arg if isinstance(arg, list | tuple) else [arg])]
            read: dict[bool, int] = {False: 0, True: 0}  # elements of activations, and of what the module owns
            for one in flat:
                if isinstance(one, torch.Tensor):
                    read[one.untyped_storage().data_ptr() in owned] += one.numel()
            if read[False]:
                rows.append(_torch_row(func.overloadpacket.__name__.strip("_"), args, read, result))
            return result

    with torch.enable_grad(), Watch():  # without gradients torch takes fused operators that hide their parts
        module(*inputs)
    return from_rows(rows)


def _torch_row(op: str, args: Any, read: Mapping[bool, int], result: Any) -> dict[str, Any]:
    made = result if isinstance(result, list) else [result[0] if isinstance(result, tuple) else result]
    written = sum(one.numel() for one in made)
    row: dict[str, Any] = dict(op=op, kernel="", groups=1, macs=0)
    row |= dict(weight_elems=read[True], input_elems=read[False], output_elems=written)
    if op == "convolution":
        macs = (args[0].numel() if args[6] else written) * math.prod(args[1].shape[1:])  # args[6]: transposed
        row |= dict(kernel="x".join(map(str, args[1].shape[2:])), groups=args[8], macs=macs)
    elif _GROUP.get(plain(op)) == "matrix":
        row["macs"] = written * args[1 if op in ("mm", "bmm") else 2].shape[-2]
    elif "dot_product" in op:
        row["macs"] = 2 * args[0].numel() * args[1].shape[-2]
    return row


def run_seconds(model: onnx.ModelProto, threads: int = 1, runs: int = 5) -> float:
    """Seconds ONNX Runtime takes on this CPU for a network with fixed shapes and float inputs: the least of `runs`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {entry.name: rng.standard_normal(entry.shape).astype(np.float32) for entry in session.get_inputs()}
    # The clock of one thread stands still while other programs have the core.
    return _least(lambda: session.run(None, feeds), runs, time.thread_time if threads == 1 else time.perf_counter)


def _least(call: Callable[[], Any], runs: int, clock: Callable[[], float] = time.thread_time) -> float:
    times = []
    for _ in range(runs + 1):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times[1:])  # the first one warms up


def measure_cpu(threads: int = 1) -> Rates:
    """The rates of this computer's CPU for 'float32', from five small measurements with ONNX Runtime and NumPy."""
    from onnx import parser

    def probe(x: str, body: str, weight: str = "1") -> float:
        constant = f"s = Constant <value = int64[{weight.count(',') + 1}] {{{weight}}}> () w = ConstantOfShape (s)"
        text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{x}] x) => (float[{x}] y) {{ {constant} {body} }}'
        return run_seconds(parser.parse_model(text), threads, runs=20)

    big = np.ones(2**25)
    copy = np.empty_like(big)
    chain = " ".join(f"v{i + 1} = {'Neg' if i % 2 else 'Abs'} (v{i})" for i in range(100))
    square = probe("1, 96, 56, 56", "y = Conv <pads = [1, 1, 1, 1]> (x, w)", "96, 96, 3, 3")
    single = probe("1, 96, 56, 56", "y = Conv <group = 96, pads = [1, 1, 1, 1]> (x, w)", "96, 1, 3, 3")
    gemm, macs = probe("512, 1024", "y = MatMul (x, w)", "1024, 1024"), 96 * 56 * 56 * 9
    matrix, depthwise = max(512 * 1024**2 / gemm, 96 * macs / square), 4 * macs / single
    vector = 300_000 * 20 / probe("300000", "z = Neg (x) y = Mul (x, z)")
    bandwidth = 3 * big.nbytes / _least(lambda: np.copyto(copy, big), 3)  # a write reads its line before
    node = probe("32", f"v0 = Identity (x) {chain} y = Identity (v100)") / 100
    return Rates(matrix, depthwise, vector, bandwidth, node, 0.0, math.inf, math.inf, channels=8, tile=0)
