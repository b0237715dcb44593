"""What others offer for the same work, each called in the way its own documentation shows."""

from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from qtools.affine import Grid, QParams
from qtools.qdq import onnx_type

Peer = dict[str, Callable[[], object]]


def copy(target: np.ndarray, x: np.ndarray) -> None:
    """The floor: as many bytes read and written by the C library."""
    torch.from_numpy(target).copy_(torch.from_numpy(x))


def make(case: str, grid: Grid, x: np.ndarray, codes: np.ndarray, qparams: QParams) -> dict[str, Peer]:
    """Peers by name; each offers some of the four operations."""
    peers = {
        "NumPy, the article's lines": numpy_lines(grid, x, codes, qparams),
        "torch, eager": torch_lines(grid, x, codes, qparams),
        "torch.fake_quantize": torch_fake(grid, x, qparams),
        "ONNX Runtime": onnx_runtime(grid, x, codes, qparams),
        "torchao": torchao(grid, x, codes, qparams),
        "gguf (groups of 32)": gguf(grid, x),
    }
    return {name: peer for name, peer in peers.items() if peer}


def _blocks(grid: Grid, shape: tuple[int, ...]) -> tuple[int, ...]:
    return {(1, -1): shape, (-1, -1): (1, shape[0] * shape[1])}.get(grid.block_size, (-1, grid.block_size[1]))


def numpy_lines(grid: Grid, x: np.ndarray, codes: np.ndarray, qparams: QParams) -> Peer:
    """The article's two functions without their last line, over rows of blocks."""
    x, codes = x.reshape(_blocks(grid, x.shape)), codes.reshape(_blocks(grid, x.shape))
    scale, zero_point = (np.asarray(part).reshape(-1, 1) for part in (qparams.scale, qparams.zero_point))
    zero_point = zero_point.astype(np.float32)

    def choose() -> tuple[np.ndarray, np.ndarray]:
        if grid.symmetric:
            step = np.max(np.abs(x), axis=1, keepdims=True) / grid.qmax
            return step, np.float32(0)
        step = (np.max(x) - np.min(x)) / (grid.qmax - grid.qmin)
        return step, np.clip(np.round(grid.qmin - np.min(x) / step), grid.qmin, grid.qmax)

    def quantize(step: np.ndarray, zero: np.ndarray) -> np.ndarray:
        return np.clip(np.round(x / step + zero), grid.qmin, grid.qmax).astype(grid.dtype)

    return {
        "choose and quantize": lambda: quantize(*choose()),
        "quantize": lambda: quantize(scale, zero_point),
        "dequantize": lambda: (codes.astype(np.float32) - zero_point) * scale,
        "fake-quantize": lambda: (quantize(scale, zero_point).astype(np.float32) - zero_point) * scale,
    }


def torch_lines(grid: Grid, x: np.ndarray, codes: np.ndarray, qparams: QParams) -> Peer:
    """The same in torch, eager."""
    tensor, stored = (torch.from_numpy(part.reshape(_blocks(grid, x.shape))) for part in (x, codes))
    scale, zero_point = (
        torch.from_numpy(np.array(part).reshape(-1, 1)) for part in (qparams.scale, qparams.zero_point)
    )
    kind = getattr(torch, grid.dtype)

    def choose() -> tuple[torch.Tensor, torch.Tensor]:
        if grid.symmetric:
            return tensor.abs().amax(1, keepdim=True) / grid.qmax, torch.tensor(0)
        low, high = torch.aminmax(tensor)
        step = (high - low) / (grid.qmax - grid.qmin)
        return step, torch.clamp(torch.round(grid.qmin - low / step), grid.qmin, grid.qmax)

    def quantize(step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(tensor / step) + zero, grid.qmin, grid.qmax).to(kind)

    return {
        "choose and quantize": lambda: quantize(*choose()),
        "quantize": lambda: quantize(scale, zero_point),
        "dequantize": lambda: (stored.to(torch.float32) - zero_point) * scale,
        "fake-quantize": lambda: (quantize(scale, zero_point).to(torch.float32) - zero_point) * scale,
    }


def torch_fake(grid: Grid, x: np.ndarray, qparams: QParams) -> Peer:
    """torch's own operator, per tensor or per channel (blocks as channels)."""
    tensor = torch.from_numpy(x.reshape(_blocks(grid, x.shape)))
    limits = grid.qmin, grid.qmax
    if grid.block_size == (-1, -1):
        scale, zero_point = float(qparams.scale.item()), int(qparams.zero_point.item())
        return {"fake-quantize": lambda: torch.fake_quantize_per_tensor_affine(tensor, scale, zero_point, *limits)}
    scale, zero_point = (torch.from_numpy(np.array(p).ravel()) for p in (qparams.scale, qparams.zero_point))
    return {"fake-quantize": lambda: torch.fake_quantize_per_channel_affine(tensor, scale, zero_point, 0, *limits)}


