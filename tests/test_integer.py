"""Integer-only inference beside ONNX Runtime's integer kernels, the paper in Python's own integers, and simulation."""

from collections.abc import Mapping
from fractions import Fraction
from math import floor, frexp
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qtools import affine, qdq, zoo
from qtools.affine import Grid
from qtools.npu import _integer_kernels as kernels
from qtools.npu import integer
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import convert, fuse, graph
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, Runner

KINDS = {np.dtype(name): TensorProto.DataType.Value(name.upper()) for name in ("uint8", "int8", "uint16", "int16")}
# ONNX Runtime's own kernels saturate sums of two products where the processor has no dot products of bytes.
SEVEN = 0 if kernels.multiplies_int8() else 1
Encoding = tuple[np.float32, np.ndarray]

# -- models of one operator ------------------------------------------------------------------------------------------


def encoding(rng: np.random.Generator, kind: type, low: float = 0.005, high: float = 0.05) -> Encoding:
    return np.float32(rng.uniform(low, high)), codes(rng, kind, ())


def codes(rng: np.random.Generator, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max + 1, shape).astype(kind)


def initializers(**values: object) -> list[onnx.TensorProto]:
    """``x=(scale, zero point)`` or ``w=array``; a w with an encoding is ``w=array, w_in=(scale, zero point)``."""
    made = []
    for name, value in values.items():
        if isinstance(value, tuple):
            name = name.removesuffix("_in")
            made += [numpy_helper.from_array(np.asarray(part), f"{name}.{i}") for part, i in zip(value, "sz")]
        else:
            made.append(numpy_helper.from_array(np.asarray(value), name))
    return made


def qdq_model(
    op: str,
    inputs: dict[str, np.ndarray],
    output: type,
    constants: list[onnx.TensorProto],
    *,
    axes: Mapping[str, int] = MappingProxyType({}),
    **more,
) -> onnx.ModelProto:
    """Inputs, and constants named in `axes`, dequantized, an operator, and its output y quantized."""
    operands = list(more.pop("operands", [*inputs, *axes]))
    dequantized = [name for name in operands if name in inputs or name in axes]
    nodes = [
        helper.make_node("DequantizeLinear", [name, f"{name}.s", f"{name}.z"], [f"{name}.f"], axis=axes.get(name, 1))
        for name in dequantized
    ]
    nodes.append(helper.make_node(op, [f"{n}.f" if n in dequantized else n for n in operands], ["y.f"], "op", **more))
    nodes.append(helper.make_node("QuantizeLinear", ["y.f", "y.s", "y.z"], ["y"]))
    return model(nodes, inputs, {"y": output}, constants)


def model(nodes: list, inputs: dict[str, np.ndarray], outputs: dict[str, type], constants: list) -> onnx.ModelProto:
    entries = [helper.make_tensor_value_info(n, KINDS[x.dtype], [None] * x.ndim) for n, x in inputs.items()]
    results = [helper.make_tensor_value_info(n, KINDS[np.dtype(k)], None) for n, k in outputs.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "one", entries, results, constants)
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


def peer_model(op: str, order: str, inputs: dict, output: type, constants: list, **more) -> onnx.ModelProto:
    """A QLinear operator; `order` names its inputs, ``x*`` standing for x with its scale and zero point."""
    names = [part for name in order.split() for part in ([name] if name[-1] != "*" else triple(name[:-1]))]
    domain = "" if op in ("QLinearConv", "QLinearMatMul") else "com.microsoft"
    return model([helper.make_node(op, names, ["y"], domain=domain, **more)], inputs, {"y": output}, constants)


def triple(name: str) -> list[str]:
    return [f"{name}.s", f"{name}.z"] if name == "y" else [name, f"{name}.s", f"{name}.z"]


