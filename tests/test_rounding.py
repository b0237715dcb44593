"""Rounding by what layers compute: beside brute force, the papers' own steps, torch, and the scores AIMET reaches."""

import functools
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtools import zoo
from qtools.affine import Grid, QParams, choose_lpbq, choose_qparams, dequantize, fake_quantize, quantize
from qtools.metrics import sqnr_db
from qtools.ptq import fuse, graph, layers, rounding, write
from tests.test_fuse import model_of, run
from tests.test_write import constants_of, encodings

SOLVERS = [rounding.GPTQ(), rounding.GPTQ(by_power=False), rounding.Descent(), rounding.AdaRound(400)]


def problem_of(seed, channels=3, inputs=6, groups=1, bits=4, asymmetric=False):
    """A layer with correlated inputs, and outputs that its weights explain but for some noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((groups, 40, inputs)) @ rng.standard_normal((groups, inputs, inputs)) + 1
    weight = rng.standard_normal((groups, channels, inputs))
    y = x @ weight.mT + 0.3 * rng.standard_normal((groups, 40, channels))
    scale = np.broadcast_to(np.abs(weight).max(-1, keepdims=True) / (2 ** (bits - 1) - 1), weight.shape)
    grid = Grid(bits, signed=not asymmetric, symmetric=not asymmetric)
    zero_point = np.full(weight.shape, 2.0 ** (bits - 1) if asymmetric else 0.0)
    gram, cross = x.mT @ x / 40, y.mT @ x / 40
    return rounding.Problem(weight, scale, zero_point, grid, gram, cross, (y * y).mean(1)), x, y


def ups_and_downs(problem):
    """The least that any choice of rounding up or down costs, by channel."""
    down = np.floor(problem.weight / problem.scale) + problem.zero_point
    tried = [down + np.array(ups) for ups in itertools.product((0, 1), repeat=down.shape[-1])]
    tried = [np.clip(codes, problem.grid.qmin, problem.grid.qmax) for codes in tried]
    return np.min([problem.error(codes) for codes in tried], axis=0)


# -- problems and solvers --------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_cost_is_the_mean_square_by_which_outputs_miss(seed, asymmetric):
    problem, x, y = problem_of(seed, groups=2, asymmetric=asymmetric)
    codes = np.random.default_rng(seed).integers(problem.grid.qmin, problem.grid.qmax + 1, problem.weight.shape)
    expected = ((x @ ((codes - problem.zero_point) * problem.scale).mT - y) ** 2).mean(1)
    np.testing.assert_allclose(problem.error(codes), expected, rtol=1e-9)
    damped = problem.damped(0.1)
    distance = ((problem.values(codes) - problem.weight) ** 2).sum(-1)
    price = 0.1 * (x**2).mean((1, 2))
    np.testing.assert_allclose(damped.error(codes), expected + price[:, None] * distance, rtol=1e-9)


def test_the_target_is_that_of_least_squares():
    problem, x, y = problem_of(0)
    np.testing.assert_allclose(problem.target[0].T, np.linalg.lstsq(x[0], y[0])[0], rtol=1e-8)


def test_inputs_that_are_always_zero_leave_the_weights_where_they_are():
    problem, _, _ = problem_of(0)
    nothing = {name: np.zeros_like(getattr(problem, name)) for name in ("gram", "cross", "power")}
    problem = replace(problem, **nothing).damped(0.1)
    for solver in (rounding.GPTQ(), rounding.Descent(), rounding.AdaRound(50)):
        np.testing.assert_array_equal(solver(problem), rounding.Nearest()(problem))


@pytest.mark.parametrize(("solver", "least"), list(zip(SOLVERS, (0.95, 0.8, 1.0, 0.8))), ids=repr)
def test_never_worse_than_nearest_and_close_to_the_best_of_all_ways_up_and_down(solver, least):
    """`least` is a share of what the best choice wins; the first three may go further than one step up or down."""
    won = possible = 0
    for seed in range(12):
        problem = problem_of(seed, inputs=7, groups=1 + seed % 2, asymmetric=seed % 3 == 0)[0].damped(0.01)
        codes, nearest = solver(problem), rounding.Nearest()(problem)
        assert codes.dtype == np.int64
        assert codes.min() >= problem.grid.qmin and codes.max() <= problem.grid.qmax
        assert (problem.error(codes) <= problem.error(nearest) * (1 + 1e-9)).all()
        best = ups_and_downs(problem)
        if isinstance(solver, rounding.AdaRound):
            assert (problem.error(codes) >= best * (1 - 1e-9)).all()
            down = np.floor(problem.weight / problem.scale) + problem.zero_point
            assert set(np.unique(codes - down)) <= {0, 1} or codes.max() == problem.grid.qmax
        won += (problem.error(nearest) - problem.error(codes)).sum()
        possible += (problem.error(nearest) - best).sum()
    assert won / possible > least


def test_nearest_is_the_rounding_of_files():
    problem, _, _ = problem_of(3, asymmetric=True)
    qparams = QParams(Grid(4, block_size=(1, -1)), problem.scale[0, :, :1], np.full((3, 1), 8, np.int32))
    np.testing.assert_array_equal(rounding.Nearest()(problem)[0], quantize(problem.weight[0], qparams))


@pytest.mark.parametrize("by_power", [True, False])
def test_gptq_is_the_algorithm_of_its_paper(by_power):
    """Weight by weight with the Hessian of what is left inverted anew, and no Cholesky decomposition (section 2)."""
    for seed in range(5):
        problem = problem_of(seed, inputs=9)[0].damped(0.01)
        # With the outputs of the float weights the target is these themselves, as in the paper.
        problem = replace(problem, cross=problem.weight @ problem.gram)
        hessian = 2 * problem.gram[0]
        order = np.argsort(-np.diag(hessian)) if by_power else np.arange(9)
        codes = np.zeros((3, 9))
        for channel, weights in enumerate(problem.weight[0].copy()):
            for at, k in enumerate(order):
                rest = order[at:]
                inverse = np.linalg.inv(hessian[np.ix_(rest, rest)])
                step = problem.scale[0, channel, k]
                codes[channel, k] = np.clip(np.round(weights[k] / step), -8, 7)
                weights[rest] -= (weights[k] - codes[channel, k] * step) / inverse[0, 0] * inverse[:, 0]
        solved = rounding.GPTQ(by_power)(problem)[0]
        better = (problem.error(codes[None]) <= problem.error(problem.nearest(problem.weight)))[0]
        np.testing.assert_array_equal(solved[better], codes[better])
        assert better.any()


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=15, deadline=None)
def test_after_descent_no_single_weight_can_do_better(seed, asymmetric):
    problem = problem_of(seed, groups=2, asymmetric=asymmetric)[0].damped(0.01)
    codes = rounding.Descent(rounding.Nearest(), sweeps=100)(problem)
    least = problem.error(codes)
    for k, code in itertools.product(range(6), range(problem.grid.qmin, problem.grid.qmax + 1)):
        changed = codes.copy()
        changed[..., k] = code
        assert (problem.error(changed) >= least - 1e-9).all()


def test_descent_goes_on_from_any_solver():
    for seed in range(5):
        problem = problem_of(seed, channels=8, inputs=16, bits=3)[0].damped(0.01)
        for start in (rounding.Nearest(), rounding.GPTQ(), rounding.AdaRound(50)):
            assert problem.error(rounding.Descent(start)(problem)).sum() <= problem.error(start(problem)).sum() + 1e-12


# -- layers ----------------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    ((2, 3, 9, 8), (4, 3, 3, 3), dict(pads=[1, 1, 1, 1])),
    ((2, 4, 9, 8), (4, 1, 3, 2), dict(pads=[2, 0, 1, 1], strides=[2, 1], group=4)),
    ((1, 6, 9, 8), (4, 3, 2, 3), dict(dilations=[2, 2], group=2)),
    ((3, 4, 7, 5), (6, 4, 1, 1), dict(strides=[3, 2])),
    ((2, 3, 7, 8), (4, 3, 4, 3), dict(auto_pad="SAME_UPPER", strides=[2, 2])),
    ((2, 3, 7, 8), (4, 3, 4, 3), dict(auto_pad="SAME_LOWER", strides=[1, 2])),
    ((2, 3, 11), (4, 3, 5), dict(pads=[2, 1])),
    ((1, 2, 5, 6, 7), (3, 2, 3, 2, 2), dict(strides=[2, 2, 1])),
]
PRODUCTS = [
    ("Gemm", (5, 7), (7, 3), {}),
    ("Gemm", (5, 7), (3, 7), dict(transB=1)),
    ("MatMul", (2, 5, 7), (7, 3), {}),
    ("MatMul", (2, 2, 5, 7), (7, 3), {}),
    ("MatMul", (7,), (7, 3), {}),
]


def layer_of(op, shape, weight, attributes):
    """A layer, its inputs and its outputs by ONNX Runtime."""
    rng = np.random.default_rng(0)
    constants = dict(w=rng.standard_normal(weight))
    if op != "MatMul":
        channels = weight[0] if op == "Conv" or attributes.get("transB") else weight[1]
        constants |= dict(b=rng.standard_normal(channels))
    inputs = "x w b" if op != "MatMul" else "x w"
    model = model_of([(op, inputs, "y", attributes)], {"x": shape}, **constants)
    x = rng.standard_normal(shape).astype(np.float32)
    return layers.layers(model, {"w"})[0], x, run(model, {"x": x})[0]


@pytest.mark.parametrize("case", [("Conv", *case) for case in CONVOLUTIONS] + PRODUCTS, ids=str)
def test_the_rows_of_a_layer_are_what_its_weights_multiply(case):
    layer, x, y = layer_of(*case)
    inputs, outputs = layer.data(x, y, 10**6, (0,))
    weight = layer.grouped(layer.weight.values)
    assert inputs.shape[1] == outputs.shape[1] == y.size // layer.weight.rows.shape[0]
    np.testing.assert_allclose(inputs @ weight.mT + layer.bias[:, None], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CONVOLUTIONS[:4], ids=str)
def test_the_gram_matrix_is_that_of_the_windows_torch_unfolds(case):
    layer, x, y = layer_of("Conv", *case)
    kernel, more = case[1][2:], case[2]
    top, left, bottom, right = more.get("pads", [0] * 4)
    padded = torch.nn.functional.pad(torch.tensor(x, dtype=torch.float64), (left, right, top, bottom))
    unfold = torch.nn.Unfold(kernel, dilation=more.get("dilations", 1), stride=more.get("strides", 1))
    groups = unfold(padded).unflatten(1, (layer.groups, -1))  # (samples, groups, inputs, positions)
    expected = torch.einsum("sgip,sgjp->gij", groups, groups) / (groups.shape[0] * groups.shape[3])
    moments = layers.Moments()
    moments.add(*layer.data(x, y, 10**6, (0,)))
    np.testing.assert_allclose(moments.means()[2], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [("Conv", *CONVOLUTIONS[1]), PRODUCTS[2]], ids=str)
def test_positions_are_drawn_anew_for_each_seed_and_alike_for_one(case):
    layer, x, y = layer_of(*case)
    every = layer.data(x, y, 10**6, (0,))
    some, same, other = (layer.data(x, y, 3, seed) for seed in ((1, 0), (1, 0), (2, 0)))
    assert some[0].shape[1] == some[1].shape[1] == 3 * len(x)
    rows = {(*inputs, *outputs) for inputs, outputs in zip(every[0][0], every[1][0])}
    assert {(*inputs, *outputs) for inputs, outputs in zip(some[0][0], some[1][0])} < rows
    np.testing.assert_array_equal(some[0], same[0])
    assert not np.array_equal(some[0], other[0])


def test_moments_do_not_depend_on_the_pieces_and_are_those_of_numpy():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 4)) + 3, rng.standard_normal((2, 50, 3)) - 1
    whole, pieces = layers.Moments(), layers.Moments()
    whole.add(x, y)
    for begin, end in ((0, 7), (7, 8), (8, 50)):
        pieces.add(x[:, begin:end], y[:, begin:end])
    for one, other in zip(whole.means(), pieces.means()):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    gram, cross, power = whole.without_bias(None)
    for group in range(2):
        expected = np.cov(x[group].T, y[group].T, bias=True)
        np.testing.assert_allclose(gram[group], expected[:4, :4], atol=1e-12)
        np.testing.assert_allclose(cross[group], expected[4:, :4], atol=1e-12)
        np.testing.assert_allclose(power[group], np.diag(expected[4:, 4:]), atol=1e-12)
    bias = rng.standard_normal((2, 3))
    gram, cross, power = whole.without_bias(bias)
    less = y - bias[:, None]
    np.testing.assert_allclose(cross, less.mT @ x / 50, atol=1e-12)
    np.testing.assert_allclose(power, (less**2).mean(1), atol=1e-12)
    np.testing.assert_allclose(gram, x.mT @ x / 50, atol=1e-12)


@pytest.mark.parametrize("count", [1, 49])
def test_inputs_that_never_vary_are_the_business_of_the_bias(count):
    """Their variance is zero but for rounding errors, which are not to be taken for data."""
    problem, _, _ = problem_of(0, inputs=200)
    x = np.repeat(100 * np.random.default_rng(0).standard_normal((1, 1, 200)).astype(np.float32), count, axis=1)
    moments = layers.Moments()
    for _ in range(3):
        moments.add(x, x @ problem.weight.mT)
    mean, _, square, *_ = moments.means()
    assert (np.diag(square[0]) != mean[0] ** 2).any() or count == 1
    gram, cross, power = moments.without_bias(None)
    assert not gram.any() and not cross.any()
    problem = replace(problem, gram=gram, cross=cross, power=power).damped(0.1)
    np.testing.assert_array_equal(rounding.Descent()(problem), rounding.Nearest()(problem))


def test_what_is_no_layer_keeps_nearest_rounding():
    rng = np.random.default_rng(0)
    nodes = [
        ("Conv", "x w", "a", dict(pads=[1, 1, 1, 1])), ("ConvTranspose", "a t", "b"), ("Conv", "b k", "c"),
        ("Conv", "c k", "d"), ("GlobalAveragePool", "d", "e"), ("Flatten", "e", "f"),
        ("Gemm", "f g", "h", dict(alpha=2.0)), ("Gemm", "h m", "y"),
    ]  # fmt: skip
    shapes = dict(w=(4, 2, 3, 3), t=(4, 4, 2, 2), k=(4, 4, 1, 1), g=(4, 5), m=(5, 3))
    constants = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    model = model_of(nodes, {"x": (4, 2, 5, 5)}, **constants)
    feeds = [{"x": rng.standard_normal((4, 2, 5, 5)).astype(np.float32)} for _ in range(4)]
    activations, params, tensors = encodings(model, feeds, 3)
    found = rounding.round_network(model, activations, params, feeds, tensors=tensors)
    assert list(found.layers) == ["Conv_a", "Gemm_y"]
    assert set(found.values) == {"w", "m"} and sorted(found.left) == ["g", "k", "t"]


# -- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spy:
    """A solver that keeps what it is given, and fails at one of its calls."""

    seen: list
    fails_at: int = -1

    def __call__(self, problem):
        self.seen.append(problem)
        if len(self.seen) == self.fails_at:
            raise KeyboardInterrupt
        return rounding.GPTQ()(problem)

    def __repr__(self):
        return "Spy"


@functools.cache
def mini(bits=4, per_channel=True, scale="no_clipping"):
    """The digits network, encodings and 256 calibration images as AIMET's scores are taken with (seed 0)."""
    model = fuse.fuse(graph.prepare(zoo.digits_cnn("mini")))
    images = zoo.digits()[0][np.random.default_rng(1000).choice(1257, 256, replace=False)]
    feeds = [{"input": images[begin : begin + 64]} for begin in range(0, 256, 64)]
    return model, feeds, encodings(model, feeds, bits, per_channel=per_channel, scale=scale)


