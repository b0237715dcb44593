"""Quantization parameters written into ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qtools.affine import Grid, QParams, blocks_of

if TYPE_CHECKING:
    import onnx

_OPSET = 21  # the first that has 16-bit and 4-bit codes and blocked scales


def onnx_type(grid: Grid) -> int:
    """The ONNX tensor type whose codes are exactly those of a grid.

    Raises
    ------
    ValueError
        If ONNX has none: it knows 4, 8 and 16 bits, and uses every code.

    Examples
    --------
    >>> import onnx
    >>> onnx_type(Grid(bits=4, signed=True)) == onnx.TensorProto.INT4
    True
    """
    from onnx import TensorProto

    if grid.bits not in (4, 8, 16):
        raise ValueError(f"ONNX has codes of 4, 8 and 16 bits, not of {grid.bits}")
    if grid.narrow_range:
        raise ValueError("ONNX's QuantizeLinear uses every code of its type: it has no narrow range")
    return TensorProto.DataType.Value(f"{'INT' if grid.signed else 'UINT'}{grid.bits}")


def quantizer_model(qparams: QParams, shape: tuple[int, ...]) -> onnx.ModelProto:
    """A network that does nothing but quantize its input ``x`` of `shape` to the codes ``q``.

    A Reshape to the same shape stands before the QuantizeLinear, because the HTP backend leaves a graph that is a
    single Quantize node to the CPU.  4-bit codes are widened to 8 bits at the end: NumPy has no type for them.

    Raises
    ------
    ValueError
        If the blocks of `qparams` are neither per tensor, nor per channel of one axis, nor blocks along one axis
        with single entries along all others; ONNX can write no others.
    """
    from onnx import TensorProto, helper

    code_type = onnx_type(qparams.grid)
    counts = tuple(count for count, _ in blocks_of(shape, qparams.grid.block_size))
    if tuple(qparams.scale.shape) != counts:
        raise ValueError(f"scale of shape {tuple(qparams.scale.shape)} does not fit a tensor of shape {shape}")
    constants, attributes = _scale_tensors(qparams, shape, code_type)
    constants.append(helper.make_tensor("shape", TensorProto.INT64, [len(shape)], shape))
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["same"], name="same"),
        helper.make_node("QuantizeLinear", ["same", "scale", "zero_point"], ["q"], name="quantize", **attributes),
    ]
    output, output_type = "q", code_type
    if qparams.grid.bits == 4:
        output, output_type = "wide", TensorProto.INT8 if qparams.grid.signed else TensorProto.UINT8
        nodes.append(helper.make_node("Cast", ["q"], [output], name="widen", to=output_type))
    graph = helper.make_graph(
        nodes,
        "quantizer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, output_type, shape)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


def _scale_tensors(
    qparams: QParams, shape: tuple[int, ...], code_type: int
) -> tuple[list[onnx.TensorProto], dict[str, int]]:
    """Scale and zero point as ONNX wants them (a scalar, one per channel, or one per block), and the attributes."""
    from onnx import TensorProto, helper

    counts = tuple(qparams.scale.shape)
    blocked = [axis for axis, size in enumerate(qparams.grid.block_size) if size not in (1, -1) and counts[axis] > 1]
    single = [axis for axis, count in enumerate(counts) if count > 1 and axis not in blocked]
    if not blocked and len(single) <= 1:
        dims = [counts[single[0]]] if single else []
        attributes = {"axis": single[0]} if single else {}
    elif len(blocked) == 1 and all(counts[axis] == shape[axis] for axis in range(len(shape)) if axis not in blocked):
        axis = blocked[0]
        dims, attributes = list(counts), {"axis": axis, "block_size": qparams.grid.block_size[axis]}
    else:
        raise ValueError(f"ONNX cannot write blocks of {qparams.grid.block_size} on a tensor of shape {shape}")
    return [
        helper.make_tensor("scale", TensorProto.FLOAT, dims, np.ravel(qparams.scale).tolist()),
        helper.make_tensor("zero_point", code_type, dims, np.ravel(qparams.zero_point).tolist()),
    ], attributes
