"""Networks in pieces: piece by piece they give what they give whole, and only what follows a change runs again."""

import numpy as np
import onnx
import pytest
from onnx import helper

from qtools import zoo
from qtools.ptq import fuse, graph
from qtools.ptq.convert import Options, Runner, quantize_network
from qtools.ptq.stages import Stages


@pytest.fixture(scope="module")
def digits() -> onnx.ModelProto:
    return fuse.fuse(graph.prepare(zoo.digits_cnn()))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return zoo.digits()[2][:20]


def ends(network: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in network.graph.node if node.op_type == "Conv"]


def test_the_pieces_give_what_the_whole_gives(digits, images) -> None:
    stages, state = Stages(digits, ends(digits)), {"input": images}
    for piece, cut in enumerate(stages.cuts):
        state = stages.run(piece, state)
        assert np.array_equal(state[cut], Runner(digits, [cut])(images)[0])
    assert np.array_equal(stages.run(len(stages) - 1, state)["output"], Runner(digits, ["output"])(images)[0])


def test_a_state_holds_what_is_still_needed_and_no_more(digits, images) -> None:
    stages, state = Stages(digits, ends(digits)), {"input": images}
    for piece in range(len(stages)):
        state = stages.run(piece, state)
        assert stages.needed(piece + 1) <= state.keys() and len(state) <= 2
    assert list(state) == ["output"]


def test_several_pieces_run_as_one(digits, images) -> None:
    stages = Stages(digits, ends(digits))
    behind = stages.run(0, {"input": images}, 3)
    out = stages.run(3, behind, len(stages))["output"]
    assert np.array_equal(out, Runner(digits, ["output"])(images)[0])


def test_a_weight_that_is_fed_can_be_another_at_every_run(digits, images) -> None:
    weight = graph.weights(digits)["b2.pw"]
    stages = Stages(digits, ends(digits), fed=[weight.name])
    state = {"input": images, weight.name: weight.values}
    for piece in range(4):
        state = stages.run(piece, state)
    for values in (weight.values, weight.values * np.float32(0.5)):
        out = stages.run(4, {**state, weight.name: values}, len(stages))["output"]
        changed = graph.replace_weights(digits, {weight.name: values})
        assert np.array_equal(out, Runner(changed, ["output"])(images)[0])


def test_a_piece_of_a_quantized_network_takes_and_gives_codes(digits, images) -> None:
    network = quantize_network(digits, [{"input": images}], Options()).network
    codes = [node.output[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]
    stages, state = Stages(network, codes), {"input": images}
    for piece, name in enumerate(codes):
        _, given, found = stages.model(piece, piece + 1)
        assert found == [name] and (piece == 0 or given == [codes[piece - 1]])
        state = stages.run(piece, state)
        assert state[name].dtype == np.uint8
    assert np.array_equal(state["output.codes"], Runner(network, ["output.codes"])(images)[0])


def test_a_tensor_that_skips_pieces_is_kept(images) -> None:
    nodes = [
        helper.make_node("Relu", ["input"], ["a"], "a"),
        helper.make_node("Exp", ["a"], ["b"], "b"),
        helper.make_node("Add", ["b", "input"], ["output"], "c"),
    ]
    shape = list(images.shape)
    entries = [helper.make_tensor_value_info(name, 1, shape) for name in ("input", "output")]
    model = helper.make_model(
        helper.make_graph(nodes, "skip", entries[:1], entries[1:]), opset_imports=[helper.make_opsetid("", 21)]
    )
    stages = Stages(model, ["a", "b"])
    state = stages.run(1, stages.run(0, {"input": images}))
    assert set(state) == {"b", "input"}
    assert np.allclose(stages.run(2, state)["output"], np.exp(np.maximum(images, 0)) + images, rtol=1e-6)


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (["nowhere"], "the network computes no tensor 'nowhere'"),
        (["b2.bn2", "bn"], "the cut 'bn' is computed on the way to an earlier one"),
    ],
)
def test_cuts_that_do_not_fit_are_refused(digits, cuts, message) -> None:
    with pytest.raises(ValueError, match=message):
        Stages(digits, cuts)


def test_the_network_given_stays_as_it_was(digits) -> None:
    before = digits.SerializeToString()
    Stages(digits, ends(digits)).run(0, {"input": np.zeros((1, 1, 8, 8), np.float32)})
    assert digits.SerializeToString() == before
