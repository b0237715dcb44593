"""Fused networks compute what they computed before, and what is not certain to is left alone."""

import time

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qtools import zoo
from qtools.ptq import fuse, graph

SIXTH = np.float32(1 / 6)
REAL = {
    "digits": (zoo.digits_cnn, "input", (2, 1, 8, 8), {"Conv": 7}),
    "recognizer": (zoo.text_recognizer, "x", (1, 3, 48, 320), {"HardSwish": 28, "Conv": 38}),
    "classifier": (zoo.direction_classifier, "x", (1, 3, 48, 192), {"HardSwish": 18, "Conv": 53}),
    "efficientnet": (zoo.efficientnet_lite0, "x", (1, 3, 224, 224), {"Conv": 49}),
}


def rng():
    return np.random.default_rng(0)


def model_of(nodes, shapes, outputs=("y",), kind=np.float32, **constants):
    """A network from (op, inputs, outputs[, attributes]) and constants; shapes of its inputs by name."""
    made = [
        helper.make_node(op, inputs.split(" "), results.split(" "), name=f"{op}_{results}", **(more[0] if more else {}))
        for op, inputs, results, *more in nodes
    ]
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    arrays = {key: np.asarray(value) for key, value in constants.items()}
    arrays = {key: value.astype(kind) if value.dtype.kind == "f" else value for key, value in arrays.items()}
    model = helper.make_model(
        helper.make_graph(
            made,
            "g",
            [helper.make_tensor_value_info(name, elem, shape) for name, shape in shapes.items()],
            [entry_of(name, shapes | {key: value.shape for key, value in arrays.items()}, elem) for name in outputs],
            [numpy_helper.from_array(value, key) for key, value in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", graph.OPSET)],
        ir_version=10,
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    onnx.checker.check_model(inferred)
    return inferred


def entry_of(name, shapes, elem):
    """An output; its type and shape are inferred, unless it is an input or a constant besides."""
    if name in shapes:
        return helper.make_tensor_value_info(name, elem, shapes[name])
    return helper.make_empty_tensor_value_info(name)


def open_session(model, optimized=False):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, feeds, optimized=False):
    return open_session(model, optimized).run(None, feeds)


def feeds_of(model, seed=0):
    """Random inputs; sizes that are not known become 1."""
    constants = {tensor.name for tensor in model.graph.initializer}
    random, feeds = np.random.default_rng(seed), {}
    for entry in model.graph.input:
        if entry.name not in constants:
            kind = helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
            shape = [dim.dim_value or 1 for dim in entry.type.tensor_type.shape.dim]
            values = random.standard_normal(shape) * 4
            feeds[entry.name] = np.asarray(values > 0 if kind == np.bool_ else values).astype(kind)
    return feeds


def fused(model, rtol=1e-5):
    """The operators that are left, after the network was found to be valid and to compute what it did."""
    before = model.SerializeToString(deterministic=True)
    new = fuse.fuse(model)
    assert model.SerializeToString(deterministic=True) == before, "the model given was changed"
    onnx.checker.check_model(new, full_check=True)
    assert [entry.name for entry in new.graph.output] == [entry.name for entry in model.graph.output]
    feeds = feeds_of(model)
    for got, expected in zip(run(new, feeds), run(model, feeds), strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * scale)
    return [node.op_type for node in new.graph.node]


@pytest.mark.parametrize("name", REAL)
def test_real_networks_compute_the_same_when_fused(name):
    network, entry, shape, counts = REAL[name]
    prepared = graph.prepare(network(), {entry: shape})
    new = fuse.fuse(prepared)
    onnx.checker.check_model(new, full_check=True)
    assert {op: fuse.count(new)[op] for op in counts} == counts
    x = rng().standard_normal(shape, dtype=np.float32)
    old, got = run(prepared, {entry: x})[0], run(new, {entry: x})[0]
    np.testing.assert_allclose(got, old, rtol=2e-3, atol=2e-4 * np.abs(old).max())


# -- scales and shifts behind ----------------------------------------------------------------------------------------

IMAGE = {"x": (1, 3, 5, 5)}


def conv(channels=4, inputs=3, k=3, bias=True, seed=0):
    random = np.random.default_rng(seed)
    return {"w": random.standard_normal((channels, inputs, k, k))} | (
        {"b": random.standard_normal(channels)} if bias else {}
    )


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (1, 4, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_constants_per_channel_go_into_a_convolution(op, shape, bias):
    constants = conv(bias=bias) | {"c": rng().uniform(0.5, 2, shape)}
    operands = "x w b" if bias else "x w"
    assert fused(model_of([("Conv", operands, "t"), (op, "t c", "y")], IMAGE, **constants)) == ["Conv"]
    first = [("Conv", operands, "t"), (op, "c t", "y")]
    assert fused(model_of(first, IMAGE, **constants)) == (["Conv"] if op in ("Mul", "Add") else ["Conv", op])


@pytest.mark.parametrize(
    "shape",
    [(4,), (1, 1, 4), (1, 1, 4, 1), (4, 1), (4, 1, 1, 1), (1, 4, 1, 1, 1), (2, 1, 1, 1), (3, 3), (4, 4, 4)],
)
def test_constants_along_other_axes_or_larger_than_the_result_stay(shape):
    """With 4 output channels on 4 rows and columns, so that only the position tells the axes apart."""
    constants = conv() | {"c": rng().uniform(0.5, 2, shape)}
    size = (1, 3, 5, 5) if shape == (3, 3) else (1, 3, 6, 6)
    for op in ("Mul", "Add"):
        nodes = [("Conv", "x w b", "t"), (op, "t c", "y")]
        assert fused(model_of(nodes, {"x": size}, **constants)) == ["Conv", op]


def test_a_constant_that_enlarges_a_single_channel_stays():
    nodes = [("Conv", "x w", "t"), ("Add", "t c", "y")]
    assert fused(model_of(nodes, IMAGE, **conv(1, bias=False), c=np.ones((4, 1, 1)))) == ["Conv", "Add"]


@pytest.mark.parametrize(
    ("op", "size", "weight", "constant", "expected"),
    [
        ("MatMul", (2, 3, 4), (4, 5), (5,), ["MatMul"]),
        ("MatMul", (2, 3, 4), (4, 5), (1, 5), ["MatMul"]),
        ("MatMul", (2, 3, 4), (4, 5), (), ["MatMul"]),
        ("MatMul", (2, 5, 4), (4, 5), (5, 1), ["MatMul", "Mul"]),
        ("MatMul", (5, 5, 4), (4, 5), (5, 1, 1), ["MatMul", "Mul"]),
        ("MatMul", (5, 4), (4, 5), (1, 1, 5), ["MatMul", "Mul"]),
        ("MatMul", (4,), (4, 5), (5,), ["MatMul"]),
        ("MatMul", (4,), (4, 5), (1, 5), ["MatMul", "Mul"]),
        ("MatMul", (3, 4), (2, 4, 5), (5,), ["MatMul"]),
        ("MatMul", (3, 4), (2, 4, 5), (2, 1, 1), ["MatMul", "Mul"]),
        ("Gemm", (5, 4), (4, 5), (5,), ["Gemm"]),
        ("Gemm", (5, 4), (4, 5), (1, 5), ["Gemm"]),
        ("Gemm", (5, 4), (4, 5), (5, 1), ["Gemm", "Mul"]),
        ("Gemm", (5, 4), (4, 5), (1, 1, 5), ["Gemm", "Mul"]),
    ],
)
def test_behind_a_product_the_channels_are_the_last_axis(op, size, weight, constant, expected):
    nodes = [(op, "x w", "t"), ("Mul", "t c", "y")]
    constants = dict(w=rng().standard_normal(weight), c=rng().uniform(0.5, 2, constant))
    assert fused(model_of(nodes, {"x": size}, **constants)) == expected


@pytest.mark.parametrize("bias", [(), (1,), (5,), (1, 5), (3, 1), (3, 5)])
@pytest.mark.parametrize("op", ["Mul", "Sub"])
def test_every_shape_of_a_gemms_bias_can_be_scaled_and_shifted(bias, op):
    constants = dict(w=rng().standard_normal((5, 4)), b=rng().standard_normal(bias), c=rng().uniform(0.5, 2, 5))
    for trans in (0, 1):
        size = {"x": (4, 3) if trans else (3, 4)}
        gemm = ("Gemm", "x w b", "t", dict(transA=trans, transB=1))
        assert fused(model_of([gemm, (op, "t c", "y")], size, **constants)) == ["Gemm"]


@pytest.mark.parametrize("scaled", [dict(alpha=0.5), dict(beta=2.0), dict(beta=0.0)])
def test_a_gemm_that_scales_its_operands_is_left_alone(scaled):
    constants = dict(w=rng().standard_normal((4, 5)), b=rng().standard_normal(5), c=rng().uniform(0.5, 2, 5))
    for op in ("Mul", "Add"):
        nodes = [("Gemm", "x w b", "t", scaled), (op, "t c", "y")]
        assert fused(model_of(nodes, {"x": (3, 4)}, **constants)) == ["Gemm", op]


def test_a_matmul_takes_a_scale_but_no_shift():
    constants = dict(w=rng().standard_normal((4, 5)), c=rng().uniform(0.5, 2, 5), d=rng().uniform(0.5, 2, 5))
    nodes = [("MatMul", "x w", "t"), ("Div", "t c", "u"), ("Sub", "u d", "v"), ("Mul", "v c", "y")]
    assert fused(model_of(nodes, {"x": (3, 4)}, **constants)) == ["MatMul", "Sub", "Mul"]


def test_a_product_with_the_constant_on_the_left_is_left_alone():
    constants = dict(w=rng().standard_normal((5, 3)), c=rng().uniform(0.5, 2, 4))
    nodes = [("MatMul", "w x", "t"), ("Mul", "t c", "y")]
    assert fused(model_of(nodes, {"x": (3, 4)}, **constants)) == ["MatMul", "Mul"]


@pytest.mark.parametrize("group", [1, 2])
def test_a_grouped_transposed_convolution_is_left_alone(group):
    constants = dict(w=rng().standard_normal((4, 4 // group, 2, 2)), b=np.ones(4), c=rng().uniform(0.5, 2, (4, 1, 1)))
    nodes = [("ConvTranspose", "x w b", "t", dict(group=group, strides=[2, 2])), ("Mul", "t c", "y")]
    expected = ["ConvTranspose"] if group == 1 else ["ConvTranspose", "Mul"]
    assert fused(model_of(nodes, {"x": (1, 4, 3, 3)}, **constants)) == expected


def test_a_grouped_convolution_takes_both():
    constants = dict(w=rng().standard_normal((4, 2, 3, 3)), c=rng().uniform(0.5, 2, (4, 1, 1)))
    nodes = [("Conv", "x w", "t", dict(group=2)), ("Mul", "t c", "u"), ("Add", "u c", "y")]
    assert fused(model_of(nodes, {"x": (1, 4, 5, 5)}, **constants)) == ["Conv"]


def test_weights_that_are_computed_or_shared_are_left_alone():
    c = rng().uniform(0.5, 2, (4, 1, 1))
    computed = [("Conv", "x v", "t"), ("Mul", "t c", "y")]
    assert fused(model_of(computed, IMAGE | {"v": (4, 3, 3, 3)}, c=c)) == ["Conv", "Mul"]
    shared = [("Conv", "x w b", "t"), ("Conv", "x w b", "z"), ("Mul", "t c", "y")]
    assert fused(model_of(shared, IMAGE, ("y", "z"), **conv(), c=c)) == ["Conv", "Conv", "Mul"]
    bias_as_constant = [("Conv", "x w b", "t"), ("Add", "t c", "u"), ("Mul", "v b", "z"), ("Identity", "u", "y")]
    model = model_of(bias_as_constant, IMAGE | {"v": (2, 4)}, ("y", "z"), **conv(), c=c)
    assert "Add" in fused(model)
    weight_is_output = [("Conv", "x w b", "t"), ("Mul", "t c", "y")]
    assert fused(model_of(weight_is_output, IMAGE, ("y", "w"), **conv(), c=c)) == ["Conv", "Mul"]


def test_results_that_something_else_needs_are_left_alone():
    c = rng().uniform(0.5, 2, (4, 1, 1))
    nodes = [("Conv", "x w b", "t"), ("Mul", "t c", "y")]
    assert fused(model_of(nodes, IMAGE, ("y", "t"), **conv(), c=c)) == ["Conv", "Mul"]
    read_twice = [*nodes[:1], ("Mul", "t c", "u"), ("Add", "u t", "y")]
    assert fused(model_of(read_twice, IMAGE, **conv(), c=c)) == ["Conv", "Mul", "Add"]


@pytest.mark.parametrize("op", ["Div", "Mul", "Add"])
@pytest.mark.parametrize("value", [0.0, np.inf, 1e-38, 3e38])
def test_constants_that_float32_cannot_carry_stay(op, value):
    constants = conv() | {"c": np.array([1, value, 1, 1], np.float32).reshape(4, 1, 1)}
    new = fuse.fuse(model_of([("Conv", "x w b", "t"), (op, "t c", "y")], IMAGE, **constants))
    kinds = [node.op_type for node in new.graph.node]
    harmless = (op, value) in {("Mul", 0.0), ("Add", 0.0), ("Add", 1e-38)}
    assert kinds == (["Conv"] if harmless else ["Conv", op])
    if harmless:
        fused(model_of([("Conv", "x w b", "t"), (op, "t c", "y")], IMAGE, **constants))


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_other_types_keep_theirs(kind):
    nodes = [("MatMul", "x w", "t"), ("Mul", "t c", "u"), ("Mul", "u one", "y")]
    constants = dict(w=rng().standard_normal((4, 5)), c=rng().uniform(0.5, 2, 5), one=np.ones(1))
    assert fused(model_of(nodes, {"x": (3, 4)}, kind=kind, **constants), rtol=1e-2) == ["MatMul", "Mul", "Mul"]


def test_a_new_bias_takes_no_name_that_is_taken():
    nodes = [("Conv", "x w", "t"), ("Add", "t c", "w.bias"), ("Relu", "w.bias", "y")]
    assert fused(model_of(nodes, IMAGE, **conv(bias=False), c=np.ones((4, 1, 1)))) == ["Conv", "Relu"]


def test_constants_that_are_listed_as_inputs_are_inputs_no_more():
    model = model_of([("Conv", "x w b", "t"), ("Mul", "t c", "y")], IMAGE, **conv(), c=np.full((4, 1, 1), 2.0))
    for name, shape in (("c", (4, 1, 1)), ("w", (4, 3, 3, 3))):
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    new = fuse.fuse(model)
    assert [entry.name for entry in new.graph.input] == ["x"]
    assert fused(model) == ["Conv"]


def test_an_unknown_batch_is_no_obstacle_and_no_excuse():
    constants = conv() | {"c": rng().uniform(0.5, 2, (1, 4, 1, 1)), "one": np.ones((2, 1, 1, 1))}
    nodes = [("Conv", "x w b", "t"), ("Mul", "t c", "u"), ("Mul", "u one", "y")]
    assert fused(model_of(nodes, {"x": ("N", 3, 5, 5)}, **constants)) == ["Conv", "Mul"]


# -- scales and shifts before ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Div"])
@pytest.mark.parametrize("pads", [{}, dict(pads=[0, 0, 1, 0]), dict(auto_pad="SAME_UPPER"), dict(auto_pad="VALID")])
def test_a_shift_is_not_folded_through_padding(op, pads):
    nodes = [(op, "x c", "t"), ("Conv", "t w b", "y", pads)]
    stays = op in ("Add", "Sub") and pads not in ({}, dict(auto_pad="VALID"))
    assert fused(model_of(nodes, IMAGE, **conv(), c=np.array([1.7]))) == ([op, "Conv"] if stays else ["Conv"])


def test_before_a_grouped_or_depthwise_convolution():
    for group in (2, 4):
        constants = dict(w=rng().standard_normal((4, 4 // group, 3, 3)), c=np.array(1.7), d=np.array(-0.3))
        nodes = [("Mul", "x c", "t"), ("Add", "t d", "u"), ("Conv", "u w", "y", dict(group=group))]
        assert fused(model_of(nodes, {"x": (1, 4, 5, 5)}, **constants)) == ["Conv"]


@pytest.mark.parametrize("trans", [0, 1])
def test_before_a_gemm(trans):
    constants = dict(w=rng().standard_normal((4, 4)), c=np.array(1.7), d=np.array([[-0.3]]), b=np.array(0.5))
    gemm = ("Gemm", "u w b", "y", dict(transA=trans, transB=trans))
    nodes = [("Mul", "x c", "t"), ("Sub", "t d", "u"), gemm]
    assert fused(model_of(nodes, {"x": (4, 4)}, **constants)) == ["Gemm"]


def test_before_a_transposed_convolution_or_a_product_only_scales_fold():
    constants = dict(w=rng().standard_normal((4, 2, 2, 2)), c=np.array(1.7))
    for op, expected in (("Div", ["ConvTranspose"]), ("Add", ["Add", "ConvTranspose"])):
        assert fused(model_of([(op, "x c", "t"), ("ConvTranspose", "t w", "y")], {"x": (1, 4, 3, 3)}, **constants)) == (
            expected
        )
    for op, expected in (("Mul", ["MatMul"]), ("Sub", ["Sub", "MatMul"])):
        nodes = [(op, "x c", "t"), ("MatMul", "t w", "y")]
        assert fused(model_of(nodes, {"x": (3, 4)}, w=rng().standard_normal((4, 5)), c=constants["c"])) == expected


def test_what_stays_before():
    stays = {
        "two readers": ([("Mul", "x c", "t"), ("Conv", "t w b", "u"), ("Neg", "t", "z")], IMAGE, ("u", "z")),
        "an output": ([("Mul", "x c", "t"), ("Conv", "t w b", "u")], IMAGE, ("u", "t")),
        "constant first": ([("Div", "c x", "t"), ("Conv", "t w b", "y")], IMAGE, ("y",)),
        "enlarged": ([("Mul", "x five", "t"), ("MatMul", "t m", "y")], {"x": (3, 4)}, ("y",)),
        "not a scalar": ([("Mul", "x three", "t"), ("Conv", "t w b", "y")], IMAGE, ("y",)),
        "the weight of it": ([("Mul", "v c", "t"), ("Conv", "x t", "y")], IMAGE | {"v": (4, 3, 3, 3)}, ("y",)),
        "division by zero": ([("Div", "x zero", "t"), ("Conv", "t w b", "y")], IMAGE, ("y",)),
    }
    constants = conv() | dict(c=np.array(1.7), five=np.full((1, 1, 1), 2.0), three=np.ones((3, 1, 1)) * 2)
    constants |= dict(zero=np.zeros(1), m=rng().standard_normal((4, 5)))
    for why, (nodes, shapes, outputs) in stays.items():
        used = {name for node in nodes for name in node[1].split()}
        model = model_of(nodes, shapes, outputs, **{key: value for key, value in constants.items() if key in used})
        new = fuse.fuse(model)
        assert [node.op_type for node in new.graph.node] == [node[0] for node in nodes], why


# -- what does nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "constant", "gone"),
    [
        ("Mul", np.ones(()), True),
        ("Div", np.ones((1, 3, 1, 1)), True),
        ("Add", np.zeros((3, 1, 1)), True),
        ("Sub", np.zeros(5), True),
        ("Mul", np.ones((2, 1, 1, 1)), False),
        ("Add", np.zeros((1, 1, 1, 1, 1)), False),
        ("Mul", np.array([1.0, 1, 2, 1, 1]), False),
        ("Add", np.ones(1), False),
    ],
)
def test_neutral_constants_go_if_they_keep_the_shape(op, constant, gone):
    nodes = [("Neg", "x", "s"), (op, "s c", "t"), ("Abs", "t", "y")]
    assert fused(model_of(nodes, IMAGE, c=constant)) == (["Neg", "Abs"] if gone else ["Neg", op, "Abs"])


def test_one_divided_by_and_zero_minus_are_not_neutral():
    for op, value in (("Div", 1.0), ("Sub", 0.0)):
        nodes = [("Exp", "x", "s"), (op, "c s", "t"), ("Abs", "t", "y")]
        assert fused(model_of(nodes, IMAGE, c=np.array(value))) == ["Exp", op, "Abs"]


def test_neutral_integers_go_too():
    model = model_of([("Mul", "x c", "t"), ("Abs", "t", "y")], {"x": (3,)}, kind=np.int64, c=np.array([1]))
    assert fused(model) == ["Abs"]


def test_identities_between_input_and_output_stay():
    nodes = [("Identity", "x", "y"), ("Identity", "x", "s"), ("Identity", "s", "t"), ("Neg", "t", "u")]
    model = model_of([*nodes, ("Identity", "u", "z")], IMAGE, ("y", "z", "u"))
    assert sorted(fused(model)) == ["Identity", "Identity", "Neg"]


def test_dropout_goes_unless_it_drops_or_tells():
    ratio = dict(r=np.array(0.5, np.float32), no=np.array(False), yes=np.array(True))
    for inputs, result, outputs, gone in (
        ("x", "t", ("y",), True),
        ("x r no", "t", ("y",), True),
        ("x", "t m", ("y",), True),
        ("x", "t m", ("y", "m"), False),
    ):
        nodes = [("Dropout", inputs, result), ("Neg", "t", "y")]
        used = {key: value for key, value in ratio.items() if key in inputs.split()}
        assert fused(model_of(nodes, IMAGE, outputs, **used)) == (["Neg"] if gone else ["Dropout", "Neg"])
    training = model_of([("Dropout", "x r yes", "t"), ("Neg", "t", "y")], IMAGE, r=ratio["r"], yes=ratio["yes"])
    assert [node.op_type for node in fuse.fuse(training).graph.node] == ["Dropout", "Neg"]


# -- hard swish ------------------------------------------------------------------------------------------------------

GATE = [("Add", "x three", "a"), ("Clip", "a zero six", "g")]
NUMBERS = dict(three=np.array(3.0), zero=np.array(0.0), six=np.array(6.0), sixth=np.array([SIXTH]), one=np.array(1.0))
NUMBERS |= dict(half=np.array(0.5))
SWISHES = {
    "(x * g) / 6": [*GATE, ("Mul", "x g", "p"), ("Div", "p six", "y")],
    "(g * x) * (1/6)": [*GATE, ("Mul", "g x", "p"), ("Mul", "sixth p", "y")],
    "x * (g / 6)": [*GATE, ("Div", "g six", "q"), ("Mul", "x q", "y")],
    "(g * 1/6) * x": [*GATE, ("Mul", "g sixth", "q"), ("Mul", "q x", "y")],
    "(x / 6) * g": [*GATE, ("Div", "x six", "q"), ("Mul", "q g", "y")],
    "3 + x": [("Add", "three x", "a"), GATE[1], ("Mul", "x g", "p"), ("Div", "p six", "y")],
    "hard sigmoid": [("HardSigmoid", "x", "g", dict(alpha=1 / 6, beta=0.5)), ("Mul", "g x", "y")],
    "clip(x / 6 + 1/2, 0, 1)": [
        ("Div", "x six", "q"), ("Add", "q half", "a"), ("Clip", "a zero one", "g"), ("Mul", "x g", "y")
    ],
}  # fmt: skip


def swish_model(nodes, shape=(1, 3, 5, 5), outputs=("y",), kind=np.float32, **numbers):
    used = {name for node in nodes for name in node[1].split(" ")}
    constants = {key: value for key, value in (NUMBERS | numbers).items() if key in used}
    return model_of(nodes, {"x": shape}, outputs, kind, **constants)


@pytest.mark.parametrize("written", SWISHES)
def test_every_way_to_write_a_hard_swish_is_recognized(written):
    nodes = SWISHES[written]
    assert fused(swish_model(nodes)) == ["HardSwish"]
    assert sorted(fused(swish_model([*nodes, ("Neg", "x", "z")], outputs=("y", "z")))) == ["HardSwish", "Neg"]
    seen = "HardSwish" in fused(swish_model(nodes, outputs=("y", "g")))
    assert not seen, "a gate that is an output cannot be fused away"
    read = [*nodes, ("Neg", "g", "z")]
    assert "HardSwish" not in fused(swish_model(read, outputs=("y", "z")))


def test_what_only_looks_like_a_hard_swish_stays():
    base = SWISHES["(x * g) / 6"]
    others = {
        "no lower limit": [GATE[0], ("Clip", "a  six", "g"), *base[2:]],
        "no upper limit": [GATE[0], ("Clip", "a zero", "g"), *base[2:]],
        "another tensor": [("Neg", "x", "n"), *GATE, ("Mul", "n g", "p"), base[3]],
        "6 / (x * g)": [*base[:3], ("Div", "six p", "y")],
        "times 6": [*base[:3], ("Mul", "p six", "y")],
        "3 - x": [("Sub", "three x", "a"), *base[1:]],
        "x - 3": [("Sub", "x three", "a"), *base[1:]],
        "hard sigmoid of slope 1/5": [("HardSigmoid", "x", "g"), ("Mul", "x g", "y")],
        "x * x / 6": [("Mul", "x x", "p"), ("Div", "p six", "y")],
        "g * g": [*GATE, ("Mul", "g g", "p"), ("Div", "p six", "y")],
        "x * x * g / 6": [*GATE, ("Mul", "x g", "p"), ("Mul", "p x", "q"), ("Div", "q six", "y")],
    }
    for why, nodes in others.items():
        assert "HardSwish" not in fused(swish_model(nodes)), why
    assert "HardSwish" not in fused(swish_model(base, three=np.array([3.0, 3.1, 3, 3, 3]))), "a shift that varies"
    assert "HardSwish" not in fused(swish_model(base, shape=(5,), three=np.array([[3.0]]))), "a shift that enlarges"
    assert "HardSwish" not in fused(swish_model(base, six=np.array(6.01)))


def test_integers_have_no_hard_swish():
    numbers = {key: np.array(int(value)) for key, value in (("three", 3), ("zero", 0), ("six", 6))}
    model = swish_model(SWISHES["(x * g) / 6"], kind=np.int64, **numbers)
    assert "HardSwish" not in fused(model)


def test_two_hard_swishes_and_nodes_of_one_name():
    nodes = [(op, *(" ".join(n + "1" if n not in NUMBERS and n != "x" else n for n in part.split()) for part in rest))
             for op, *rest in SWISHES["(x * g) / 6"]]  # fmt: skip
    nodes[-1] = ("Div", "p1 six", "m")
    second = [(op, *(" ".join("m" if n == "x" else n for n in part.split()) for part in rest))
              for op, *rest in SWISHES["x * (g / 6)"]]  # fmt: skip
    model = swish_model([*nodes, *second])
    for node in model.graph.node:
        node.name = "same"
    new = fuse.fuse(model)  # ONNX allows it, ONNX Runtime does not
    assert [node.op_type for node in new.graph.node] == ["HardSwish", "HardSwish"]
    feeds = feeds_of(model)
    for index, node in enumerate(model.graph.node):
        node.name = f"node {index}"
    np.testing.assert_allclose(run(new, feeds)[0], run(model, feeds)[0], rtol=1e-5, atol=1e-5)


# -- branches --------------------------------------------------------------------------------------------------------


def branches(*read):
    """then_branch and else_branch of an If that read a tensor of the graph around it each."""
    graphs = []
    for index, name in enumerate(read):
        out = f"inside{index}"
        result = helper.make_empty_tensor_value_info(out)
        graphs.append(helper.make_graph([helper.make_node("Neg", [name], [out])], "branch", [], [result]))
    return dict(then_branch=graphs[0], else_branch=graphs[1])


def with_branch(nodes, read, shapes=IMAGE, **constants):
    model = model_of(nodes, shapes, **constants)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["z"], name="if", **branches(*read)))
    model.graph.output.append(helper.make_empty_tensor_value_info("z"))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("read", ["t", "w", "b"])
def test_what_a_branch_reads_keeps_its_value(read):
    nodes = [("Conv", "x w b", "t"), ("Mul", "t c", "y")]
    assert fused(with_branch(nodes, (read, read), **conv(), c=np.full((4, 1, 1), 2.0))) == ["Conv", "Mul", "If"]


def test_a_neutral_node_that_a_branch_reads_stays():
    assert fused(with_branch([("Identity", "x", "t"), ("Neg", "t", "y")], ("t", "x"))) == ["Identity", "Neg", "If"]
    assert "HardSwish" not in fused(with_branch(SWISHES["x * (g / 6)"], ("q", "x"), three=3.0, zero=0.0, six=6.0))


# -- anything --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_chains_of_anything_compute_the_same(data):
    """Convolutions and arithmetic with constants of random shapes, some tensors read twice."""
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    nodes, constants, last = [], {}, "x"
    shapes = [(), (1,), (6,), (3, 1, 1), (1, 3, 1, 1), (1, 1, 1, 1), (3, 1, 1, 1), (1, 1, 6), (1, 1, 1, 6)]
    for index in range(data.draw(st.integers(2, 8))):
        op = data.draw(st.sampled_from(["Conv", "Mul", "Add", "Sub", "Div", "Relu", "Add twice"]))
        made, constant = f"t{index}", f"c{index}"
        if op == "Conv":
            pads = [data.draw(st.sampled_from([0, 1]))] * 4
            k = 1 + 2 * pads[0]
            constants[constant] = random.standard_normal((3, 3, k, k)) / 3
            nodes.append((op, f"{last} {constant}", made, dict(pads=pads)))
        elif op in ("Relu", "Add twice"):
            nodes.append((op.split()[0], last if op == "Relu" else f"{last} {last}", made))
        else:
            shape = data.draw(st.sampled_from(shapes))
            constants[constant] = random.uniform(0.5, 2, shape)
            first = data.draw(st.booleans()) and op in ("Mul", "Add")
            nodes.append((op, f"{constant} {last}" if first else f"{last} {constant}", made))
            if shape == (3, 1, 1, 1):
                nodes.append(("ReduceMean", made, f"{made}.mean", dict(noop_with_empty_axes=1)))
                made = f"{made}.mean"
                break
        last = made
    outputs = tuple({made, data.draw(st.sampled_from([node[2] for node in nodes]))})
    fused(model_of(nodes, {"x": (1, 3, 6, 6)}, outputs, **constants), rtol=1e-4)


def chain(nodes):
    """Residual blocks of a 1x1 convolution, a scale, a shift, a sum and a Relu."""
    random, made, constants, last = rng(), [], {}, "x"
    for block in range(nodes // 5):
        constants[f"w{block}"] = random.standard_normal((4, 4, 1, 1)) / 4
        constants[f"m{block}"] = random.uniform(0.5, 1, (4, 1, 1))
        c, m, a, s, r = (f"{part}{block}.t" for part in "cmasr")
        made += [("Conv", f"{last} w{block}", c), ("Mul", f"{c} m{block}", m), ("Add", f"m{block} {m}", a)]
        made += [("Add", f"{a} {last}", s), ("Relu", s, r)]
        last = r
    return model_of(made, {"x": (1, 4, 3, 3)}, (last,), **constants)


def test_thousands_of_nodes_take_seconds():
    model = chain(2000)
    start = time.perf_counter()
    new = fuse.fuse(model)
    took = time.perf_counter() - start
    assert fuse.count(new) == {"Conv": 400, "Add": 400, "Relu": 400}
    assert took < 3
    small = chain(50)
    assert fused(small, rtol=1e-4).count("Conv") == 10