def onnx_runtime(grid: Grid, x: np.ndarray, codes: np.ndarray, qparams: QParams) -> Peer:
    """QuantizeLinear and DequantizeLinear, values bound in place; DynamicQuantizeLinear where it fits."""
    kind = onnx_type(grid)
    packed = grid.bits == 4
    peer = {"quantize": _session(["QuantizeLinear"], TensorProto.FLOAT, kind, x, grid, qparams)}
    if not packed:  # its Python binding takes no 4-bit input
        peer["dequantize"] = _session(["DequantizeLinear"], kind, TensorProto.FLOAT, codes, grid, qparams)
    both = ["QuantizeLinear", "DequantizeLinear"]
    peer["fake-quantize"] = _session(both, TensorProto.FLOAT, TensorProto.FLOAT, x, grid, qparams)
    if grid == Grid(8, block_size=(-1, -1)):
        dynamic = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])
        peer["choose and quantize"] = _bound([dynamic], [], TensorProto.FLOAT, kind, x)
    return peer


def _session(
    operators: list[str], source: int, result: int, x: np.ndarray, grid: Grid, qparams: QParams
) -> Callable[[], object]:
    dims, attributes = list(qparams.scale.shape), {"axis": 1, "block_size": grid.block_size[1]}
    if grid.block_size == (-1, -1):
        dims, attributes = [], {}
    elif grid.block_size == (1, -1):
        dims, attributes = [qparams.scale.size], {"axis": 0}
    constants = [
        helper.make_tensor("scale", TensorProto.FLOAT, dims, np.ravel(qparams.scale).tolist()),
        helper.make_tensor("zero_point", onnx_type(grid), dims, np.ravel(qparams.zero_point).tolist()),
    ]
    names = ["x", *(f"t{i}" for i in range(len(operators) - 1)), "y"]
    nodes = [
        helper.make_node(operator, [a, "scale", "zero_point"], [b], **attributes)
        for operator, a, b in zip(operators, names, names[1:], strict=False)
    ]
    return _bound(nodes, constants, source, result, x)


def _bound(nodes: list, constants: list, source: int, result: int, x: np.ndarray) -> Callable[[], object]:
    graph = helper.make_graph(
        nodes,
        "peer",
        [helper.make_tensor_value_info("x", source, x.shape)],
        [helper.make_tensor_value_info("y", result, x.shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    # Otherwise a Quantize followed by its own Dequantize is folded away.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y")
    return partial(session.run_with_iobinding, binding)


def torchao(grid: Grid, x: np.ndarray, codes: np.ndarray, qparams: QParams) -> Peer:
    """torchao's quantization primitives."""
    try:
        from torchao.quantization import quant_primitives as primitives
    except ImportError:
        return {}
    tensor, stored = torch.from_numpy(x), torch.from_numpy(codes)
    block = tuple(n if b == -1 else b for n, b in zip(x.shape, grid.block_size, strict=True))
    mapping = primitives.MappingType.SYMMETRIC if grid.symmetric else primitives.MappingType.ASYMMETRIC
    kind, limits = getattr(torch, grid.dtype), {"quant_min": grid.qmin, "quant_max": grid.qmax}
    scale, zero_point = (torch.from_numpy(np.array(p)) for p in (qparams.scale, qparams.zero_point))

    def choose() -> tuple[torch.Tensor, torch.Tensor]:
        return primitives.choose_qparams_affine(
            tensor, mapping, block, kind, **limits, scale_dtype=torch.float32, zero_point_dtype=torch.int32
        )

    def quantize(step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return primitives.quantize_affine(tensor, block, step, zero, kind, **limits)

    def dequantize(values: torch.Tensor) -> torch.Tensor:
        return primitives.dequantize_affine(
            values, block, scale, zero_point, kind, **limits, output_dtype=torch.float32
        )

    return {
        "choose and quantize": lambda: quantize(*choose()),
        "quantize": lambda: quantize(scale, zero_point),
        "dequantize": lambda: dequantize(stored),
        "fake-quantize": lambda: dequantize(quantize(scale, zero_point)),
    }


def gguf(grid: Grid, x: np.ndarray) -> Peer:
    """llama.cpp's formats in the gguf package: symmetric, groups of 32, scales in float16."""
    try:
        import gguf as package
    except ImportError:
        return {}
    if not grid.symmetric:
        return {}
    kind = package.GGMLQuantizationType.Q8_0 if grid.bits == 8 else package.GGMLQuantizationType.Q4_0
    stored = package.quants.quantize(x, kind)
    return {
        "choose and quantize": lambda: package.quants.quantize(x, kind),
        "dequantize": lambda: package.quants.dequantize(stored, kind),
    }