def onnx_runtime(network: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def ours(network: onnx.ModelProto, inputs: dict[str, np.ndarray], **options) -> np.ndarray:
    return IntegerNetwork(network, **options)(inputs)[0]


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape and a.dtype == b.dtype
    return np.abs(a.astype(np.int64) - b)


# -- floats: equal to ONNX Runtime's integer operators ---------------------------------------------------------------


def convolution(seed: int) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, np.ndarray]]:
    """A random convolution, as QDQ and as a QLinearConv."""
    rng = np.random.default_rng(seed)
    kind = (np.uint8, np.int8)[seed % 2]
    weight_kind = np.uint8 if seed % 4 == 2 else np.int8
    groups = int(rng.choice([1, 1, 2, 3, 8]))
    depth, filters = (1, 1) if seed % 3 == 0 else rng.integers(1, 9, 2).tolist()
    if seed % 10 == 9:
        groups, depth, filters = 1, *rng.integers(20, 90, 2).tolist()
    size = rng.integers(1, 6, 2).tolist()
    more = {"group": groups, "strides": rng.integers(1, 4, 2).tolist(), "kernel_shape": size}
    if seed % 4:
        more |= {"dilations": rng.integers(1, 3, 2).tolist(), "pads": rng.integers(0, 3, 4).tolist()}
    else:
        more["auto_pad"] = ("SAME_UPPER", "SAME_LOWER", "VALID")[seed % 3]
    x = codes(rng, kind, (int(rng.integers(1, 4)), groups * depth, *rng.integers(11, 20, 2)))
    w = codes(rng, weight_kind, (groups * filters, depth, *size)) >> SEVEN
    channels = len(w) if seed % 2 and seed % 5 else ()
    scale = rng.uniform(0.001, 0.02, channels).astype(np.float32)
    zero = np.full(channels, 0 if channels and weight_kind == np.int8 else rng.integers(-20, 20), np.int64)
    zero = ((zero + 128 >> SEVEN) if weight_kind == np.uint8 else zero).astype(weight_kind)
    given, spread = encoding(rng, kind), np.float32(74 * 74 * np.sqrt(depth * np.prod(size)) / 60)
    result = np.float32(given[0] * scale.mean() * spread), codes(rng, kind, ())
    bias_in = (given[0] * scale).astype(np.float32), np.zeros(channels, np.int32)
    bias = rng.integers(-20000, 20000, len(w)).astype(np.int32)
    constants = initializers(x=given, y=result, w=w, w_in=(scale, zero), b=bias, b_in=bias_in)
    ours = qdq_model("Conv", {"x": x}, kind, constants, axes={"w": 0, "b": 0}, **more)
    return ours, peer_model("QLinearConv", "x* w* y* b", {"x": x}, kind, constants[:8], **more), {"x": x}


@pytest.mark.parametrize("seeds", [range(0, 60), range(60, 120)])
def test_convolutions_equal_qlinearconv(seeds: range) -> None:
    compared = 0
    for seed in seeds:
        network, peer, inputs = convolution(seed)
        found, expected = ours(network, inputs), onnx_runtime(peer, inputs)
        assert np.array_equal(found, expected) and found.dtype == expected.dtype, seed
        compared += found.size
    assert compared > 100_000


def test_onnx_s_reference_differs_by_a_code_where_it_rounds_in_float64() -> None:
    differing = compared = 0
    for seed in range(6):
        network, peer, inputs = convolution(seed)
        off = apart(ours(network, inputs), ReferenceEvaluator(peer).run(None, inputs)[0])
        differing, compared = differing + np.count_nonzero(off), compared + off.size
        assert off.max() <= 1
    assert differing <= 1e-4 * compared and compared > 5_000


def test_products_equal_qlinearmatmul_and_qgemm() -> None:
    compared = off = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        kind = (np.uint8, np.int8)[seed % 2]
        weight_kind = np.uint8 if seed % 4 == 2 else np.int8
        m, k, n = rng.integers(1, 130, 3).tolist()
        a = codes(rng, kind, (m, k) if seed % 2 else (2, m, k))
        b = codes(rng, weight_kind, (k, n)) >> SEVEN
        channels = n if seed % 3 == 0 else ()
        scale = rng.uniform(0.001, 0.02, channels).astype(np.float32)
        middle = 128 >> SEVEN if weight_kind == np.uint8 else 0
        zero = np.full(channels, middle + (0 if channels else rng.integers(-20, 20)), weight_kind)
        given = encoding(rng, kind)
        result = np.float32(given[0] * scale.mean() * 74 * 74 * np.sqrt(k) / 60), codes(rng, kind, ())
        constants = initializers(a=given, y=result, b=b, b_in=(scale, zero))
        found = ours(qdq_model("MatMul", {"a": a}, kind, constants, axes={"b": 1}), {"a": a})
        peer = peer_model("QLinearMatMul", "a* b* y*", {"a": a}, kind, constants)
        assert np.array_equal(found, onnx_runtime(peer, {"a": a})), seed
        off += np.count_nonzero(apart(found, ReferenceEvaluator(peer).run(None, {"a": a})[0]))
        compared += found.size
        if a.ndim == 2:
            bias_in = (given[0] * scale).astype(np.float32), np.zeros(channels, np.int32)
            constants += initializers(c=rng.integers(-9999, 9999, n).astype(np.int32), c_in=bias_in)
            network = qdq_model("Gemm", {"a": a}, kind, constants, axes={"b": 1, "c": 0})
            expected = onnx_runtime(peer_model("QGemm", "a* b* c y*", {"a": a}, kind, constants[:8]), {"a": a})
            assert np.array_equal(ours(network, {"a": a}), expected), seed
            compared += expected.size
    assert compared > 400_000 and off <= 4


