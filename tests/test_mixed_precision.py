"""Sensitivity against the loop it stands for, plans against brute force, groups against the backend."""

import itertools
import json
import math

import joblib
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import spearmanr

from qtools import cli, zoo
from qtools import mixed_precision as mp
from qtools.affine import fake_quantize
from qtools.encodings import Encoding, Rule, read_overrides
from qtools.npu import htp
from qtools.ptq import sensitivity as measuring
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, Runner, prepared, quantize_network
from qtools.ptq.fuse import fuse
from qtools.ptq.graph import prepare, replace_weights
from qtools.ptq.sensitivity import FLOAT, proxy, sensitivity
from qtools.ptq.write import quantized_tensors

OPTIONS = Options(use_per_channel_quantization=True)


def branching() -> onnx.ModelProto:
    """A skip, one weight for two convolutions, a constant, a moved tensor, and an output in the middle."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(0, 0.3, (4, 4, 3, 3)),
        "b": rng.normal(0, 0.3, 4),
        "k": rng.uniform(0.5, 2, (1, 4, 1, 1)),
        "m": rng.normal(0, 0.2, (144, 5)),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    tensors.append(numpy_helper.from_array(np.array([0, -1]), "shape"))
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["first"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["first"], ["relu"], name="relu"),
        helper.make_node("Conv", ["relu", "w", "b"], ["second"], name="conv2", pads=[1] * 4),
        helper.make_node("Add", ["second", "relu"], ["sum"], name="add"),
        helper.make_node("Mul", ["sum", "k"], ["scaled"], name="mul"),
        helper.make_node("Reshape", ["scaled", "shape"], ["flat"], name="reshape"),
        helper.make_node("MatMul", ["flat", "m"], ["logits"], name="matmul"),
    ]
    outputs = [("sum", ["n", 4, 6, 6]), ("logits", ["n", 5])]
    graph = helper.make_graph(
        nodes,
        "branching",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        tensors,
    )
    return fuse(prepare(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)))


@pytest.fixture(scope="module")
def branched():
    network, rng = branching(), np.random.default_rng(1)
    samples = [rng.normal(size=(1, 4, 6, 6)).astype(np.float32) for _ in range(10)]
    return network, samples, calibrate(network, samples, methods=("min_max",))


@pytest.fixture(scope="module")
def digits():
    network = fuse(prepare(zoo.digits_cnn("mini")))
    images, _, test, labels = zoo.digits()
    calibration = calibrate(network, [images[i : i + 1] for i in range(32)], methods=("min_max",))

    def accuracy(outputs: dict[str, np.ndarray], which: np.ndarray) -> float:
        return 100 * float(np.mean(outputs["output"].argmax(1) == labels[which]))

    return network, [test[i : i + 1] for i in range(60)], calibration, accuracy


def naive(network, samples, calibration, metric, direction, bits, units, subsets, base=8):
    """The loop: for each change the converter writes the whole network, and all samples run through it one by one."""
    tensors = quantized_tensors(network)
    names = [output.name for output in network.graph.output]
    every = {*tensors.activations.values(), *tensors.weights}

    def outputs(types: dict[str, int]) -> list[dict[str, np.ndarray]]:
        as_float = [Rule("*", FLOAT, None, kind, None, Encoding(FLOAT)) for kind in ("activation", "param")]
        full = types | {  # constants go with what is computed with them
            name: types.get(node.output[0], FLOAT)
            for node in network.graph.node
            for name in node.input
            if name in tensors.constants
        }
        kind = {name: "activation" if name in tensors.activations else "param" for name in full}
        rules = [Rule(name, width, None, kind[name]) for name, width in full.items() if width != FLOAT]
        done = quantize_network(network, (), OPTIONS, [*as_float, *rules], calibration=calibration)
        run = Runner(done.network, names)
        rows = [dict(zip(names, run(sample))) for sample in samples]
        return [{n: np.concatenate([row[n] for row in rows[i::subsets]]) for n in names} for i in range(subsets)]

    others = {} if direction == "one_quantized" else dict.fromkeys(every, base)
    real, before = outputs({}), outputs(others)
    losses, noise = np.zeros((2, len(units), len(bits), subsets))
    for u, k in np.ndindex(len(units), len(bits)):
        after = outputs(others | dict.fromkeys(units[u], bits[k]))
        for i, (a, b, r) in enumerate(zip(after, before, real)):
            which = np.arange(len(samples))[i::subsets]
            losses[u, k, i] = metric(b, which) - metric(a, which)
            power = sum(np.square(r[n], dtype=float).sum() for n in names)
            wrong = [sum(np.square(x[n] - r[n], dtype=float).sum() for n in names) for x in (a, b)]
            noise[u, k, i] = (wrong[0] - wrong[1]) / power
    return losses, noise


def largest(outputs: dict[str, np.ndarray], which: np.ndarray) -> float:
    return float(np.abs(next(iter(outputs.values()))).max()) + 0.01 * float(which.sum())


# -- sensitivity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["one_quantized", "one_spared"])
def test_every_number_is_that_of_the_loop_over_whole_networks(branched, direction) -> None:
    network, samples, calibration = branched
    found = sensitivity(network, samples, calibration, largest, options=OPTIONS, direction=direction, subsets=3)
    assert set(found.names) == {"x", "relu", "second", "sum", "scaled", "logits", "w", "m"}
    losses, noise = naive(network, samples, calibration, largest, direction, (4, 8, 16), found.units, 3)
    np.testing.assert_allclose(found.losses, losses, atol=1e-6)
    np.testing.assert_allclose(found.noise, noise, atol=1e-6)
    gains = [-(part[:, 0] - part[:, 2]).mean(1) for part in (losses, noise)]
    order = sorted(range(len(found.units)), key=lambda i: (gains[0][i], gains[1][i]))
    assert found.ranking() == [found.names[i] for i in order]
    assert found.rerun < 0.85 and np.abs(losses).max() > 0.1


def test_several_tensors_change_together_from_types_of_their_own(branched) -> None:
    network, samples, calibration = branched
    whole = [sorted({*quantized_tensors(network).activations.values(), *quantized_tensors(network).weights})]
    asked = dict(options=OPTIONS, bits=(8,), subsets=2)
    found = sensitivity(network, samples, calibration, largest, units=whole, **asked)
    losses, _ = naive(network, samples, calibration, largest, "one_quantized", (8,), whole, 2)
    np.testing.assert_allclose(found.losses, losses, atol=1e-6)
    # From a base of several types: up to all at 8 bits in two steps, or at once.
    base = dict.fromkeys(whole[0], 8) | {"relu": 16, "scaled": 4, "w": FLOAT}
    asked |= dict(direction="one_spared")
    last = sensitivity(network, samples, calibration, units=[("relu", "scaled", "w")], base=base, **asked)
    other = sensitivity(network, samples, calibration, units=[("relu", "w")], base=base, **asked)
    rest = sensitivity(network, samples, calibration, units=["scaled"], base=base | {"relu": 8, "w": 8}, **asked)
    np.testing.assert_allclose(last.noise, other.noise + rest.noise, atol=1e-9)
    assert np.abs(rest.noise).min() > 1e-6


def test_the_spread_is_that_of_the_subsets_and_calibrations_may_differ(digits) -> None:
    network, samples, calibration, accuracy = digits
    images = zoo.digits()[0]
    other = calibrate(network, [images[i : i + 1] for i in range(40, 44)], methods=("min_max",))
    asked = dict(options=OPTIONS, bits=(4,), units=["input", "stem.weight"])
    both = sensitivity(network, samples, [calibration, other], accuracy, subsets=2, **asked)
    alone = [
        sensitivity(network, samples[i::2], one, None, subsets=1, **asked) for i, one in enumerate((calibration, other))
    ]
    np.testing.assert_array_equal(both.noise, np.concatenate([one.noise for one in alone], axis=2))
    np.testing.assert_allclose(both.spread, np.abs(both.losses[..., 0] - both.losses[..., 1]) / math.sqrt(2))
    assert np.isnan(alone[0].spread).all() and both.noise[0, 0, 0] != both.noise[0, 0, 1]


def test_two_processes_find_the_same(branched) -> None:
    network, samples, calibration = branched
    asked = dict(options=OPTIONS, direction="one_spared", bits=(8, 16), subsets=2)
    here = sensitivity(network, samples, calibration, largest, **asked)
    with joblib.parallel_config("loky", n_jobs=2):
        there = sensitivity(network, samples, calibration, largest, **asked)
    np.testing.assert_array_equal(here.losses, there.losses)


@pytest.mark.filterwarnings("default")  # of Dask's own making
def test_a_cluster_finds_the_same(branched) -> None:
    distributed = pytest.importorskip("distributed", reason="dask and distributed are not installed")
    network, samples, calibration = branched
    asked = dict(options=OPTIONS, bits=(8,), subsets=2, units=["x", "relu", "w", "m", "sum", "scaled"])
    here = sensitivity(network, samples, calibration, **asked)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        there = sensitivity(network, samples, calibration, **asked)
    np.testing.assert_array_equal(here.losses, there.losses)


def test_an_interrupted_measurement_goes_on_where_it_ended(digits, tmp_path) -> None:
    network, samples, calibration, accuracy = digits
    path, calls = tmp_path / "kept.json", []

    def interrupted(outputs, which):
        calls.append(None)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return accuracy(outputs, which)

    asked = dict(options=OPTIONS, bits=(4, 8), resume=path, subsets=2)
    whole = sensitivity(network, samples, calibration, accuracy, options=OPTIONS, bits=(4, 8), subsets=2)
    interrupted.__qualname__ = accuracy.__qualname__
    with pytest.raises(KeyboardInterrupt):
        sensitivity(network, samples, calibration, interrupted, **asked)
    kept = len(json.loads(path.read_text())["tasks"])
    resumed = sensitivity(network, samples, calibration, interrupted, **asked)
    assert kept >= 2 and len(calls) < 40 + 2 * whole.losses.size - 2 * kept
    np.testing.assert_array_equal(resumed.losses, whole.losses)
    with pytest.raises(ValueError, match="holds measurements of another network, other samples or options"):
        sensitivity(network, samples[1:], calibration, accuracy, **asked)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no measurements, or is damaged"):
        sensitivity(network, samples, calibration, accuracy, **asked)


def test_what_cannot_be_measured_is_said_in_a_sentence(digits, branched) -> None:
    network, samples, calibration, _ = digits
    for wrong, sentence in [
        (dict(units=["nonsense"]), "no activation or weight 'nonsense'"),
        (dict(bits=(5,)), "4, 8 or 16 bits"),
        (dict(metric=lambda outputs, which: math.nan), "the metric is nan .*: it must be a finite number"),
        (dict(subsets=99), "each subset needs a sample"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            sensitivity(network, samples[:4], calibration, **{"subsets": 1, **wrong})
    with pytest.raises(ValueError, match="a sample must hold finite numbers for input"):
        sensitivity(network, [np.full_like(samples[0], np.nan)], calibration, subsets=1)
    network = branching()
    branch = helper.make_graph(
        [helper.make_node("Identity", ["logits"], ["inner"])], "then",
        [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )  # fmt: skip
    network.graph.node.append(helper.make_node("If", ["flag"], ["end"], then_branch=branch, else_branch=branch))
    network.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    network.graph.output.append(helper.make_tensor_value_info("end", TensorProto.FLOAT, None))
    watched = calibrate(network, branched[1], methods=("min_max",))
    with pytest.raises(ValueError, match="the network branches"):
        sensitivity(network, branched[1], watched)
    with pytest.raises(ValueError, match="the network branches"):
        mp.search(network, branched[1], watched, "80%")
    with pytest.raises(ValueError, match=r"the metric is nan .*: it must be a finite number"):
        mp.search(*branched, "80%", metric=lambda outputs, which: math.nan)
    for wrong in (dict(rounds=0), dict(hardest=0)):
        with pytest.raises(ValueError, match="rounds and hardest are 1 or more"):
            mp.search(*branched, "80%", **wrong)


def test_a_few_samples_guess_the_ranking(digits) -> None:
    network, samples, calibration, _ = digits
    true = sensitivity(network, samples, calibration, options=OPTIONS, bits=(4,))
    guess = proxy(network, samples[:3], calibration, options=OPTIONS, bits=(4,))
    assert guess.names == true.names and guess.losses.shape == (len(true.names), 1, 3)
    assert spearmanr(guess.mean, true.mean)[0] > 0.8


def test_behind_a_linear_operator_the_guess_is_the_truth(branched) -> None:
    network, samples, calibration = branched
    # The outputs are `sum` itself, with gain 1, and `logits`, linear in `scaled`.
    local = proxy(network, samples, calibration, "local", options=OPTIONS, units=["sum", "x"], bits=(8,))
    encoding = measuring.candidates(network, calibration, OPTIONS, (8,))["x"][8]
    codes = np.clip(np.rint(samples[3] / encoding.scale + encoding.zero_point), 0, 255)
    error = (codes - encoding.zero_point) * encoding.scale - samples[3]
    np.testing.assert_allclose(local.noise[1, 0, 3], np.sum(error**2) / np.sum(samples[3] ** 2), rtol=1e-4)
    true = sensitivity(network, samples, calibration, options=OPTIONS, units=["scaled"], bits=(8,), subsets=1)
    guess = proxy(network, samples * 8, calibration, "hessian", options=OPTIONS, units=["scaled"], bits=(8,))
    assert guess.mean[0, 0] == pytest.approx(true.mean[0, 0], rel=0.35)
    # One weight of two convolutions changes in both, as in the whole network.
    guess = proxy(network, samples[:2], calibration, "hessian", options=OPTIONS, units=["w"], bits=(8,))
    weight = numpy_helper.to_array(next(t for t in network.graph.initializer if t.name == "w"))
    step = np.sqrt(np.square(weight).mean()) / 100 * np.random.default_rng(0).standard_normal(weight.shape)
    error = weight - fake_quantize(weight, measuring.candidates(network, calibration, OPTIONS, (8,))["w"][8])
    runs = [Runner(one, ["sum", "logits"]) for one in (network, replace_weights(network, {"w": weight + step}))]
    for sample, got in zip(samples, guess.noise[0, 0]):
        real, moved = (np.concatenate([np.ravel(x) for x in run(sample)]).astype(float) for run in runs)
        gain = np.square(moved - real).sum() / np.square(real).sum() / np.square(step).sum()
        assert got == pytest.approx(gain * np.square(error).sum(), rel=1e-2)


# -- choosing --------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw, most: int = 5) -> mp.Problem:
    units, numbers = draw(st.integers(1, most)), st.integers(0, 20)
    table = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=units, max_size=units)
    losses, costs = (np.array(draw(table), float) for _ in range(2))
    pairs = []
    for i, j in draw(st.lists(st.tuples(st.integers(0, units - 1), st.integers(0, units - 1)), max_size=3)):
        if i != j:
            price = np.array(draw(st.lists(numbers, min_size=9, max_size=9)), float).reshape(3, 3)
            price[2, draw(st.integers(0, 1))] = np.inf if draw(st.booleans()) else 0
            pairs.append((i, j, price))
    return mp.Problem(tuple((f"t{i}",) for i in range(units)), (4, 8, 16), losses, costs, tuple(pairs))


def every_plan(problem: mp.Problem) -> list[mp.Plan]:
    choices = itertools.product(range(3), repeat=len(problem.units))
    plans = [problem.plan(np.array(choice), "one of all") for choice in choices]
    return [plan for plan in plans if math.isfinite(plan.cost)]


@settings(deadline=None, max_examples=40)
@given(problems(), st.integers(0, 120))
def test_the_exact_plan_is_the_best_of_all(problem: mp.Problem, budget: int) -> None:
    fitting = [plan.loss for plan in every_plan(problem) if plan.cost <= budget]
    if not fitting:
        for method in (mp.exact, mp.greedy):
            with pytest.raises(ValueError, match=f"the budget of {budget} cannot be met"):
                method(problem, budget)
        return
    best, quick = mp.exact(problem, budget), mp.greedy(problem, budget)
    assert best.loss == min(fitting) and best.cost <= budget
    assert quick.loss >= best.loss and quick.cost <= budget


@settings(deadline=None, max_examples=10)
@given(problems(), st.sampled_from([0.2, 0.5, 1.0]))
def test_no_rule_beats_the_front(problem: mp.Problem, share: float) -> None:
    rule = mp.top_share(problem, share)
    if math.isfinite(rule.cost):
        assert mp.exact(problem, rule.cost).loss <= rule.loss
    try:
        front = mp.pareto(problem, 4)
    except ValueError:
        assert not every_plan(problem)
        return
    assert [p.cost for p in front] == sorted({p.cost for p in front})
    assert [p.loss for p in front] == sorted({p.loss for p in front}, reverse=True)
    assert all(mp.exact(problem, plan.cost).loss == plan.loss for plan in front)
    assert front[-1].loss == mp.exact(problem, 1e9).loss


def test_the_rule_keeps_the_worst_share_wide() -> None:
    losses = np.array([[0, 5, 1], [0, 9, 0], [0, 2, 0], [0, 3, 3], [0, 1, 0]], float)
    problem = mp.Problem(tuple((name,) for name in "abcde"), (4, 8, 16), losses, np.tile([4.0, 8, 16], (5, 1)))
    assert mp.top_share(problem, 0.4).types == {"a": 16, "b": 16, "c": 8, "d": 8, "e": 8}


@pytest.fixture(scope="module")
def table(digits):
    return sensitivity(digits[0], digits[1][:2], digits[2], bits=(4, 8, 16), subsets=1)


def test_costs_are_what_the_network_moves_and_multiplies(digits, table) -> None:
    network = digits[0]
    tensors = quantized_tensors(network)
    shapes = {e.name: [d.dim_value for d in e.type.tensor_type.shape.dim] for e in network.graph.value_info}
    shapes |= {e.name: [1, *(d.dim_value for d in e.type.tensor_type.shape.dim[1:])] for e in network.graph.input}
    weights = {t.name: numpy_helper.to_array(t) for t in network.graph.initializer if t.name in tensors.weights}
    macs, traffic = 0, sum(weight.size for weight in weights.values())
    for node in network.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            weight = weights[node.input[1]]
            places = math.prod(shapes[node.output[0]][2:]) if node.op_type == "Conv" else 1
            macs += places * weight.size  # every weight once for each place of the output
    readers = {root: sum(root in node.input for node in network.graph.node) for root in table.names}
    sizes = {name: math.prod(max(1, d) for d in shapes.get(name, [1, 10])) for name in table.names}
    traffic += sum(sizes[name] * (1 + readers[name]) for name in table.names if name not in weights)
    eight = np.ones(len(table.units), int)  # of 4, 8 and 16
    assert mp.problem(table, network, "bitops").cost(eight) == macs * 64
    assert mp.problem(table, network, "bitops").cost(eight + 1) == macs * 256
    assert mp.problem(table, network, "bytes").cost(eight) == traffic
    assert mp.problem(table, network, "wide").cost(eight + 1) == len(table.names) - len(weights)
    own = {"input": {8: 1.5, 16: 4.0}}
    assert mp.problem(table, network, own).cost(eight + 1) == 4.0
    with pytest.raises(ValueError, match="no activation or weight 'nonsense'"):
        mp.problem(table, network, {"nonsense": {8: 1.0}})


def test_only_what_an_architecture_takes_is_chosen(digits, table) -> None:
    network, weights = digits[0], quantized_tensors(digits[0]).weights
    free, bound = (mp.problem(table, network, "bytes", OPTIONS, arch) for arch in (None, "v68"))
    assert 16 in {mp.exact(free, 1e9).types[name] for name in weights} and not free.excluded
    types = mp.exact(bound, 1e9).types
    assert {types[name] for name in weights} <= {4, 8} and 4 not in {types[n] for n in types if n not in weights}
    assert any("v68 refuses Conv of uint16 with int16 weights" in why for why in bound.excluded)
    assert any("uint4 activations" in why for why in bound.excluded)
    # What was not tried cannot be chosen, and what was left out stays as it is.
    few = sensitivity(network, digits[1][:2], digits[2], bits=(16,), units=["input"], subsets=1)
    types = mp.exact(mp.problem(few, network, "bytes", OPTIONS), 1e9).types
    assert types["input"] == 16 and set(types.values()) == {8, 16} and len(types) == len(table.names)


# -- groups ----------------------------------------------------------------------------------------------------------


def test_products_and_arithmetic_with_constants_keep_a_width(branched) -> None:
    assert sorted(map(sorted, mp.groups(branched[0]))) == [
        ["logits", "scaled", "sum"], ["relu", "second", "x"],
    ]  # fmt: skip


@pytest.mark.skipif(not htp.status().available, reason=htp.status().reason)
def test_the_backend_takes_any_widths_that_groups_allow_and_no_others() -> None:
    network = fuse(prepare(zoo.direction_classifier(), {"x": (1, 3, 48, 192)}))
    lines, _ = zoo.classifier_lines(2, 1)
    calibration = calibrate(network, [line[None] for line in lines], methods=("min_max",))
    options = Options(use_per_channel_quantization=True, use_per_row_quantization=True)
    groups, rng = mp.groups(network), np.random.default_rng(0)
    assert len(groups) > 20
    for _ in range(2):
        types = {name: 16 for group in groups if rng.random() < 0.5 for name in group}
        htp.session(mp.apply(network, types, calibration, options).network)
    first = network.graph.node[0]
    assert first.op_type == "Conv"
    with pytest.raises(htp.HTPRefused):
        htp.session(mp.apply(network, {first.input[0]: 16}, calibration, options).network)


# -- all of it -------------------------------------------------------------------------------------------------------


def test_types_become_overrides_that_the_converter_takes(branched, tmp_path) -> None:
    network, _, calibration = branched
    types = {"x": 8, "relu": 8, "second": 8, "sum": 16, "scaled": 16, "logits": 16, "w": 4, "m": 8}
    rules = mp.overrides(network, types, OPTIONS)
    assert {rule.pattern: rule.bits for rule in rules.rules} == {"sum": 16, "scaled": 16, "logits": 16, "w": 4, "k": 16}
    mp.write_overrides(rules, tmp_path / "o.json")
    assert set(read_overrides(tmp_path / "o.json").rules) == set(rules.rules)
    done = mp.apply(network, types, calibration, OPTIONS)
    codes = {t.name: t.data_type for t in done.network.graph.initializer}
    assert codes["scaled.zero_point"] == codes["k.zero_point"] == TensorProto.UINT16
    assert codes["relu.zero_point"] == TensorProto.UINT8 and codes["w.codes"] == TensorProto.INT4


def test_the_hardest_samples_are_those_that_suffer_most(digits) -> None:
    network, samples, calibration, _ = digits
    asked = []

    def told(outputs: dict[str, np.ndarray], which: np.ndarray) -> float:
        asked.extend(which)
        return 0.0

    mp.search(network, samples, calibration, "60%", metric=told, hardest=6, subsets=2, rounds=1, weight_bits=(4, 8))
    few = dict.fromkeys(quantized_tensors(network).weights, 4)
    runs = [Runner(net, ["output"]) for net in (network, mp.apply(network, few, calibration).network)]
    real, coarse = (np.concatenate([run(sample)[0] for sample in samples]) for run in runs)
    noise = np.square(real - coarse).sum(1) / np.square(real).sum(1)
    assert set(asked) == set(np.argsort(noise)[-6:])


@pytest.fixture
def files(tmp_path):
    onnx.save(branching(), tmp_path / "net.onnx")
    rng = np.random.default_rng(2)
    for i in range(6):
        rng.normal(size=(1, 4, 6, 6)).astype("<f4").tofile(tmp_path / f"{i}.raw")
    (tmp_path / "list.txt").write_text("\n".join(f"{i}.raw" for i in range(6)))
    return tmp_path


def command(files, *more: str) -> list[str]:
    start = ["search", str(files / "net.onnx"), "--input_list", str(files / "list.txt"), "-d", "x", "1,4,6,6"]
    return [*start, "--output", str(files / "overrides.json"), *more]


def test_the_command_writes_overrides_within_the_budget(files, capsys) -> None:
    args = command(files, "--budget", "50%", "--soc", "sm8650", "--rounds", "2", "--weight_candidates", "4,8")
    assert cli.main([*args, "--resume", str(files / "kept")]) == 0
    said = capsys.readouterr().out
    assert "chosen" in said and "front 1" in said and "wrote" in said and "+-" in said
    written = json.loads((files / "overrides.json").read_text())
    network = prepared(files / "net.onnx", {"x": (1, 4, 6, 6)})
    assert sorted(written["activation_encodings"]) in (["logits", "scaled", "sum"], ["relu", "second", "x"])
    rules = read_overrides(files / "overrides.json")
    done = quantize_network(network, [np.zeros((1, 4, 6, 6), np.float32)], Options(), rules)
    assert not [note for note in done.notes if "override" in note]
    assert (files / "kept.1").exists() and (files / "kept.2").exists()


def test_the_command_also_converts_with_what_it_found(files, capsys) -> None:
    target = files / "mixed.onnx"
    asked = command(files, "--budget", "50%", "--rounds", "1", "--converted", str(target), "--algorithms", "gptq")
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert "SQNR of the outputs" in said and target.exists() and target.with_suffix(".encodings").exists()
    rules = read_overrides(files / "overrides.json")
    network, kinds = prepared(files / "net.onnx", {"x": (1, 4, 6, 6)}), {16: TensorProto.UINT16, 8: TensorProto.UINT8}
    written = {t.name: t for t in onnx.load(target).graph.initializer}
    wide = {rule.pattern for rule in rules.rules if rule.bits == 16}
    for name in quantized_tensors(network).activations.values():
        assert written[f"{name}.zero_point"].data_type == kinds[16 if name in wide else 8]
    samples = [np.fromfile(files / f"{i}.raw", "<f4").reshape(1, 4, 6, 6) for i in range(6)]
    nearest = {t.name: t for t in quantize_network(network, samples, Options(), rules).network.graph.initializer}
    assert nearest["m.codes"].raw_data != written["m.codes"].raw_data


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--budget", "1", "--algorithms", "gptq"), "--algorithms are for the network that --converted names"),
        (("--budget", "1", "--algorithms", "magic", "--converted", "c.onnx"), "there is no 'magic'"),
        (("--budget", "1", "--converted", "nowhere/c.onnx"), "there is no folder nowhere for c.onnx"),
        (("--budget", "1", "--rounds", "0"), "rounds and hardest are 1 or more, got 0"),
        (("--budget", "-1"), "a budget is a number, or a share such as 30%"),
        (("--budget", "5", "--cost", "bytes"), "the budget of 5 cannot be met: the least that is legal costs"),
        (("--budget", "1", "--candidates", "8,12"), "candidates are 4, 8 and 16"),
        (("--budget", "1", "--cost", "costs.json"), "the network has no activation or weight 'nonsense'"),
        (("--budget", "1", "--cost", "list.txt"), "is no table of costs"),
        (("--budget", "1", "--soc", "sm1"), "--soc must be one of"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(files, capsys, monkeypatch, more, sentence) -> None:
    monkeypatch.chdir(files)
    (files / "costs.json").write_text('{"nonsense": {"8": 1}}')
    assert cli.main(command(files, *more)) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and not (files / "overrides.json").exists()