@functools.cache
def reference():
    return run(graph.prepare(zoo.digits_cnn("mini")), {"input": zoo.digits()[2]})[0]


def score(values, activations, params, tensors):
    """SQNR of the test logits and the share of digits that are right."""
    model = graph.replace_weights(mini()[0], values)
    logits = run(write.write_simulation(model, activations, params, tensors), {"input": zoo.digits()[2]})[0]
    return sqnr_db(reference(), logits), 100 * (logits.argmax(1) == zoo.digits()[3]).mean()


def rounded(solver, bits=4, per_channel=True, **more):
    model, feeds, (activations, params, tensors) = mini(bits, per_channel)
    found = rounding.round_network(model, activations, params, feeds, solver, tensors=tensors, **more)
    return found, score(found.values, activations, found.params, tensors)


ROWS = [  # least SQNR and accuracy: AIMET's AdaRound (2,000 iterations, the better of its two schemes) less 0.3 dB
    (4, True, rounding.GPTQ(), (), 22.6, 98.6),
    (4, True, rounding.AdaRound(500), (), 22.6, 98.6),
    (4, True, rounding.Descent(), rounding.CLIPS, 24.4, 98.6),
    (3, True, rounding.Descent(), (), 16.0, 98.1),
    (4, False, rounding.Descent(), rounding.CLIPS, 20.6, 98.6),
    (3, False, rounding.Descent(), rounding.CLIPS, 16.0, 98.1),
]