@pytest.mark.parametrize("factor", [0.5, 0.25, 2.0**-6])
def test_halves_go_to_the_even_number_before_the_zero_point_is_added(factor: float) -> None:
    rng = np.random.default_rng(3)
    a, b = codes(rng, np.uint8, (200, 3)), rng.integers(-2, 3, (3, 40)).astype(np.int8)
    for zero in (128, 131):
        constants = initializers(a=(np.float32(1), np.uint8(120)), y=(np.float32(1 / factor), np.uint8(zero)))
        constants += initializers(b=b, b_in=(np.float32(1), np.int8(0)))
        found = ours(qdq_model("MatMul", {"a": a}, np.uint8, constants, axes={"b": 1}), {"a": a})
        peer = peer_model("QLinearMatMul", "a* b* y*", {"a": a}, np.uint8, constants)
        assert np.array_equal(found, onnx_runtime(peer, {"a": a}))


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_pairs_equal_qlinearadd_and_qlinearmul(op: str, kind: type) -> None:
    compared = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a = codes(rng, kind, (3, 7, 11, 13))
        b = codes(rng, kind, [a.shape, (1, 7, 1, 1), (13,), (3, 7, 11, 1)][seed % 4])
        one, other, result = encoding(rng, kind), encoding(rng, kind), encoding(rng, kind, 0.01, 0.1)
        if seed % 5 == 0:  # halves, which are where rules of rounding part
            one, other, result = (
                (np.float32(scale), zero[1]) for scale, zero in zip((0.5, 0.5, 1), (one, other, result))
            )
        constants = initializers(a=one, b=other, y=result)
        network = qdq_model(op, {"a": a, "b": b}, kind, constants)
        peer = peer_model(f"QLinear{op}", "a* b* y*", {"a": a, "b": b}, kind, constants)
        found = ours(network, {"a": a, "b": b})
        assert np.array_equal(found, onnx_runtime(peer, {"a": a, "b": b})), seed
        compared += found.size
    assert compared == 60_060


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("op", ["Sigmoid", "LeakyRelu", "GlobalAveragePool", "AveragePool", "Softmax", "Concat"])
def test_operators_equal_their_qlinear_twins(op: str, kind: type) -> None:
    """AveragePool: but for exact halves, which ONNX Runtime's sums of floats come down from on either side."""
    compared = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        given, result = encoding(rng, kind), encoding(rng, kind, 0.003, 0.03)
        x, more, order, theirs = codes(rng, kind, (2, 9, 12, 10)), {}, "x* y*", {}
        inputs = {"x": x}
        if op == "LeakyRelu":
            more = theirs = {"alpha": 0.1}
        elif op == "GlobalAveragePool":
            theirs = {"channels_last": 0}
        elif op == "AveragePool":
            more = {"kernel_shape": [3, 2], "strides": [1, 2], "pads": [1, 0, 1, 1], "count_include_pad": seed % 2}
            theirs, result = more, given if seed % 3 == 0 else result
        elif op == "Softmax":
            x = inputs["x"] = codes(rng, kind, (20, (5, 40, 600)[seed % 3]))
            given, theirs = (np.float32(rng.uniform(0.01, 0.3)), given[1]), {"opset": 13}
        elif op == "Concat":
            inputs, more, order, theirs = (
                inputs | {"b": codes(rng, kind, (2, 4, 12, 10))},
                {"axis": 1},
                "y* x* b*",
                {"axis": 1},
            )
        if op in ("Sigmoid", "Softmax"):
            result = np.float32(1 / 256), np.array(np.iinfo(kind).min, kind)
        constants = initializers(x=given, y=result, **({"b": encoding(rng, kind)} if op == "Concat" else {}))
        network = qdq_model(op, inputs, kind, constants, **more)
        expected = onnx_runtime(peer_model(f"QLinear{op}", order, inputs, kind, constants, **theirs), inputs)
        off = apart(ours(network, inputs), expected)
        assert not off.any() if result is not given else off.max() <= 1 and np.mean(off) < 0.08, seed
        compared += off.size
    assert compared > 200


# -- fixed point: equal to the paper, in Python's own integers -------------------------------------------------------


def slow(acc: int, real: float, zero: int, low: int, high: int) -> int:
    """Jacob et al. 2018, section 2.2, and gemmlowp's comments: exact fractions, rounded when they say so."""
    mantissa, exponent = frexp(real)
    stored = floor(Fraction(mantissa) * 2**31 + Fraction(1, 2))
    if stored == 2**31:
        stored, exponent = 2**30, exponent + 1
    acc = max(min(acc * 2 ** max(exponent, 0), 2**31 - 1), -(2**31))
    high_half = floor(Fraction(acc * stored, 2**31) + Fraction(1, 2))  # SaturatingRoundingDoublingHighMul
    shifted = Fraction(high_half, 2 ** max(-exponent, 0))  # RoundingDivideByPOT
    rounded = floor(abs(shifted) + Fraction(1, 2)) * (1 if shifted > 0 else -1)
    return max(low, min(high, rounded + zero))


@settings(deadline=None)  # the first call compiles
@given(
    st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1, max_size=40),
    st.floats(2.0**-30, 2.0**6),
    st.integers(-128, 127),
)
def test_fixed_point_equals_the_paper(accs: list[int], real: float, zero: int) -> None:
    mantissa, shift = integer.quantize_multiplier(real)
    assert 2**30 <= mantissa < 2**31
    assert abs(Fraction(mantissa.item()) * Fraction(2) ** (shift.item() - 31) / Fraction(real) - 1) <= Fraction(
        1, 2**31
    )
    found = integer.requantize_fixed(np.array(accs), mantissa, shift, zero, -128, 127)
    assert found.tolist() == [slow(acc, real, zero, -128, 127) for acc in accs]


