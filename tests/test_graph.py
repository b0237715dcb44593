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


# -- what real files come with ----------------------------------------------------------------------------------------


def chain(nodes, constants, *, opset=21, inputs=None, outputs=("y",), shape=(3,)):
    inputs = inputs or [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape)) for name in outputs]
    tensors = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph_ = helper.make_graph(nodes, "g", inputs, results, tensors)
    return helper.make_model(graph_, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_constants_that_are_listed_as_inputs_too_are_constants():
    model, feeds = network(opset=9)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    prepared = graph.prepare(model)
    assert [entry.name for entry in prepared.graph.input] == ["x"]
    np.testing.assert_allclose(run(prepared, feeds)[0], run(model, feeds)[0], rtol=1e-4, atol=1e-4)


def test_a_batch_norm_in_training_mode_stays():
    model, _ = network(opset=17)
    node = model.graph.node[1]
    node.attribute.append(helper.make_attribute("training_mode", 1))
    node.output.extend(["mean", "variance"])
    assert [node.op_type for node in graph.prepare(model).graph.node] == ["Conv", "BatchNormalization"]


@pytest.mark.parametrize("captured", ["y", "w"])
def test_what_a_branch_reads_is_not_folded_away(captured):
    model, feeds = network(opset=21)
    size = [4, 4, 3, 3] if captured == "w" else [1, 4, 4, 4]
    output = [helper.make_tensor_value_info("t", TensorProto.FLOAT, size)]
    branch = helper.make_graph([helper.make_node("Neg", [captured], ["t"])], "b", [], output)
    other = helper.make_graph([helper.make_node("Abs", [captured], ["t"])], "c", [], output)
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["flag"], ["chosen"], then_branch=branch, else_branch=other))
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, size))
    feeds = feeds | {"flag": np.array(True)}
    for new, old in zip(run(graph.prepare(model), feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_a_bias_that_is_added_gets_a_name_of_its_own():
    model, feeds = network(bias=False)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "w.bias"))
    model.graph.node.append(helper.make_node("Mul", ["z", "w.bias"], ["doubled"]))
    model.graph.output.append(helper.make_tensor_value_info("doubled", TensorProto.FLOAT, [None] * 4))
    for new, old in zip(run(graph.prepare(model), feeds), run(model, feeds), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)


def test_local_functions_are_written_out():
    double = helper.make_function(
        "mine", "Double", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = chain([helper.make_node("Double", ["x"], ["y"], domain="mine")], {}, opset=17)
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.functions.append(double)
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(run(graph.prepare(model), {"x": x})[0], 2 * x)


def test_unknown_sizes_are_not_taken_for_known_ones():
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3, -1])
    model = chain([helper.make_node("Shape", ["x"], ["s"]), helper.make_node("Cast", ["s"], ["y"], to=1)], {})
    del model.graph.input[:]
    model.graph.input.append(entry)
    assert "Shape" in [node.op_type for node in graph.prepare(model).graph.node]
    known = graph.prepare(model, {"x": (2, 3, 5)})
    assert known.graph.node == [] or "Shape" not in [node.op_type for node in known.graph.node]


def test_part_of_a_shape_is_folded_as_it_is_asked_for():
    nodes = [helper.make_node("Shape", ["x"], ["s"], start=-2, end=-1), helper.make_node("Cast", ["s"], ["c"], to=1)]
    nodes.append(helper.make_node("Add", ["x", "c"], ["y"]))
    prepared = graph.prepare(chain(nodes, {}, shape=(2, 5, 3)))
    assert [node.op_type for node in prepared.graph.node] == ["Add"]
    np.testing.assert_array_equal(numpy_helper.to_array(prepared.graph.initializer[0]), [5])


@pytest.mark.parametrize("op", ["RandomUniformLike", "Bernoulli"])
def test_what_is_drawn_anew_at_every_run_is_not_a_constant(op):
    nodes = [helper.make_node(op, ["c"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    prepared = graph.prepare(chain(nodes, {"c": np.full(3, 0.5, np.float32)}))
    assert [node.op_type for node in prepared.graph.node] == [op, "Add"]


def test_a_constant_too_large_to_keep_is_left_to_be_computed():
    nodes = [helper.make_node("ConstantOfShape", ["n"], ["c"]), helper.make_node("ReduceSum", ["c"], ["t"], keepdims=0)]
    nodes.append(helper.make_node("Add", ["x", "t"], ["y"]))
    prepared = graph.prepare(chain(nodes, {"n": np.array([2**44], np.int64)}))
    assert "ConstantOfShape" in [node.op_type for node in prepared.graph.node]


def test_what_the_reference_cannot_evaluate_stays():
    nodes = [helper.make_node("Gather", ["c", "far"], ["r"]), helper.make_node("Add", ["x", "r"], ["y"])]
    model = chain(nodes, {"c": np.ones(3, np.float32), "far": np.array([7], np.int64)})
    assert [node.op_type for node in graph.prepare(model).graph.node] == ["Gather", "Add"]


def test_nodes_of_one_name_get_two_and_weights_wants_them_apart():
    first = helper.make_node("MatMul", ["x", "a"], ["m"], name="same")
    nodes = [first, helper.make_node("MatMul", ["m", "b"], ["y"], name="same")]
    model = chain(nodes, {"a": np.eye(3, dtype=np.float32), "b": np.ones((3, 3), np.float32)}, shape=(1, 3))
    assert list(graph.weights(graph.prepare(model))) == ["same", "same.2"]
    with pytest.raises(ValueError, match="two nodes are called 'same': prepare the network first"):
        graph.weights(model)


def test_a_size_two_inputs_share_by_name_is_fixed_in_both():
    entries = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xz"]
    model = chain([helper.make_node("Add", ["x", "z"], ["y"])], {}, inputs=entries, shape=(1, 3))
    prepared = graph.prepare(model, {"x": (4, 3)})
    assert [entry.type.tensor_type.shape.dim[0].dim_value for entry in prepared.graph.input] == [4, 4]


@pytest.mark.parametrize("shape", [(3.7, 2), None, "ab", 5])
def test_a_shape_of_other_than_whole_numbers_is_refused(shape):
    with pytest.raises((ValueError, TypeError), match=r"whole numbers|not iterable"):
        graph.prepare(zoo.digits_cnn(), {"input": shape})


def test_weights_go_back_into_their_own_layout_and_type():
    for axis, shape in ((0, (4, 3, 2, 2)), (1, (3, 4)), (1, (3, 4, 2, 2))):
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        weight = graph.Weight("n", "Conv", "w", values, axis)
        assert weight.rows.shape[0] == shape[axis]
        np.testing.assert_array_equal(weight.from_rows(weight.rows), values)
    model = chain([helper.make_node("MatMul", ["x", "a"], ["y"])], {"a": np.eye(3, dtype=np.float16)}, shape=(1, 3))
    changed = graph.replace_weights(model, {"a": np.ones((3, 3), np.float64)})
    assert numpy_helper.to_array(changed.graph.initializer[0]).dtype == np.float16


def test_a_transposed_convolution_in_groups_has_no_rows():
    model, _ = network("ConvTranspose", group=2)
    assert graph.weights(graph.prepare(model)) == {}