@pytest.mark.parametrize(("bits", "per_channel", "solver", "clips", "least", "right"), ROWS)
def test_the_digits_keep_more_than_by_aimet(bits, per_channel, solver, clips, least, right):
    decibels, accuracy = rounded(solver, bits, per_channel, clips=clips)[1]
    assert decibels > least and accuracy >= right, (decibels, accuracy)


def test_eight_bits_are_no_worse_than_nearest():
    _, _, (activations, params, tensors) = mini(8)
    assert rounded(rounding.Descent(), 8)[1][0] > score({}, activations, params, tensors)[0]


def test_nearest_without_new_biases_is_plain_quantization():
    _, _, (activations, params, tensors) = mini()
    found, scores = rounded(rounding.Nearest(), bias=False)
    assert scores == score({}, activations, params, tensors)
    assert set(found.values) == set(tensors.weights)
    assert all(report.changed == report.furthest == 0 for report in found.layers.values())
    assert all(report.before == report.after for report in found.layers.values())


@pytest.mark.parametrize(("per_channel", "clips"), [(True, ()), (True, rounding.CLIPS), (False, rounding.CLIPS)])
def test_weights_lie_on_their_grids_and_the_file_holds_their_codes(per_channel, clips):
    model, _, (activations, params, tensors) = mini(4, per_channel)
    found = rounded(rounding.GPTQ(), 4, per_channel, clips=clips)[0]
    file = constants_of(write.write_qdq(graph.replace_weights(model, found.values), activations, found.params, tensors))
    for name in tensors.weights:
        codes = quantize(found.values[name], found.params[name])
        np.testing.assert_array_equal(dequantize(codes, found.params[name]), found.values[name])
        np.testing.assert_array_equal(file[f"{name}.codes"].astype(np.int8), codes)
        changed = not np.array_equal(found.params[name].scale, params[name].scale)
        assert changed <= bool(clips) and found.params[name].scale.shape == params[name].scale.shape
    assert any(found.layers[node].clip != 1 for node in found.layers) == bool(clips)
    if not clips:
        both = constants_of(model)["fc.weight"], found.values["fc.weight"]
        nearest, codes = (quantize(one, params["fc.weight"]) for one in both)
        steps = np.abs(codes - nearest)
        assert found.layers["fc"].changed == np.mean(steps > 0) and found.layers["fc"].furthest == steps.max() > 0