@pytest.mark.parametrize("real", [0.5, 0.25, 0.75, 2.0**-8, 3 * 2.0**-9, 1.0, 1.5, 6.0])
def test_halves_are_rounded_as_in_the_paper(real: float) -> None:
    accs = np.arange(-3000, 3001)
    found = integer.requantize_fixed(accs, *integer.quantize_multiplier(real), 3, -128, 127)
    assert found.tolist() == [slow(acc, real, 3, -128, 127) for acc in accs.tolist()]


@pytest.mark.parametrize("depthwise", [False, True])
def test_whole_convolutions_in_fixed_point_equal_the_paper(depthwise: bool) -> None:
    rng = np.random.default_rng(int(depthwise))
    x, w = codes(rng, np.uint8, (2, 4, 5, 6)), codes(rng, np.int8, (4, 1 if depthwise else 4, 3, 2))
    (scale, zero), weights = encoding(rng, np.uint8), rng.uniform(0.001, 0.02, 4).astype(np.float32)
    result = np.float32(scale * 0.01 * 74 * 74 * 5 / 60), codes(rng, np.uint8, ())
    constants = initializers(x=(scale, zero), y=result, w=w, w_in=(weights, np.zeros(4, np.int8)))
    network = qdq_model("Conv", {"x": x}, np.uint8, constants, axes={"w": 0}, group=4 if depthwise else 1)
    found = ours(network, {"x": x}, requantize="fixed")
    for (n, c, row, column), code in np.ndenumerate(found):
        patch = x[n, c : c + 1] if depthwise else x[n]
        window = patch[:, row : row + 3, column : column + 2].astype(int) - int(zero)
        acc = sum(a * b for a, b in zip(window.ravel().tolist(), w[c].ravel().tolist()))
        assert code == slow(acc, float(scale * weights[c] / result[0]), int(result[1]), 0, 255)


# -- one accumulator -------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(-128, 255))
def test_the_four_terms_add_up_to_the_product_of_centred_codes(seed: int, zero: int) -> None:
    rng = np.random.default_rng(seed)
    x, w, w_zero = codes(rng, np.uint8, (3, 7)), codes(rng, np.int8, (7, 4)), rng.integers(-128, 128, 4)
    terms = integer.accumulate(x, zero, w, w_zero)
    assert np.array_equal(sum(terms), (x.astype(int) - zero) @ (w.astype(int) - w_zero))
    assert np.array_equal(terms[0], x.astype(int) @ w.astype(int))


def test_float32_carries_sums_up_to_its_bound_and_float64_the_rest() -> None:
    """The largest sum is reached; one more in float32 would be lost, which is why the bound is where it is."""
    w = np.full((2**16 + 1, 1), 1)
    x = np.full((1, 2**16 + 1), 256)
    x[0, -1] = 1
    assert kernels.carried(x[:, :-1], w[:-1], 2**24).item() == 2**24
    assert kernels.carried(x, w, 2**24 + 1).item() == 2**24 + 1
    assert np.matmul(x.astype(np.float32), w.astype(np.float32)).item() == 2**24
    assert kernels.carried(np.array([[2**52, 2**52 - 1]]), np.ones((2, 1), int), 2**53 - 1).item() == 2**53 - 1
    with pytest.raises(ValueError, match="more than 53 bits"):
        kernels.carried(x, w, 2**53 + 1)


def test_the_largest_products_of_bytes_are_exact() -> None:
    if not kernels.multiplies_int8():
        pytest.skip("torch has no fast and exact products of bytes on this machine")
    import torch

    for a, b in ((-128, -128), (-128, 127), (127, 127)):
        x, w = torch.full((3, 4000), a, dtype=torch.int8), torch.full((4000, 5), b, dtype=torch.int8)
        assert (torch._int_mm(x, w) == 4000 * a * b).all()


@pytest.mark.parametrize("seed", [9, 14, 22, 33])
def test_machines_without_products_of_bytes_get_the_same_codes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, _, inputs = convolution(seed)
    expected = ours(network, inputs)
    monkeypatch.setattr(kernels, "multiplies_int8", lambda: False)
    assert np.array_equal(ours(network, inputs), expected)


