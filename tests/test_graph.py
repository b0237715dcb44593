"""Networks made fit for quantization compute what they computed before, and bad ones are named at the door."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qtools import zoo
from qtools.ptq import graph

REAL = {
    "digits": (zoo.digits_cnn, "input", (2, 1, 8, 8)),
    "recognizer": (zoo.text_recognizer, "x", (1, 3, 48, 320)),
    "classifier": (zoo.direction_classifier, "x", (1, 3, 48, 192)),
    "efficientnet": (zoo.efficientnet_lite0, "x", (1, 3, 224, 224)),
}


def run(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


@pytest.mark.parametrize("name", REAL)
def test_real_networks_compute_the_same_when_prepared(name):
    network, entry, shape = REAL[name]
    original = network()
    before = original.SerializeToString()
    prepared = graph.prepare(original, {entry: shape})
    assert original.SerializeToString() == before, "the model given was changed"
    onnx.checker.check_model(prepared, full_check=True)
    assert prepared.opset_import[0].version == graph.OPSET
    kinds = {node.op_type for node in prepared.graph.node}
    assert not kinds & {"BatchNormalization", "Constant", "Shape", "Cast"}
    names = [node.name for node in prepared.graph.node]
    assert all(names) and len(set(names)) == len(names)
    assert all(dim.dim_value > 0 for out in prepared.graph.output for dim in out.type.tensor_type.shape.dim)
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    old, new = run(original, {entry: x})[0], run(prepared, {entry: x})[0]
    np.testing.assert_allclose(new, old, rtol=2e-3, atol=2e-4 * np.abs(old).max())


@pytest.mark.parametrize(
    ("name", "count"), [("digits", 8), ("recognizer", 47), ("classifier", 54), ("efficientnet", 50)]
)
def test_all_weights_are_found_with_one_row_a_channel(name, count):
    network, entry, shape = REAL[name]
    found = graph.weights(graph.prepare(network(), {entry: shape}))
    assert len(found) == count
    for weight in found.values():
        assert weight.rows.shape[0] == weight.values.shape[weight.channel_axis]
        assert weight.rows.size == weight.values.size


def test_depthwise_convolutions_are_told_apart():
    found = graph.weights(graph.prepare(zoo.digits_cnn()))
    assert [name for name, weight in found.items() if weight.depthwise] == ["b1.dw", "b2.dw", "b3.dw"]


def test_rows_of_a_matmul_are_its_columns():
    w = graph.Weight("m", "MatMul", "w", np.arange(6.0).reshape(2, 3), 1)
    assert w.rows.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_weights_can_be_replaced():
    prepared = graph.prepare(zoo.digits_cnn(), {"input": (1, 1, 8, 8)})
    weight = graph.weights(prepared)["stem"]
    changed = graph.replace_weights(prepared, {weight.name: weight.values * 2})
    np.testing.assert_array_equal(graph.weights(changed)["stem"].values, weight.values * 2)
    np.testing.assert_array_equal(graph.weights(prepared)["stem"].values, weight.values)
    with pytest.raises(ValueError, match="no initializer 'nothing'"):
        graph.replace_weights(prepared, {"nothing": weight.values})
    with pytest.raises(ValueError, match="of shape"):
        graph.replace_weights(prepared, {weight.name: weight.values[:1]})


# -- BatchNorm -------------------------------------------------------------------------------------------------------


def network(op="Conv", bias=True, *, group=1, shared=False, used_twice=False, opset=13, seed=0, **attributes):
    """A convolution or Gemm, a BatchNorm behind it, and what may keep them apart."""
    rng = np.random.default_rng(seed)
    shape = {"Conv": (4, 4 // group, 3, 3), "ConvTranspose": (4, 4 // group, 3, 3), "Gemm": (4, 4)}[op]
    constants = {"w": rng.standard_normal(shape)} | {key: rng.uniform(0.5, 2, 4) for key in ("g", "s", "m", "v")}
    operands = ["x", "w"]
    if bias:
        constants["b"] = rng.standard_normal(4)
        operands.append("b")
    if op != "Gemm":
        attributes |= dict(kernel_shape=[3, 3], group=group)
    nodes = [
        helper.make_node(op, operands, ["y"], **attributes),
        helper.make_node("BatchNormalization", ["y", "g", "s", "m", "v"], ["z"], epsilon=0.02),
    ]
    outputs = ["z"]
    if shared:
        nodes.append(helper.make_node(op, operands, ["other"], **attributes))
        outputs.append("other")
    if used_twice:
        outputs.append("y")
    size = [1, 4] if op == "Gemm" else [1, 4, 6, 6]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(size)) for name in outputs],
            [numpy_helper.from_array(value.astype(np.float32), key) for key, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    return model, {"x": rng.standard_normal(size).astype(np.float32)}


@settings(deadline=None, max_examples=25)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose", "Gemm"]),
    bias=st.booleans(),
    group=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 50),
    opset=st.sampled_from([9, 11, 13, 17, 21]),
)
def test_folding_keeps_the_function(op, bias, group, seed, opset):
    if opset < 11 and op == "Gemm" and not bias:
        return  # a Gemm needed its third operand then
    model, feeds = network(op, bias, group=1 if op == "Gemm" else group, seed=seed, opset=opset)
    prepared = graph.prepare(model)
    folded = op != "ConvTranspose" or group == 1
    assert [node.op_type for node in prepared.graph.node] == ([op] if folded else [op, "BatchNormalization"])
    np.testing.assert_allclose(run(prepared, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "apart", [dict(shared=True), dict(used_twice=True), dict(op="Gemm", alpha=0.5), dict(op="Gemm", beta=2.0)]
)
def test_what_cannot_be_folded_stays(apart):
    model, feeds = network(**apart)
    prepared = graph.prepare(model)
    assert "BatchNormalization" in [node.op_type for node in prepared.graph.node]
    for new, old in zip(run(prepared, feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_unused_nodes_and_constants_are_dropped_but_those_of_branches_kept():
    inner = helper.make_graph(
        [helper.make_node("Add", ["x", "only_inside"], ["chosen"])],
        "then",
        [],
        [helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [2])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["chosen_too"])],
        "else",
        [],
        [helper.make_tensor_value_info("chosen_too", TensorProto.FLOAT, [2])],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=other),
        helper.make_node("Exp", ["x"], ["unused"]),
    ]
    constants = {"only_inside": np.ones(2, np.float32), "unused_too": np.ones(2, np.float32)}
    entries = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    output = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])]
    tensors = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", entries, output, tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    model.ir_version = 10
    prepared = graph.prepare(model)
    assert [node.op_type for node in prepared.graph.node] == ["If"]
    assert [tensor.name for tensor in prepared.graph.initializer] == ["only_inside"]
    feeds = {"x": np.ones(2, np.float32), "flag": np.array(True)}
    np.testing.assert_array_equal(run(prepared, feeds)[0], [2, 2])


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        ({"y": (1, 3, 48, 320)}, "has no input 'y': it has x"),
        ({"x": (1, 3, 48)}, "'x' has 4 axes"),
        ({"x": (1, 4, 48, 320)}, "'x' has a fixed size of 3, got 4"),
        ({"x": (0, 3, 48, 320)}, "of positive size"),
    ],
)
def test_wrong_shapes_are_named(shapes, sentence):
    with pytest.raises(ValueError, match=sentence):
        graph.prepare(zoo.text_recognizer(), shapes)


def test_what_is_no_network_is_refused_in_one_line():
    broken = zoo.digits_cnn()
    broken.graph.node[0].op_type = "Convolve"
    for model in (onnx.ModelProto(), broken):
        with pytest.raises(ValueError) as caught:
            graph.prepare(model)
        assert "\n" not in str(caught.value)