def test_each_report_is_of_what_the_layer_gives():
    """The last layer's, computed from the quantized and the float network as a whole."""
    model, feeds, (activations, params, tensors) = mini()
    found = rounded(rounding.GPTQ())[0]
    without = {name: qparams for name, qparams in activations.items() if name != "output"}
    constants = {name: params[name] for name in tensors.constants}
    quantized = write.write_qdq(graph.replace_weights(model, found.values), without, constants, tensors)
    real, seen = (np.concatenate([run(one, feed)[0] for feed in feeds]) for one in (model, quantized))
    np.testing.assert_allclose(seen.mean(0), real.mean(0), atol=1e-5)  # the bias is the best there is
    assert found.layers["fc"].after == pytest.approx(sqnr_db(real - real.mean(0), seen - real.mean(0)), abs=0.01)


def test_layers_see_what_comes_out_of_the_rounded_layers_before_them():
    rng = np.random.default_rng(0)
    constants = {name: rng.standard_normal((6, 6)) for name in ("v", "w", "z")} | {"b": rng.standard_normal(6)}
    nodes = [
        ("Gemm", "x v b", "s"), ("Relu", "s", "t"), ("Gemm", "t w", "u"), ("MatMul", "t z", "q"), ("Add", "u q", "y")
    ]  # fmt: skip
    model = model_of(nodes, {"x": (50, 6)}, **constants)
    feeds = [{"x": rng.standard_normal((50, 6)).astype(np.float32)} for _ in range(2)]
    activations, params, tensors = encodings(model, feeds, 3, act_bits=4)
    spy = Spy([])
    found = rounding.round_network(model, activations, params, feeds, spy, tensors=tensors, damp=1e-9)
    x = np.concatenate([feed["x"] for feed in feeds])
    t = fake_quantize(x, activations["x"]) @ found.values["v"] + found.values["b"]
    t = fake_quantize(np.maximum(t, 0), activations["t"]).astype(np.float64)
    real = np.maximum(x @ constants["v"] + constants["b"], 0)
    first, w, z = spy.seen
    assert first.gram.shape == (1, 6, 6)
    for problem, name in ((w, "w"), (z, "z")):  # neither has a bias that could take the mean
        np.testing.assert_allclose(problem.gram[0], t.T @ t / 100, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(problem.cross[0], (real @ constants[name]).T @ t / 100, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["blocks", "LPBQ", "asymmetric", "columns"])
def test_every_granularity_is_rounded_on_its_own_grid(kind):
    rng = np.random.default_rng(0)
    constants = dict(w=rng.standard_normal((10, 64)) * np.exp(rng.standard_normal((10, 1))), b=rng.standard_normal(10))
    model = model_of([("Gemm", "x w b", "y", dict(transB=1))], {"x": (200, 64)}, **constants)
    mixed = rng.standard_normal((64, 64)).astype(np.float32)
    feeds = [{"x": rng.standard_normal((200, 64)).astype(np.float32) @ mixed} for _ in range(2)]
    activations, params, tensors = encodings(model, feeds)
    w, grid = constants_of(model)["w"], functools.partial(Grid, 4, signed=True, symmetric=True)
    encoding = {
        "blocks": lambda: choose_qparams(w, grid(block_size=(1, 24))),  # the last one is shorter
        "LPBQ": lambda: choose_lpbq(w, grid(block_size=(1, 16))),
        "asymmetric": lambda: choose_qparams(w, Grid(4)),
        "columns": lambda: choose_qparams(w, grid(block_size=(-1, 1))),
    }[kind]()
    for clips in ((), (0.8, 1.0)):
        found = rounding.round_network(
            model, activations, params | {"w": encoding}, feeds, tensors=tensors, clips=clips
        )
        new = found.params["w"].qparams if kind == "LPBQ" else found.params["w"]
        np.testing.assert_array_equal(fake_quantize(found.values["w"], new), found.values["w"])
        old = encoding.qparams if kind == "LPBQ" else encoding
        ratios = {round(float(ratio), 3) for ratio in np.ravel(new.scale / old.scale)}
        assert ratios <= ({*clips} or {1.0})
        assert len(ratios) == 1 or kind in ("blocks", "LPBQ")
        report = found.layers["Gemm_y"]
        assert report.after > report.before + 2


# -- in steps, and refusals ------------------------------------------------------------------------------------------


def call(solver, state, **more):
    model, feeds, (activations, params, tensors) = mini()
    arguments = dict(network=model, activations=activations, params=params, samples=feeds) | more
    return rounding.round_network(**arguments, solver=solver, tensors=tensors, state=state)


def test_an_interrupted_run_goes_on_to_the_same_result(tmp_path):
    path = tmp_path / "new" / "state.safetensors"
    drawn = dict(positions=20)
    whole = call(Spy([]), None, **drawn)
    with pytest.raises(KeyboardInterrupt):
        call(Spy([], fails_at=4), path, **drawn)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    rest, nothing = Spy([]), Spy([])
    again = call(rest, path, **drawn)
    once_more = call(nothing, path, **drawn)
    assert len(rest.seen) == 5 and not nothing.seen  # of eight
    for found in (again, once_more):
        assert found.layers == whole.layers and set(found.values) == set(whole.values)
        for name, values in whole.values.items():
            np.testing.assert_array_equal(found.values[name], values)
            assert found.values[name].dtype == np.float32


def test_a_state_that_is_damaged_or_of_another_call_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    call(rounding.GPTQ(), path)
    content = path.read_bytes()
    _, feeds, (activations, *_) = mini()
    others = [
        dict(solver=rounding.GPTQ(by_power=False)),
        dict(samples=feeds[:2]),
        dict(samples=[{"input": feed["input"] * np.float32(0.5)} for feed in feeds]),
        dict(activations=activations | {"act": activations["input"]}),
        dict(params=mini(4, True, "qmax")[2][1]),
        dict(damp=0.2), dict(clips=(1.0,)), dict(bias=False), dict(positions=100),
        dict(network=graph.replace_weights(mini()[0], {"fc.bias": np.zeros(10)})),
    ]  # fmt: skip
    for other in others:
        with pytest.raises(ValueError, match="damaged or that of another call"):
            call(other.pop("solver", rounding.GPTQ()), path, **other)
    assert path.read_bytes() == content
    broken = bytearray(content)
    broken[-40_000] ^= 1  # within a weight
    for damaged in (content[:1000], content[:-1], b"", b"nonsense" * 100, bytes(broken)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or that of another call"):
            call(rounding.GPTQ(), path)


def test_samples_that_do_not_fit_are_refused():
    images = mini()[1][0]["input"]
    bad = images.copy()
    bad[3, 0, 1, 2] = np.nan
    for samples, why in (
        ([images, bad], "sample 1 holds NaN or infinity"),
        ([], "there are no samples"),
        ([{"x": images}], "sample 0: expected an array for input"),
        ([[1, 2]], "sample 0: expected an array for input"),
        ([images, images[:, :, :3, 0]], "sample 1 does not run: "),
    ):
        with pytest.raises(ValueError, match=why):
            call(rounding.Nearest(), None, samples=samples)


def test_settings_that_make_no_sense_are_refused():
    for wrong in (dict(damp=0), dict(damp=np.nan), dict(positions=0), dict(clips=(1, -1))):
        with pytest.raises(ValueError, match="damp, positions and clips are finite and above 0"):
            call(rounding.Nearest(), None, **wrong)


def test_a_layer_that_overflows_is_named():
    model = model_of([("Gemm", "x w", "s"), ("Relu", "s", "y")], {"x": (4, 2)}, w=np.full((2, 2), 1e30))
    params = {"w": choose_qparams(np.full((2, 2), 1e30, np.float32), Grid(8, signed=True, symmetric=True))}
    with pytest.raises(ValueError, match="the layer 'Gemm_s' cannot be rounded: it sees or gives NaN or infinity"):
        rounding.round_network(model, {}, params, [np.full((4, 2), 1e30, np.float32)])


def test_samples_may_come_in_any_pieces():
    _, feeds, _ = mini()
    one = [{"input": np.concatenate([feed["input"] for feed in feeds])}]
    some, whole = call(rounding.GPTQ(), None), call(rounding.GPTQ(), None, samples=one)
    for name, values in some.values.items():
        # What is summed in another order may tip a weight that lies halfway.
        assert (values != whole.values[name]).mean() < 0.02 or name.endswith("bias")
        np.testing.assert_allclose(values, whole.values[name], atol=np.ptp(values) / 7)


def test_a_branch_and_a_shared_input_are_walked_in_order():
    """A residual network in which a later layer reads what an earlier one's input is made of."""
    rng = np.random.default_rng(0)
    nodes = [
        ("Relu", "x", "r"), ("Relu", "r", "s"), ("Gemm", "s a", "t"), ("Gemm", "r b", "u"), ("Gemm", "s c", "v"),
        ("Add", "t u", "p"), ("Add", "p v", "y"),
    ]  # fmt: skip
    model = model_of(nodes, {"x": (30, 5)}, **{name: rng.standard_normal((5, 5)) for name in "abc"})
    feeds = [{"x": rng.standard_normal((30, 5)).astype(np.float32)} for _ in range(3)]
    activations, params, tensors = encodings(model, feeds, 4)
    found = rounding.round_network(model, activations, params, feeds, tensors=tensors)
    assert list(found.layers) == ["Gemm_t", "Gemm_u", "Gemm_v"]
    plain, new = (
        run(write.write_qdq(graph.replace_weights(model, values), activations, params, tensors), feeds[0])[0]
        for values in ({}, found.values)
    )
    real = run(model, feeds[0])[0]
    assert sqnr_db(real, new) > sqnr_db(real, plain)


def test_progress_is_shown_on_stderr_when_asked_for(capsys):
    call(rounding.Nearest(), None)
    assert capsys.readouterr() == ("", "")
    call(rounding.Nearest(), None, progress=True)
    out, err = capsys.readouterr()
    assert "rounding" in err and "8/8" in err and not out