@pytest.mark.parametrize(("kind", "k", "bits"), [(np.uint8, 3, 18), (np.uint8, 300, 23), (np.uint16, 1000, 34)])
def test_the_worst_case_is_reached_and_no_larger(kind: type, k: int, bits: int) -> None:
    rng = np.random.default_rng(k)
    w, zero = codes(rng, np.int8, (k, 2)), np.array(7, kind)
    w[0, 0] = 127
    top = np.iinfo(kind).max
    worst = np.where(w[:, 0] > 0, top, 0).astype(kind)[None]  # the largest sum of the first column
    least = np.where(w[:, 0] > 0, 0, top).astype(kind)[None]
    sums = [(x.astype(int) - 7) @ w.astype(int) for x in (worst, least)]
    scale = np.float32(max(np.abs(part).max() for part in sums) / 20000)
    constants = initializers(a=(np.float32(1), zero), y=(scale, np.array(30000, np.uint16)), b=w)
    constants += initializers(b_in=(np.float32(1), np.array(0, np.int8)))
    network = IntegerNetwork(qdq_model("MatMul", {"a": worst}, np.uint16, constants, axes={"b": 1}))
    by_column = [np.abs(np.where((w > 0) == up, (top - 7) * w.astype(int), -7 * w.astype(int)).sum(0)) for up in (0, 1)]
    assert network.accumulator_bits() == {"op": int(np.max(by_column)).bit_length() + 1}
    assert abs(network.accumulator_bits()["op"] - bits) <= 1
    for x, exact in zip((worst, least), sums):
        assert np.abs(network({"a": x})[0][0] - (exact[0] / scale + 30000)).max() <= 0.51


# -- weights of few bits and in blocks -------------------------------------------------------------------------------


def weights_of(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, object]:
    values = rng.standard_normal((64, 12)).astype(np.float32)
    if kind == "LPBQ":
        chosen = affine.choose_lpbq(values, Grid(4, signed=True, symmetric=True, block_size=(16, 1)))
        return affine.quantize(values, chosen.qparams), chosen
    bits, blocks = {"int4": (4, (-1, 1)), "blocks": (4, (16, 1)), "int16": (16, (-1, 1))}.get(kind, (4, (-1, -1)))
    grid = Grid(bits, signed=kind != "uint4", symmetric=kind != "uint4", block_size=blocks)
    qparams = affine.choose_qparams(values, grid)
    return affine.quantize(values, qparams), qparams


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int16", "blocks", "LPBQ"])
def test_weights_of_other_widths_and_blocks(kind: str, bits: int) -> None:
    rng = np.random.default_rng(5)
    w, chosen = weights_of(kind, rng)
    x = rng.standard_normal((50, 64)).astype(np.float32)
    real = affine.dequantize(w, getattr(chosen, "qparams", chosen))
    activations = [affine.choose_qparams(part, Grid(bits)) for part in (x, x @ real)]
    network = qdq.operator_model("MatMul", w, chosen, x.shape, activations=tuple(activations))
    given = affine.quantize(x, activations[0])
    exact = affine.dequantize(given, activations[0]).astype(np.float64) @ real
    expected = np.rint(exact / float(activations[1].scale)) + int(activations[1].zero_point)
    for mode in ("float", "fixed"):
        off = np.abs(ours(network, {"x": given}, requantize=mode) - expected.clip(0, 2**bits - 1))
        assert off.max() <= 1 and off.mean() < (0.03 if mode == "float" else 0.05)
    if kind == "LPBQ":  # one accumulator a channel, of weights as wide as 8 bits
        expanded = w.astype(int) * np.repeat(np.asarray(chosen.block_scale, int), 16, axis=0)
        assert np.abs(expanded).max() <= 128
        largest = np.abs(expanded).sum(0).max() * (2**bits - 1)
        assert IntegerNetwork(network).accumulator_bits()["op"] <= int(largest).bit_length() + 1


# -- the other operators, beside their simulation --------------------------------------------------------------------

