"""Equalized networks compute what they did, from weights as others make them; corrected biases restore the means."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qtools import zoo
from qtools.affine import dequantize, quantize
from qtools.metrics import sqnr_db
from qtools.ptq import fuse, graph
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, Runner, quantize_network
from qtools.ptq.equalize import absorb_high_biases, correct_biases, equalize

DATA = Path(__file__).parent / "data"
TRAIN, _, IMAGES, LABELS = zoo.digits()


def constants_of(network):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in network.graph.initializer}


def prepared(model, shapes=None):
    return fuse.fuse(graph.prepare(model, shapes))


def with_relus(network):
    """The same network without upper bounds."""
    network = graph.copy_of(network)
    for node in network.graph.node:
        if node.op_type == "Clip":
            node.op_type, node.input[:] = "Relu", node.input[:1]
    graph.drop_unused(network)
    return network


MINI, SKEW = (prepared(zoo.digits_cnn(which)) for which in ("mini", "skew"))
LOGITS = {"mini": Runner(MINI, ["output"])(IMAGES)[0], "skew": Runner(SKEW, ["output"])(IMAGES)[0]}


def chosen(seed):
    """The calibration images that the peers had."""
    return [TRAIN[np.random.default_rng(1000 + seed).choice(1257, 256, replace=False)]]


def small(*nodes, shape=(2, 3, 6, 6), outputs=("y",), seed=0, **constants):
    """A prepared network from (op, inputs, output[, attributes]); constants given as shapes are drawn."""
    random = np.random.default_rng(seed)
    arrays = {
        # channels of very different sizes, on every axis
        name: random.standard_normal(value) * np.exp(random.uniform(-2, 2, value)) if type(value) is tuple else value
        for name, value in constants.items()
    }
    made = [
        helper.make_node(op, inputs.split(), [output], name=output, **(more[0] if more else {}))
        for op, inputs, output, *more in nodes
    ]
    kinds = {True: np.float32, False: np.int64}
    model = helper.make_model(
        helper.make_graph(
            made,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [
                numpy_helper.from_array(np.asarray(a, kinds[np.asarray(a).dtype.kind == "f"]), k)
                for k, a in arrays.items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", graph.OPSET)],
        ir_version=10,
    )
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for entry in model.graph.output:
        assert entry.type.tensor_type.elem_type == TensorProto.FLOAT
    return fuse.with_shapes(graph.prepare(model))


def inputs_of(network, count=3):
    shape = [dim.dim_value for dim in network.graph.input[0].type.tensor_type.shape.dim]
    return [np.random.default_rng(seed).standard_normal(shape).astype(np.float32) for seed in range(count)]


def assert_same_function(before, after, samples, rtol=1e-5):
    names = [entry.name for entry in before.graph.output]
    onnx.checker.check_model(after, full_check=True)
    for sample in samples:
        for old, new in zip(Runner(before, names)(sample), Runner(after, names)(sample), strict=True):
            np.testing.assert_allclose(new, old, rtol=0, atol=rtol * np.abs(old).max())


def assert_balanced(pairs):
    for pair in pairs:
        made, read = pair.ranges()
        np.testing.assert_allclose(made, read, rtol=1e-5)


# -- equalization: against AIMET, against the paper, and its laws ----------------------------------------------------


def test_one_sweep_gives_the_weights_of_aimet():
    """AIMET makes one sweep, and none of the pair around the global pool; that pair comes last and is undone here."""
    with np.load(DATA / "aimet_cle.npz") as file:
        expected = {key: file[key] for key in file.files}
    made = equalize(SKEW, iterations=1)
    found, last = constants_of(made.network), made.pairs[-1]
    assert (last.first.name, last.second.name, last.between) == (
        "b3.pw",
        "fc",
        ("Relu", "GlobalAveragePool", "Flatten"),
    )
    found["b3.pw.weight"] = found["b3.pw.weight"] * last.factors[:, None, None, None]
    found["b3.pw.weight.bias"] = found["b3.pw.weight.bias"] * last.factors
    found["fc.weight"] = found["fc.weight"] / last.factors
    found = {key.replace(".weight.bias", ".bias"): value for key, value in found.items()}
    assert set(found) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-6, err_msg=key)


def scalar_equalization(weights, sweeps):
    """Section 4.1, pair by pair and channel by channel; weights (outputs, inputs or 1, places), depthwise if 1."""
    weights = [weight.astype(np.float64).copy() for weight in weights]
    for _ in range(sweeps):
        for first, second in itertools.pairwise(weights):
            for i in range(len(first)):
                row = second[i] if second.shape[1] == 1 else second[:, i]
                r1, r2 = max(abs(v) for v in first[i].ravel()), max(abs(v) for v in row.ravel())
                s = (r1 * r2) ** 0.5 / r2
                first[i] /= s
                row *= s
    return weights


def test_convergence_is_that_of_the_equations_of_the_paper():
    network = small(
        ("Conv", "x a ab", "u"),
        ("Relu", "u", "v"),
        ("Conv", "v b bb", "w", {"group": 4}),
        ("LeakyRelu", "w", "z"),
        ("Conv", "z c cb", "y"),
        **{"a": (4, 3, 3, 3), "ab": (4,), "b": (4, 1, 2, 2), "bb": (4,), "c": (5, 4, 1, 1), "cb": (5,)},
    )
    before, after = constants_of(network), constants_of(equalize(network).network)
    expected = scalar_equalization([before[name].reshape(*before[name].shape[:2], -1) for name in "abc"], 60)
    for name, values in zip("abc", expected):
        np.testing.assert_allclose(after[name], values.reshape(after[name].shape), rtol=1e-5)


def test_the_function_stays_and_ranges_meet_on_digits():
    made, bounded = equalize(SKEW), equalize(MINI, relu6="replace")
    assert len(made.pairs) == len(bounded.pairs) == 7 and 1 < made.sweeps < 100
    assert made.skipped == {"stem": "stem: it reads an input of the network"}
    assert_same_function(SKEW, made.network, [IMAGES])
    assert_same_function(with_relus(MINI), bounded.network, [IMAGES])
    for pair in made.pairs:
        assert np.abs(np.log(pair.before[0] / pair.before[1])).max() > 1  # there was something to do
    assert_balanced([*made.pairs, *bounded.pairs])


def test_networks_that_differ_by_scales_equalize_to_the_same():
    one, other = constants_of(equalize(SKEW).network), constants_of(equalize(with_relus(MINI)).network)
    for key, value in one.items():
        np.testing.assert_allclose(value, other[key], rtol=5e-6, atol=1e-7, err_msg=key)


def test_an_equalized_network_is_equalized_already():
    once = equalize(SKEW).network
    again = equalize(once)
    assert again.sweeps == 1
    for pair in again.pairs:
        np.testing.assert_allclose(pair.factors, 1, rtol=3e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_whatever_the_scales_were_the_end_is_the_same(seed):
    nodes = [
        ("Conv", "x a ab", "u"),
        ("Relu", "u", "v"),
        ("Conv", "v b bb", "w", {"group": 4}),
        ("MaxPool", "w", "p", {"kernel_shape": [2, 2]}),
        ("Flatten", "p", "f"),
        ("Gemm", "f c cb", "y"),
    ]
    shapes = {"a": (4, 3, 3, 3), "ab": (4,), "b": (4, 1, 2, 2), "bb": (4,), "c": (16, 5), "cb": (5,)}
    network = small(*nodes, seed=seed, **shapes)
    arrays = constants_of(network)
    first, second = np.exp(np.random.default_rng(seed).uniform(-3, 3, (2, 4)))
    scaled = graph.replace_weights(
        network,
        {
            "a": arrays["a"] * first[:, None, None, None],
            "ab": arrays["ab"] * first,
            "b": arrays["b"] * (second / first)[:, None, None, None],
            "bb": arrays["bb"] * second,
            "c": arrays["c"] / np.repeat(second, 4)[:, None],
        },
    )
    one, other = equalize(network), equalize(scaled)
    assert_same_function(network, other.network, inputs_of(network))
    assert_balanced([*one.pairs, *other.pairs])
    found = constants_of(other.network)
    for key, value in constants_of(one.network).items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)


# -- equalization: operators -----------------------------------------------------------------------------------------

CONV = {"a": (4, 3, 3, 3), "ab": (4,)}
GOES_THROUGH = {
    "nothing": ([("Conv", "x a ab", "u"), ("Conv", "u b", "y")], {**CONV, "b": (5, 4, 1, 1)}),
    "no biases": (
        [("Conv", "x a", "u"), ("Relu", "u", "v"), ("Conv", "v b", "y")],
        {"a": (4, 3, 1, 1), "b": (5, 4, 1, 1)},
    ),
    "PRelu": (
        [("Conv", "x a ab", "u"), ("PRelu", "u s", "v"), ("Conv", "v b", "y")],
        {**CONV, "b": (5, 4, 1, 1), "s": (4, 1, 1)},
    ),
    "pools": (
        [
            ("Conv", "x a ab", "u", {"pads": [1, 1, 1, 1]}),
            ("AveragePool", "u", "v", {"kernel_shape": [2, 2]}),
            ("GlobalMaxPool", "v", "w"),
            ("Conv", "w b", "y"),
        ],
        {**CONV, "b": (5, 4, 1, 1)},
    ),
    "groups": (
        [("Conv", "x a ab", "u"), ("Relu", "u", "v"), ("Conv", "v b", "y", {"group": 2})],
        {**CONV, "b": (6, 2, 3, 3)},
    ),
    "a depthwise one that widens": (
        [("Conv", "x a ab", "u"), ("Conv", "u b bb", "v", {"group": 4}), ("Conv", "v c", "y")],
        {**CONV, "b": (8, 1, 3, 3), "bb": (8,), "c": (2, 8, 1, 1)},
    ),
    "two depthwise ones": (
        [
            ("Conv", "x a ab", "u"),
            ("Conv", "u b bb", "v", {"group": 4}),
            ("Relu", "v", "r"),
            ("Conv", "r d", "w", {"group": 4}),
            ("Conv", "w c", "y"),
        ],
        {**CONV, "b": (4, 1, 2, 2), "bb": (4,), "d": (4, 1, 1, 1), "c": (2, 4, 1, 1)},
    ),
    "transposed convolutions": (
        [("ConvTranspose", "x a ab", "u"), ("Relu", "u", "v"), ("ConvTranspose", "v b", "y", {"strides": [2, 2]})],
        {"a": (3, 4, 2, 2), "ab": (4,), "b": (4, 5, 3, 3)},
    ),
    "Flatten": (
        [("Conv", "x a ab", "u"), ("Relu", "u", "v"), ("Flatten", "v", "f"), ("Gemm", "f b c", "y", {"transB": 1})],
        {**CONV, "b": (5, 64), "c": (1, 5)},
    ),
    "Reshape": (
        [("Conv", "x a ab", "u"), ("Reshape", "u s", "f"), ("MatMul", "f b", "m"), ("Add", "c m", "y")],
        {**CONV, "b": (64, 5), "s": np.array([2, -1]), "c": (5,)},
    ),
    "Gemm": (
        [("Flatten", "x", "f"), ("Gemm", "f a ab", "u"), ("Relu", "u", "v"), ("Gemm", "v b", "y", {"transB": 1})],
        {"a": (108, 4), "ab": (4,), "b": (5, 4)},
    ),
    "MatMul": (
        [
            ("MatMul", "x a", "u"),
            ("Add", "ab u", "v"),
            ("Relu", "v", "w"),
            ("MatMul", "w b", "z"),
            ("Add", "z c", "y"),
        ],
        {"a": (6, 4), "ab": (1, 1, 4), "b": (4, 5), "c": (5,)},
    ),
    "a Clip without an upper bound": (
        [("Conv", "x a ab", "u"), ("Clip", "u low high", "v"), ("Conv", "v b", "y")],
        {**CONV, "b": (5, 4, 1, 1), "low": np.float32(0), "high": np.float32(3.4e38)},
    ),
}


@pytest.mark.parametrize("name", GOES_THROUGH)
def test_factors_go_through(name):
    nodes, constants = GOES_THROUGH[name]
    network = small(*nodes, **constants)
    before = network.SerializeToString(deterministic=True)
    made = equalize(network, relu6="replace" if "Clip" in name else "keep")
    assert network.SerializeToString(deterministic=True) == before
    layers = graph.weights(network)
    assert len(made.pairs) == len(layers) - 1 == len(layers) - len(made.skipped)
    assert all(np.abs(np.log(pair.factors)).max() > 0.1 for pair in made.pairs)
    assert_same_function(network, made.network, inputs_of(network), rtol=2e-6)
    assert_balanced(made.pairs)


TWO = {**CONV, "b": (5, 4, 1, 1)}
STOPS = {
    "read more": (
        [("Conv", "x a ab", "u"), ("Relu", "u", "v"), ("Conv", "v b", "w"), ("GlobalMaxPool", "v", "z")],
        TWO,
        ("w", "z"),
        "'v' on the way to it",
    ),
    "an output": ([("Conv", "x a ab", "u"), ("Conv", "u b", "y")], TWO, ("y", "u"), "'u' on the way to it"),
    "HardSwish": ([("Conv", "x a ab", "u"), ("HardSwish", "u", "v"), ("Conv", "v b", "y")], TWO, ("y",), "HardSwish"),
    "Sigmoid": ([("Conv", "x a ab", "u"), ("Sigmoid", "u", "v"), ("Conv", "v b", "y")], TWO, ("y",), "Sigmoid 'v'"),
    "Add": ([("Conv", "x a ab", "u"), ("Add", "u u", "v"), ("Conv", "v b", "y")], TWO, ("y",), "Add 'v'"),
    "Clip from below 0": (
        [("Conv", "x a ab", "u"), ("Clip", "u low high", "v"), ("Conv", "v b", "y")],
        {**TWO, "low": np.float32(-1), "high": np.float32(1)},
        ("y",),
        "Clip 'v'",
    ),
    "Reshape that mixes": (
        [("Conv", "x a ab", "u"), ("Reshape", "u s", "v"), ("Conv", "v b", "y")],
        {**CONV, "b": (5, 8, 1, 1), "s": np.array([2, 8, 2, 4])},
        ("y",),
        "Reshape 'v'",
    ),
    "channels elsewhere": (
        [("Conv", "x a ab", "u"), ("MatMul", "u b", "m"), ("Add", "m c", "y")],
        {**CONV, "b": (4, 5), "c": (5,)},
        ("y",),
        "not the channels of 'u'",
    ),
    "pooled features": (
        [("MatMul", "x a", "u"), ("Add", "u c", "p"), ("MaxPool", "p", "q", {"kernel_shape": [1, 1]}),
         ("MatMul", "q b", "m"), ("Add", "m d", "y")],
        {"a": (6, 4), "c": (4,), "b": (4, 5), "d": (5,)},
        ("y",),
        "not the channels of 'u'",
    ),
    "shared weights": (
        [("Conv", "x a", "u"), ("Conv", "u a", "y")], {"a": (3, 3, 1, 1)}, ("y",), "shared",
    ),
    "transposed samples": (
        [("Flatten", "x", "f"), ("Gemm", "f a", "u"), ("Gemm", "u b", "y", {"transA": 1})],
        {"a": (108, 2), "b": (2, 5)}, ("y",), "no plain",
    ),
    "MatMul alone": ([("MatMul", "x a", "u"), ("MatMul", "u b", "y")], {"a": (6, 4), "b": (4, 5)}, ("y",), "no plain"),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_factors_do_not_go_through_and_it_says_why(name):
    nodes, constants, outputs, why = STOPS[name]
    network = small(*nodes, outputs=outputs, **constants)
    made = equalize(network, relu6="replace")
    assert not made.pairs and set(made.skipped) == set(graph.weights(network))
    assert any(why in sentence for sentence in made.skipped.values()), made.skipped
    for key, value in constants_of(made.network).items():
        np.testing.assert_array_equal(value, constants_of(network)[key])


def test_bounds_are_kept_replaced_or_replaced_where_they_do_not_matter():
    kept = equalize(MINI)
    assert not kept.pairs and not kept.replaced
    assert "the bound of the Clip 'act' before it does not scale" in kept.skipped["b1.dw"]
    blind = equalize(MINI, relu6="replace")
    assert len(blind.replaced) == 7 and all(np.isnan(list(blind.replaced.values())))
    made = equalize(MINI, relu6="replace", samples=[TRAIN])
    highest = Runner(with_relus(MINI), ["act"])(TRAIN)[0].max()
    tops = calibrate(MINI, [TRAIN], ["b3.bn1", "b3.bn2"], methods=["min_max"])
    assert highest < 6 and made.replaced["act"] == 0
    for clip, source in (("b3.act1", "b3.bn1"), ("b3.act2", "b3.bn2")):
        np.testing.assert_allclose(made.replaced[clip], tops.range(source)[1] - 6, rtol=1e-6)
    careful = equalize(MINI, relu6="unreached", samples=[TRAIN])
    assert set(careful.replaced) == {clip for clip, by in made.replaced.items() if by == 0} != set(made.replaced)
    assert_same_function(MINI, careful.network, [TRAIN])


@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_channels_without_weights_stay_as_they_are(tiny):
    nodes = [("Conv", "x a ab", "u"), ("Relu", "u", "v"), ("Conv", "v b bb", "y")]
    network = small(*nodes, **{"a": (4, 3, 1, 1), "ab": (4,), "b": (5, 4, 1, 1), "bb": (5,)})
    arrays = constants_of(network)
    arrays["a"], arrays["b"] = arrays["a"].copy(), arrays["b"].copy()
    arrays["a"][0], arrays["b"][:, 2] = tiny, tiny
    dead = graph.replace_weights(network, {"a": arrays["a"], "b": arrays["b"]})
    made = equalize(dead)
    (pair,) = made.pairs
    assert pair.factors[0] == pair.factors[2] == 1 and np.abs(np.log(pair.factors[[1, 3]])).min() > 0.01
    np.testing.assert_allclose(pair.ranges()[0, [1, 3]], pair.ranges()[1, [1, 3]], rtol=1e-5)
    assert_same_function(dead, made.network, inputs_of(dead))


@pytest.mark.parametrize(
    ("network", "entry", "shape", "pairs"),
    [
        (zoo.efficientnet_lite0, "x", (1, 3, 64, 64), 35),
        (zoo.text_recognizer, "x", (1, 3, 48, 64), 3),
        (zoo.direction_classifier, "x", (1, 3, 48, 192), 15),
    ],
)
def test_networks_in_use_compute_the_same(network, entry, shape, pairs):
    before = prepared(network(64) if network is zoo.efficientnet_lite0 else network(), {entry: shape})
    made = equalize(before, relu6="replace")
    assert len(made.pairs) == pairs and len(made.skipped) == len(graph.weights(before)) - pairs
    assert all(why.startswith(f"{name}: ") for name, why in made.skipped.items())
    assert_same_function(
        with_relus(before), made.network, [np.random.default_rng(0).uniform(-1, 1, shape).astype("f4")]
    )
    if network is not zoo.efficientnet_lite0:
        assert sum("HardSwish" in why for why in made.skipped.values()) >= 12


# -- high biases -----------------------------------------------------------------------------------------------------


def high(**more):
    """Conv, Relu, average, Conv; the first channels are far above 0 for every input."""
    nodes = [
        ("Conv", "x a ab", "u"),
        ("Relu", "u", "v"),
        ("AveragePool", "v", "w", {"kernel_shape": [2, 2], **more}),
        ("Conv", "w b", "y"),
    ]
    biases = np.array([300.0, 200.0, 0.0, -50.0])
    return small(*nodes, **{"a": (4, 3, 1, 1), "b": (5, 4, 1, 1), "ab": biases})


def test_absorbing_the_smallest_value_changes_nothing():
    network = high()
    samples = inputs_of(network)
    made = absorb_high_biases(network, samples, deviations=None)
    lows = np.min([Runner(network, ["u"])(sample)[0].min(axis=(0, 2, 3)) for sample in samples], axis=0)
    np.testing.assert_allclose(made.shifts["u"], -np.maximum(lows, 0), rtol=1e-6)
    assert (made.shifts["u"] < -50).sum() == 2
    assert constants_of(made.network)["ab"].max() < 100 and "b.bias" in constants_of(made.network)
    assert_same_function(network, made.network, samples)


def test_absorption_takes_three_deviations_off_the_mean():
    network = high()
    samples = inputs_of(network)
    values = np.concatenate([Runner(network, ["u"])(sample)[0] for sample in samples]).astype(np.float64)
    made = absorb_high_biases(network, samples)
    expected = np.maximum(values.mean((0, 2, 3)) - 3 * values.std((0, 2, 3)), 0)
    np.testing.assert_allclose(made.shifts["u"], -expected, rtol=1e-6)
    gained = constants_of(network)["b"][:, :, 0, 0].astype(np.float64) @ expected
    np.testing.assert_allclose(made.shifts["y"], gained, rtol=1e-5)
    np.testing.assert_allclose(constants_of(made.network)["b.bias"], gained, rtol=1e-5)
    assert_same_function(network, made.network, samples, rtol=1e-3)  # three of a thousand values are below


def test_absorption_leaves_padding_bounds_and_uneven_strides_alone():
    network = high(pads=[1, 1, 1, 1])
    assert "everywhere alike" in absorb_high_biases(network, inputs_of(network)).skipped["y"]
    made = absorb_high_biases(MINI, [TRAIN[:64]])
    assert not made.shifts and "everywhere alike" in made.skipped["b1.pw"]
    relus = absorb_high_biases(with_relus(MINI), [TRAIN[:64]], deviations=0)
    assert set(relus.skipped) == {"stem", "b1.dw", "b2.dw", "b3.dw"}
    transposed = small(
        ("Conv", "x a ab", "u"),
        ("ConvTranspose", "u b", "y", {"strides": [2, 2]}),
        **{"a": (4, 3, 1, 1), "ab": np.full(4, 99.0), "b": (4, 5, 3, 3)},
    )
    assert "y" in absorb_high_biases(transposed, inputs_of(transposed)).skipped


# -- biases ----------------------------------------------------------------------------------------------------------

MIXED = small(
    ("Conv", "x a", "u", {"pads": [1, 1, 1, 1]}),
    ("HardSwish", "u", "v"),
    ("ConvTranspose", "v b bb", "t", {"strides": [2, 2]}),
    ("GlobalAveragePool", "t", "g"),
    ("Flatten", "g", "f"),
    ("MatMul", "f c", "m"),
    ("Add", "cb m", "n"),
    ("Relu", "n", "r"),
    ("Gemm", "r d", "y", {"transB": 1}),
    **{"a": (4, 3, 3, 3), "b": (4, 6, 2, 2), "bb": (6,), "c": (6, 5), "cb": (5,), "d": (3, 5)},
)


def rounded(network, levels=4):
    """All weights, on few levels, and off to one side, as a bad quantizer leaves them."""
    return {
        weight.name: np.ceil(weight.values / (step := np.abs(weight.values).max() / levels)) * step
        for weight in graph.weights(network).values()
    }


def channel_means(network, names, samples):
    """By tensor; means of the samples' means."""
    runs = [Runner(network, names)(sample) for sample in samples]
    axes = [tuple(axis for axis in range(value.ndim) if axis != 1) for value in runs[0]]
    return [np.mean([run[i].mean(axis, dtype=np.float64) for run in runs], axis=0) for i, axis in enumerate(axes)]


