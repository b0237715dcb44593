"""Quantization parameters written into ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from qtools.affine import LPBQ, Grid, QParams, blocks_of, pack_int4

if TYPE_CHECKING:
    import onnx

Operator = Literal["Conv", "MatMul", "Gemm"]
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
    if grid.narrow_range:
        raise ValueError("ONNX's QuantizeLinear uses every code of its type: it has no narrow range")
    return _code_type(grid)


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
    constants, attributes = _scale_tensors("", qparams, shape, code_type)
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


def weight_nodes(
    name: str, codes: np.ndarray, encoding: QParams | LPBQ
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A constant tensor in integers: the nodes that make the float tensor `name` of it, and what they read.

    One DequantizeLinear; for LPBQ a second one before it, which makes the block scales.

    Parameters
    ----------
    name : str
        Of the float tensor; the initializers are named after it.
    codes : integer ndarray
    encoding : QParams or LPBQ

    Raises
    ------
    ValueError
        If ONNX cannot write the encoding (see `quantizer_model`).
    """
    from onnx import helper

    qparams = encoding.qparams if isinstance(encoding, LPBQ) else encoding
    code_type = _code_type(qparams.grid)  # a narrow range is fine where nothing has to be quantized
    constants, attributes = _scale_tensors(f"{name}.", qparams, codes.shape, code_type)
    nodes = []
    if isinstance(encoding, LPBQ):
        constants[0:1], made = _lpbq_scale(name, encoding)
        nodes.append(made)
    raw = (pack_int4(codes) if qparams.grid.bits == 4 else codes.astype(codes.dtype.newbyteorder("<"))).tobytes()
    constants.append(helper.make_tensor(f"{name}.codes", code_type, codes.shape, raw, raw=True))
    inputs = [f"{name}.{part}" for part in ("codes", "scale", "zero_point")]
    nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dequantize", **attributes))
    return nodes, constants


def operator_model(
    op: Operator,
    codes: np.ndarray,
    encoding: QParams | LPBQ,
    input_shape: tuple[int, ...],
    *,
    activations: tuple[QParams, QParams] | None = None,
    bias: np.ndarray | None = None,
) -> onnx.ModelProto:
    """A network of one operator on constant quantized weights: input ``x``, output ``y``.

    Parameters
    ----------
    op : {'Conv', 'MatMul', 'Gemm'}
        A Gemm has its weights transposed: a row for each output.
    codes : integer ndarray
        Weights in the operator's own layout, quantized to `encoding`.
    encoding : QParams or LPBQ
    input_shape : tuple of int
    activations : pair of per-tensor QParams, optional
        Of input and output, which are codes then; without them both are float32.
    bias : ndarray of float32, optional

    Raises
    ------
    ValueError
        If ONNX cannot write an encoding (see `quantizer_model`), or there is no such operator.
    """
    from onnx import TensorProto, helper, numpy_helper

    if op not in get_args(Operator) or (op == "MatMul" and bias is not None):
        raise ValueError(f"op is one of {', '.join(get_args(Operator))}, and a MatMul has no bias; got {op!r}")
    nodes, constants = weight_nodes("w", codes, encoding)
    operands, out, kinds = ["x", "w"], "y", [TensorProto.FLOAT] * 2
    if activations:
        operands[0], out, kinds = "x_float", "y_float", [onnx_type(qparams.grid) for qparams in activations]
        for name, kind, qparams in zip("xy", kinds, activations):
            constants += _scale_tensors(f"{name}.", qparams, (), kind)[0]
        nodes.append(helper.make_node("DequantizeLinear", ["x", "x.scale", "x.zero_point"], ["x_float"], name="x.dq"))
    if bias is not None:
        constants.append(numpy_helper.from_array(bias, "b"))
        operands.append("b")
    nodes.append(helper.make_node(op, operands, [out], name="op", **({"transB": 1} if op == "Gemm" else {})))
    if activations:
        nodes.append(helper.make_node("QuantizeLinear", [out, "y.scale", "y.zero_point"], ["y"], name="y.q"))
    entry = helper.make_tensor_value_info("x", kinds[0], input_shape)
    result = helper.make_tensor_value_info("y", kinds[1], [None] * len(input_shape))
    graph = helper.make_graph(nodes, "operator", [entry], [result], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=10)


def _code_type(grid: Grid) -> int:
    from onnx import TensorProto

    if grid.bits not in (4, 8, 16):
        raise ValueError(f"ONNX has codes of 4, 8 and 16 bits, not of {grid.bits}")
    return TensorProto.DataType.Value(f"{'INT' if grid.signed else 'UINT'}{grid.bits}")


def _lpbq_scale(name: str, encoding: LPBQ) -> tuple[list[onnx.TensorProto], onnx.NodeProto]:
    from onnx import helper, numpy_helper

    axis = 0 if encoding.channel_scale.shape[0] == encoding.channel_scale.size else 1
    parts = {
        "block_scale": np.asarray(encoding.block_scale, np.uint8),
        "channel_scale": np.ravel(encoding.channel_scale).astype(np.float32),
        "block_zero": np.zeros(encoding.channel_scale.size, np.uint8),
    }
    constants = [numpy_helper.from_array(part, f"{name}.{key}") for key, part in parts.items()]
    inputs = [constant.name for constant in constants]
    return constants, helper.make_node(
        "DequantizeLinear", inputs, [f"{name}.scale"], name=f"{name}.dequantize_scale", axis=axis
    )


def _scale_tensors(
    prefix: str, qparams: QParams, shape: tuple[int, ...], code_type: int
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
        helper.make_tensor(f"{prefix}scale", TensorProto.FLOAT, dims, np.ravel(qparams.scale).tolist()),
        helper.make_tensor(f"{prefix}zero_point", code_type, dims, np.ravel(qparams.zero_point).tolist()),
    ], attributes