OPERATORS = {
    "Sub": ({}, 2), "Div": ({}, 2), "MatMul": ({}, 2), "HardSwish": ({}, 1), "Tanh": ({}, 1), "Exp": ({}, 1),
    "ReduceMean": ({"keepdims": 1}, 1), "Softmax": ({"axis": 1}, 1), "Erf": ({}, 1),
    "MaxPool": ({"kernel_shape": [3, 2], "strides": [2, 3], "pads": [1, 0, 1, 1], "ceil_mode": 1}, 1),
    "AveragePool": ({"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, 1),
    "Transpose": ({"perm": [1, 3, 0, 2]}, 1), "Flatten": ({"axis": 2}, 1), "DepthToSpace": ({"blocksize": 2}, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.uint8, np.int16])
@pytest.mark.parametrize("op", OPERATORS)
def test_operators_beside_their_simulation(op: str, kind: type) -> None:
    more, count = OPERATORS[op]
    rng = np.random.default_rng(len(op))
    inputs = {name: codes(rng, kind, (2, 8, 6, 6)) for name in "ab"[:count]}
    fine = 2.0**-8 if kind == np.int16 else 1
    params = {
        name: (np.float32(rng.uniform(0.02, 0.05) * fine), np.array(99 * (kind == np.uint8), kind)) for name in inputs
    }
    network = qdq_model(
        op, inputs, kind, initializers(y=(np.float32(0.1 * fine), np.array(100, kind)), **params), **more
    )
    simulated = Runner(network, ["y"])(inputs)[0]
    if op == "Div":  # where the simulation divides by zero
        inputs["b"] = np.where(inputs["b"] == params["b"][1], params["b"][1] + 1, inputs["b"]).astype(kind)
        simulated = Runner(network, ["y"])(inputs)[0]
    moved = op in ("MaxPool", "Transpose", "Flatten", "DepthToSpace")
    for mode in ("float", "fixed"):
        off = apart(ours(network, inputs, requantize=mode), simulated)
        assert off.max() <= (0 if moved else 1) and np.mean(off > 0) < (0.005 if mode == "float" else 0.2)


def test_moves_with_constant_operands() -> None:
    rng = np.random.default_rng(1)
    x = codes(rng, np.uint8, (2, 6, 4, 4))
    given = encoding(rng, np.uint8)
    whole = {name: np.array(value, np.int64) for name, value in {
        "shape": [0, 3, -1], "pads": [0, 0, 1, 2, 0, 0, 0, 1], "indices": [2, 0, 5], "from": [1], "to": [9],
        "axis": [1], "step": [2], "repeats": [1, 1, 2, 1],
    }.items()}  # fmt: skip
    constants = initializers(x=given, y=given, value=np.float32(-1.5), **whole)
    for op, operands, more in (
        ("Reshape", ["shape"], {}), ("Pad", ["pads", "value"], {}), ("Pad", ["pads"], {"mode": "edge"}),
        ("Gather", ["indices"], {"axis": 1}), ("Slice", ["from", "to", "axis", "step"], {}), ("Tile", ["repeats"], {}),
        ("Unsqueeze", ["axis"], {}),
    ):  # fmt: skip
        network = qdq_model(op, {"x": x}, np.uint8, constants, operands=["x", *operands], **more)
        assert np.array_equal(ours(network, {"x": x}), Runner(network, ["y"])({"x": x})[0]), op


def chained(x: np.ndarray, steps: list[tuple], constants: list, kind: type) -> onnx.ModelProto:
    """Operators one after the other; ``q0``, ``q1``, ... are the codes where a step is None."""
    nodes, name, count = [helper.make_node("DequantizeLinear", ["x", "x.s", "x.z"], ["x.f"])], "x.f", 0
    for step in steps:
        if step is None:
            scale = [f"q{count}.s", f"q{count}.z"]
            nodes.append(helper.make_node("QuantizeLinear", [name, *scale], [f"q{count}"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"q{count}", *scale], [f"q{count}.f"]))
            name, count = f"q{count}.f", count + 1
        else:
            nodes.append(helper.make_node(step[0], [name, *step[1:]], [f"t{len(nodes)}"]))
            name = f"t{len(nodes) - 1}"
    return model(nodes[:-1], {"x": x}, {f"q{count - 1}": kind}, constants)


@pytest.mark.parametrize("steps", [[("Relu",)], [("Clip", "low", "high")], [("Clip", "", "high"), ("Relu",)]])
def test_activations_between_an_operator_and_its_codes(steps: list[tuple]) -> None:
    rng = np.random.default_rng(2)
    x = codes(rng, np.uint8, (40, 6))
    constants = initializers(x=(np.float32(0.02), np.uint8(120)), q0=(np.float32(0.03), np.uint8(100)))
    constants += initializers(low=np.float32(-0.7), high=np.float32(1.1), w=codes(rng, np.int8, (6, 5)))
    constants += initializers(w_in=(np.float32(0.004), np.int8(0)))
    network = chained(x, [("MatMul", "w.f"), *steps, None], constants, np.uint8)
    network.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "w.s", "w.z"], ["w.f"]))
    assert np.array_equal(ours(network, {"x": x}), Runner(network, ["q0"])({"x": x})[0])


def test_codes_may_change_their_width_between_operators() -> None:
    """And what is looked up in the same go as it is computed is what it is by itself."""
    rng = np.random.default_rng(2)
    x = codes(rng, np.int16, (50, 30))
    constants = initializers(x=(np.float32(1e-4), np.int16(9)), q0=(np.float32(2e-4), np.uint16(30000)))
    constants += initializers(q1=(np.float32(0.005), np.uint8(3)), q2=(np.float32(3e-5), np.uint16(0)))
    constants += initializers(w=codes(rng, np.int8, (30, 20)), w_in=(np.float32(0.003), np.int8(0)))
    for steps, kind in (([], np.uint8), ([("Sqrt",), None], np.uint16)):
        network = chained(x, [("MatMul", "w.f"), None, ("Sigmoid",), None, *steps], constants, kind)
        network.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "w.s", "w.z"], ["w.f"]))
        names = ["q0", "q1", "q2"][: 3 if steps else 2]
        found = IntegerNetwork(network)(x, names)
        for one, simulated in zip(found, Runner(network, names)(x)):
            assert np.mean(apart(one, simulated) > 0) < 0.01
        assert np.array_equal(ours(network, {"x": x}), found[-1])