@pytest.mark.parametrize(
    ("network", "names"), [(MIXED, ["u", "t", "n", "y"]), (MINI, ["bn", "b2.bn1", "b3.bn2", "output"])]
)
def test_corrected_networks_have_the_means_of_the_float_network(network, names):
    samples = inputs_of(network) if network is MIXED else [TRAIN[:50], TRAIN[50:100]]
    weights, before = rounded(network), network.SerializeToString(deterministic=True)
    made = correct_biases(network, weights, samples)
    assert network.SerializeToString(deterministic=True) == before
    assert set(made.shifts) == set(graph.weights(network)) and not made.skipped
    old = constants_of(network)
    for name in weights:
        np.testing.assert_array_equal(constants_of(made.network)[name], old[name])
    expected = channel_means(network, names, samples)
    plain = channel_means(graph.replace_weights(network, weights), names, samples)
    found = channel_means(graph.replace_weights(made.network, weights), names, samples)
    for name, mean, off, now in zip(names, expected, plain, found):
        scale = np.abs(mean).max()
        assert np.abs(off - mean).max() > 0.03 * scale, name
        np.testing.assert_allclose(now, mean, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_the_analytical_shift_is_the_error_of_the_weights_times_the_mean():
    samples = inputs_of(MIXED)
    weights = rounded(MIXED)
    made = correct_biases(MIXED, weights, samples, analytical=True)
    old = constants_of(MIXED)
    x = np.mean([sample.mean((0, 2, 3), dtype=np.float64) for sample in samples], axis=0)
    v, f, r = channel_means(MIXED, ["v", "f", "r"], samples)
    error = {name: old[name].astype(np.float64) - weights[name] for name in weights}
    np.testing.assert_allclose(made.shifts["u"], np.einsum("oikl,i->o", error["a"], x), rtol=1e-6)
    # A stride of 2 and a kernel of 2: every place is reached by one of the four weights.
    np.testing.assert_allclose(made.shifts["t"], np.einsum("iokl,i->o", error["b"], v) / 4, rtol=1e-6)
    np.testing.assert_allclose(made.shifts["m"], f @ error["c"], rtol=1e-6)
    np.testing.assert_allclose(made.shifts["y"], error["d"] @ r, rtol=1e-6)
    biases = constants_of(made.network)
    np.testing.assert_allclose(biases["cb"], old["cb"] + made.shifts["m"], rtol=1e-6)
    np.testing.assert_allclose(biases["a.bias"], made.shifts["u"], rtol=1e-6)


def test_only_what_is_quantized_is_corrected():
    weights = {"b": rounded(MIXED)["b"]}
    for analytical in (False, True):
        made = correct_biases(MIXED, weights, inputs_of(MIXED), analytical=analytical)
        assert set(made.shifts) == {"t"} and "a.bias" not in constants_of(made.network)


# -- what it is good for: the peers' measurements --------------------------------------------------------------------

# Network, weight bits, per channel, sweeps; AIMET's accuracy (percent) and SQNR (dB); ours with biases corrected (dB).
PEERS = [
    ("skew", 8, False, 1000, 98.95, 32.8, 36.5),
    ("skew", 8, True, 1000, 98.95, 33.5, 36.5),
    ("skew", 4, False, 1000, 97.16, 7.4, 17.5),
    ("skew", 4, True, 1, 98.52, 13.7, 18.0),
    ("mini", 8, False, 1000, 98.89, 33.9, 36.5),
    ("mini", 4, False, 1000, 98.33, 9.5, 17.5),
]


@pytest.mark.parametrize(("which", "bits", "fine", "sweeps", "accuracy", "sqnr", "corrected"), PEERS)
def test_as_good_as_the_peers(which, bits, fine, sweeps, accuracy, sqnr, corrected):
    network = equalize(MINI if which == "mini" else SKEW, relu6="replace", iterations=sweeps).network
    options = Options(weight_bw=bits, use_per_channel_quantization=fine, use_per_row_quantization=fine)
    scores = []
    for seed in range(3):
        samples = chosen(seed)
        calibration = calibrate(network, samples, methods=["min_max"])
        found = quantize_network(network, options=options, calibration=calibration)
        scores.append(score(found.network, LOGITS[which]))
    again = quantize_network(
        correct_biases(network, weights_of(found), samples).network, options=options, calibration=calibration
    )
    assert np.mean(scores, axis=0)[0] >= accuracy - 0.4 and np.mean(scores, axis=0)[1] >= sqnr - 0.3
    assert score(again.network, LOGITS[which])[1] >= corrected


def score(network, logits):
    found = Runner(network, ["output"])(IMAGES)[0]
    return 100 * np.mean(found.argmax(1) == LABELS), sqnr_db(logits, found)


def weights_of(converted):
    """The weights of a quantized network as it sees them."""
    values = constants_of(converted.float_network)
    found = {}
    for name, axis in converted.tensors.weights.items():
        qparams = converted.encodings.params[name].qparams(values[name].shape, axis)
        found[name] = dequantize(quantize(values[name], qparams), qparams)
    return found


# -- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="relu6 is keep, replace or, given samples, unreached, not 'drop'"):
        equalize(MINI, relu6="drop")
    with pytest.raises(ValueError, match="given samples, unreached"):
        equalize(MINI, relu6="unreached")
    with pytest.raises(ValueError, match="iterations are above 0"):
        equalize(MINI, iterations=0)
    with pytest.raises(ValueError, match="deviations must be 0 or more"):
        absorb_high_biases(MINI, [TRAIN[:2]], deviations=float("nan"))
    with pytest.raises(ValueError, match="no initializer 'stem'"):
        correct_biases(MINI, {"stem": np.zeros(3)}, [TRAIN[:2]])
    weight = constants_of(MINI)["stem.weight"] * np.nan
    with pytest.raises(ValueError, match=r"the weights of 'stem' hold NaN"):
        correct_biases(MINI, {"stem.weight": weight}, [TRAIN[:2]])
    with pytest.raises(ValueError, match=r"the weights of 'stem' hold NaN"):
        equalize(graph.replace_weights(MINI, {"stem.weight": weight}))
    for analytical in (False, True):
        for samples, why in (
            ([], "no samples"),
            ([TRAIN[:2] * np.nan], "NaN"),
            ([TRAIN[0, 0]], "the input 'input' takes"),
        ):
            with pytest.raises(ValueError, match=why):
                correct_biases(MINI, rounded(MINI), samples, analytical=analytical)
            with pytest.raises(ValueError, match=why):
                absorb_high_biases(MINI, samples)


def test_progress_is_shown(capsys):
    for analytical in (False, True):
        correct_biases(MIXED, rounded(MIXED), inputs_of(MIXED), analytical=analytical, progress=True)
        assert "100%" in capsys.readouterr().err
    correct_biases(MIXED, rounded(MIXED), inputs_of(MIXED))
    assert not capsys.readouterr().err