def test_windows_that_overlap_in_memory() -> None:
    """A row of pixels, and windows of one row: all of them are a view of the picture that torch would misread."""
    rng = np.random.default_rng(4)
    x, w = codes(rng, np.uint8, (1, 5, 1, 40)), codes(rng, np.int8, (7, 5, 1, 3)) >> SEVEN
    constants = initializers(x=encoding(rng, np.uint8), y=(np.float32(0.5), np.uint8(90)), w=w)
    constants += initializers(w_in=(np.float32(0.01), np.int8(0)))
    network = qdq_model("Conv", {"x": x}, np.uint8, constants, axes={"w": 0})
    peer = peer_model("QLinearConv", "x* w* y*", {"x": x}, np.uint8, constants)
    assert np.array_equal(ours(network, {"x": x}), onnx_runtime(peer, {"x": x}))


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_normalizations(op: str, kind: type) -> None:
    rng = np.random.default_rng(3)
    x = codes(rng, kind, (30, 96))
    x[0] = x[0, 0]  # a row of equal numbers, of which only epsilon is left to divide by
    scale = np.float32(4 / np.iinfo(kind).max)
    zero = np.array(np.iinfo(kind).max // 3, kind)
    gain, bias = rng.uniform(0.5, 2, 96).astype(np.float32), rng.uniform(-1, 1, 96).astype(np.float32)
    operands = ["x", "g", "b"] if op[0] == "L" else ["x", "g"]
    result = np.float32(10 / np.iinfo(kind).max), np.array(np.iinfo(kind).max // 2, kind)
    network = qdq_model(op, {"x": x}, kind, initializers(x=(scale, zero), y=result, g=gain, b=bias), operands=operands)
    real = (x.astype(np.float64) - int(zero)) * scale
    real -= real.mean(1, keepdims=True) if op[0] == "L" else 0
    real = real / np.sqrt(np.square(real).mean(1, keepdims=True) + 1e-5) * gain + (bias if op[0] == "L" else 0)
    expected = np.rint(real / result[0]) + int(result[1])
    for mode in ("float", "fixed"):
        off = np.abs(ours(network, {"x": x}, requantize=mode) - expected.clip(0, np.iinfo(kind).max))
        assert off.max() <= 2 and np.mean(off > 0) < 0.1


# -- whole networks --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple]:
    images = zoo.digits()[0][:64]
    networks = {variant: fuse.fuse(graph.prepare(zoo.digits_cnn(variant))) for variant in ("mini", "skew")}
    return {name: (network, calibrate(network, [images], methods=("min_max",))) for name, network in networks.items()}


# Shares of equal codes of the logits, and how far the others are off: ties turn, and `skew` enlarges them a lot.
AGREEMENT = {
    ("mini", 8, 8): (0.999, 1), ("mini", 16, 8): (0.75, 8), ("mini", 8, 4): (0.999, 1),
    ("skew", 8, 8): (0.995, 9), ("skew", 16, 8): (0.7, 60), ("skew", 8, 4): (0.995, 9),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "activations", "weights"), AGREEMENT)
def test_digits_are_as_accurate_as_in_the_simulation(digits, variant: str, activations: int, weights: int) -> None:
    images, labels = zoo.digits()[2:]
    options = Options(activations, weights, use_per_channel_quantization=True, use_per_row_quantization=True)
    network, calibration = digits[variant]
    network = convert.quantize_network(network, (), options, calibration=calibration).network
    names = ["output", "output.codes"]
    simulated, simulated_codes = Runner(network, names)(images)
    share, worst = AGREEMENT[variant, activations, weights]
    for mode in ("float", "fixed"):
        logits, found = IntegerNetwork(network, requantize=mode)(images, names)
        accuracies = [100 * np.mean(part.argmax(1) == labels) for part in (logits, simulated)]
        assert abs(accuracies[0] - accuracies[1]) <= (0.3 if mode == "float" else 1)
        if mode == "float":
            off = apart(found, simulated_codes)
            assert np.mean(off == 0) >= share and off.max() <= worst


def line_network(model: onnx.ModelProto, lines: np.ndarray, **options) -> onnx.ModelProto:
    network = fuse.fuse(graph.prepare(model, {"x": (1, *lines.shape[1:])}))
    samples = [line[None] for line in lines]
    return convert.quantize_network(network, samples, Options(use_per_channel_quantization=True, **options)).network


def test_the_direction_classifier() -> None:
    lines, turned = zoo.classifier_lines(12, 5)
    network = line_network(zoo.direction_classifier(), lines[:4])
    whole, runner = IntegerNetwork(network), Runner(network, [network.graph.output[0].name])
    found, simulated = (np.concatenate([run(line[None])[0] for line in lines]) for run in (whole, runner))
    assert np.array_equal(found.argmax(1), simulated.argmax(1)) and np.mean(found.argmax(1) == turned) >= 0.9
    assert np.abs(found - simulated).max() <= 0.05


def test_the_recognizer_reads_what_it_reads_in_the_simulation() -> None:
    lines, texts = zoo.recognizer_lines(3, 5)
    model = zoo.text_recognizer()
    network = line_network(model, lines, act_bw=16)
    whole, runner = IntegerNetwork(network), Runner(network, [network.graph.output[0].name])
    read = [
        zoo.decode(np.concatenate([run(line[None])[0] for line in lines]), zoo.characters(model))
        for run in (whole, runner)
    ]
    assert read[0] == read[1] and zoo.exact_match(read[0], texts) > 0.6


def test_files_of_onnx_runtime_s_quantizer(tmp_path) -> None:
    from onnxruntime.quantization import QuantFormat, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        rest = iter([{"input": zoo.digits()[0][:64]}])

        def get_next(self):
            return next(self.rest, None)

    onnx.save(graph.prepare(zoo.digits_cnn()), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "qdq.onnx", Reader(), quant_format=QuantFormat.QDQ, per_channel=True
    )
    network, images = onnx.load(tmp_path / "qdq.onnx"), zoo.digits()[2]
    simulated, found = Runner(network, ["output"])(images)[0], IntegerNetwork(network)(images)[0]
    assert np.mean(found == simulated) > 0.999 and np.array_equal(found.argmax(1), simulated.argmax(1))


# -- how it is called ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(digits) -> onnx.ModelProto:
    return convert.quantize_network(digits["mini"][0], (), calibration=digits["mini"][1]).network


def test_any_tensor_can_be_asked_for(network) -> None:
    images, whole = zoo.digits()[2][:5], IntegerNetwork(network)
    names = [node.output[0] for node in network.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    constants = {tensor.name for tensor in network.graph.initializer}
    names = [name for name in names if f"{name}.codes" not in constants and not name.endswith(".bias")]
    found, simulated = whole({"input": images}, names), Runner(network, names)(images)
    for name, ours, theirs in zip(names, found, simulated):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.flags.c_contiguous, name
        assert np.mean(ours == theirs) > 0.99, name
    # What is asked for in between changes nothing behind it, and each image is computed by itself.
    assert np.array_equal(whole(images)[0], found[names.index("output")])
    assert np.array_equal(whole(images[3:4])[0], whole(images)[0][3:4])
    by_name = integer.run_integer(network, images, ["act.codes"], requantize="fixed")
    assert list(by_name) == ["act.codes"] and by_name["act.codes"].dtype == np.uint8
    assert list(integer.run_integer(network, images)) == ["output"]


def test_bad_inputs_are_refused(network) -> None:
    whole, images = IntegerNetwork(network), zoo.digits()[2][:2]
    wrong = images.copy()
    wrong[0, 0, 3, 3] = np.nan
    for sample, said in (
        (wrong, "QuantizeLinear 'input.quantize': the input holds NaN"),
        (images.astype(np.float64), "is float32 of shape .* got float64"),
        (images[:, :, :4], "is float32 of shape"),
        (images[:0], "is float32 of shape"),
        ({"x": images}, "inputs are input; got x"),
    ):
        with pytest.raises(ValueError, match=said):
            whole(sample)
    with pytest.raises(ValueError, match="no codes of 'bn'"):
        whole(images, ["bn"])
    with pytest.raises(ValueError, match="'float' or 'fixed'"):
        IntegerNetwork(network, requantize="exact")
    with pytest.raises(ValueError, match="must be finite"):
        integer.quantize_multiplier([1.0, np.inf])
    with pytest.raises(ValueError, match="more than 32 bits"):
        integer.requantize_fixed(np.array([2**31]), 2**30, 0, 0, 0, 255)


def test_what_is_no_integer_operator_is_named(network) -> None:
    with pytest.raises(ValueError, match="Conv 'stem': it reads 'input', a float that is not quantized"):
        IntegerNetwork(zoo.digits_cnn())
    rng = np.random.default_rng(0)
    x = codes(rng, np.uint8, (2, 3))
    constants = initializers(x=encoding(rng, np.uint8), y=encoding(rng, np.uint8), other=np.ones(3, np.float32))
    for op, more, said in (
        ("Einsum", {"equation": "ij->ji"}, "Einsum 'op': it is not known here"),
        ("Sum", {}, "Sum 'op': it is not known here"),
        ("Mul", {"operands": ["x", "other"]}, "Mul 'op': it is known here for one tensor of codes and single numbers"),
        ("Gemm", {"operands": ["x", "x"]}, "Gemm 'op': a Gemm is known here with constant weights only"),
    ):
        with pytest.raises(ValueError, match=said):
            IntegerNetwork(qdq_model(op, {"x": x}, np.uint8, constants, **more))
    floats = graph.copy_of(network)
    floats.graph.node.remove(floats.graph.node[-1])
    floats.graph.output[0].name = "output.float"
    with pytest.raises(ValueError, match=r"output\.float. is a float that is never quantized"):
        IntegerNetwork(floats)


def test_halves_go_to_the_even_code_as_in_quantize_linear() -> None:
    """The rule for one accumulator against ONNX's reference: a scale of 2 puts every odd number on a line."""
    from onnx.reference.ops.op_quantize_linear import QuantizeLinear_21

    acc = np.arange(-301, 302)
    expected = QuantizeLinear_21.eval(acc.astype(np.float32), np.float32(2), np.uint8(100))
    codes = integer.requantize_float(acc, 0.5, 100, 0, 255)
    assert np.array_equal(codes, np.asarray(expected[0] if isinstance(expected, tuple) else expected))
    assert codes[301 + 1] == 100 and codes[301 + 3] == 102
