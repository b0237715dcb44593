"""Calibration against the observers it stands for: fed the same tensors, they choose the same ranges, bit for bit."""

import itertools
import os
import subprocess
import sys
from functools import cache

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtools import zoo
from qtools._histogram import Histogram, binary_bins, mirrored_bins, spread_bins, zeroed_bins
from qtools.affine import Grid
from qtools.observers import OBSERVERS, EntropyObserver, MSEObserver, PercentileObserver, SQNRObserver, Tally
from qtools.ptq import calibrate as module
from qtools.ptq import graph, write
from qtools.ptq.calibrate import Calibration, calibrate

U8, S8, U4 = Grid(8), Grid(8, signed=True, symmetric=True), Grid(4)
RNG = np.random.default_rng


def network(*nodes, inputs=(("x", ["n", "k"]),), outputs=("y",), constants=(), kind=TensorProto.FLOAT):
    entries = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs]
    ends = [helper.make_empty_tensor_value_info(name) for name in outputs]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants]
    made = helper.make_graph(
        [helper.make_node(*node[:3], **dict(node[3:])) for node in nodes], "g", entries, ends, tensors
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


TWICE = network(("Add", ["x", "x"], ["h"]), ("Relu", ["h"], ["y"]))
NAMES = ["x", "h", "y"]


def batches(count=5, seed=0, width=300):
    rng = RNG(seed)
    return [rng.normal(i % 3, 1 + i % 4, (1 + i % 3, width + 7 * i)).astype(np.float32) for i in range(count)]


def alone(batches, method, **settings):
    """The stand-alone observer of a method, fed one by one."""
    observer = OBSERVERS[method](**settings)
    for batch in batches:
        if batch.size:
            observer.update(batch)
    return observer


def tensors_of(x):
    return {"x": x, "h": x + x, "y": np.maximum(x + x, 0)}


def same(one, other, grid):
    for a, b in (*zip(one.range(grid), other.range(grid)), *zip(ends(one.qparams(grid)), ends(other.qparams(grid)))):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)


def ends(qparams):
    return qparams.scale, qparams.zero_point


def outputs_of(model, names, feeds):
    """What ONNX Runtime computes, asked for in another way than `calibrate` does: one tensor a session."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    extended = onnx.ModelProto()
    extended.CopyFrom(model)
    have = {output.name for output in model.graph.output}
    extended.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in have)
    session = ort.InferenceSession(extended.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [dict(zip(names, session.run(names, feed))) for feed in feeds]


# -- equal to the observers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OBSERVERS)
def test_every_method_is_its_observer_bit_for_bit(method):
    data = batches()
    calibration = calibrate(TWICE, data, NAMES)
    assert calibration.tensors == ("x", "h", "y") and calibration.samples == 5
    for name, grid in itertools.product(NAMES, (U8, S8, U4, Grid(16))):
        expected = alone([tensors_of(x)[name] for x in data], method)
        same(calibration.observer(name, method), expected, grid)
        np.testing.assert_array_equal(ends(calibration.qparams(name, grid, method)), ends(expected.qparams(grid)))
        np.testing.assert_array_equal(calibration.range(name, method, grid), expected.range(grid))


@pytest.mark.parametrize(
    "method, settings",
    [
        ("percentile", {"percentile": 99.0}),
        ("percentile", {"percentile": 99.9, "tails": "total"}),
        ("percentile", {"bins": 256}),
        ("percentile", {"rules": "aimet-torch", "bins": 512}),
        ("mse", {"p": 3.0}),
        ("mse", {"p": 2.4, "bins": 128}),
        ("mse", {"bins": 2048}),
        ("sqnr", {"gamma": 1.0}),
        ("entropy", {"levels": 32}),
        ("entropy", {"rules": "ort"}),
        ("min_max", {"rules": "aimet-torch"}),
    ],
)
def test_settings_that_only_choose_can_be_tried_afterwards(method, settings):
    data = batches()
    calibration, expected = calibrate(TWICE, data, ["h"]), alone([x + x for x in data], method, **settings)
    for grid in (U8, S8):
        same(calibration.observer("h", method, **settings), expected, grid)


def test_percentile_is_the_default_that_was_given():
    data = batches()
    given, later = calibrate(TWICE, data, NAMES, percentile=95.0), calibrate(TWICE, data, NAMES)
    np.testing.assert_array_equal(given.range("h", "percentile"), later.range("h", "percentile", percentile=95.0))
    assert given.range("h", "percentile")[1] < later.range("h", "percentile")[1]


def test_options_of_the_scale_are_handed_on():
    calibration = calibrate(TWICE, batches(), ["h"])
    expected = alone([x + x for x in batches()], "min_max").qparams(S8, symmetric_scale="half_range", eps=1e-3)
    assert calibration.qparams("h", S8, symmetric_scale="half_range", eps=1e-3).scale == expected.scale


def test_the_moving_average_depends_on_the_order_and_nothing_else_but_entropy_and_sqnr_does():
    data = batches()
    forward, backward = calibrate(TWICE, data, NAMES), calibrate(TWICE, data[::-1], NAMES)
    for method in ("min_max", "percentile", "mse"):
        np.testing.assert_array_equal(forward.range("h", method), backward.range("h", method))
    assert forward.range("h", "moving_average") != backward.range("h", "moving_average")
    np.testing.assert_array_equal(
        backward.range("h", "moving_average"), alone([x + x for x in data[::-1]], "moving_average").range(U8)
    )


def test_samples_may_be_cut_in_any_way():
    whole = RNG(1).standard_normal((24, 100)).astype(np.float32)
    one, few, many = (calibrate(TWICE, np.array_split(whole, parts), NAMES) for parts in (1, 5, 24))
    for method in ("min_max", "percentile", "mse"):
        np.testing.assert_array_equal(one.range("h", method), few.range("h", method))
        np.testing.assert_array_equal(one.range("h", method), many.range("h", method))
    span = np.ptp(one.range("h"))
    for method, bins in (("sqnr", 512), ("entropy", 1024)):
        np.testing.assert_allclose(one.range("h", method), many.range("h", method), atol=0.1 * span, err_msg=str(bins))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    one, other = calibrate(TWICE, batches(), NAMES, threads=threads), calibrate(TWICE, batches(), NAMES)
    for name, method in itertools.product(NAMES, OBSERVERS):
        np.testing.assert_array_equal(one.range(name, method), other.range(name, method))


def test_a_tensor_that_is_empty_in_some_samples_is_skipped_there():
    data = [x[:, :count] for x, count in zip(batches(), (0, 40, 0, 1, 200))]
    calibration = calibrate(TWICE, data, NAMES)
    assert calibration.samples == 5
    for method in OBSERVERS:
        expected = alone([x + x for x in data], method)
        same(calibration.observer("h", method), expected, U8)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.FLOAT16])
def test_other_floats_are_counted_as_the_observers_count_them(kind):
    model = network(("Add", ["x", "x"], ["y"]), kind=kind)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    data = [x.astype(dtype) for x in batches()]
    calibration = calibrate(model, data, ["y", "x"])
    for method in OBSERVERS:
        same(calibration.observer("y", method), alone([x + x for x in data], method), U8)


def test_a_scalar_and_constant_tensors_are_calibrated_too():
    mean = network(("ReduceMean", ["x"], ["y"], ("keepdims", 0)))
    calibration = calibrate(mean, [np.full((2, 3), value, np.float32) for value in (1, 1, 4)], ["y", "x"])
    for method in OBSERVERS:
        same(calibration.observer("y", method), alone(np.float32([1, 1, 4]), method), U8)


def test_several_inputs_come_as_mappings():
    model = network(("Mul", ["a", "b"], ["y"]), inputs=(("a", ["n"]), ("b", ["n"])))
    pairs = [{"b": x[0], "a": x[0] * 2} for x in batches()]
    calibration = calibrate(model, iter(pairs), ["y", "b"])
    same(calibration.observer("y", "mse"), alone([p["a"] * p["b"] for p in pairs], "mse"), U8)


# -- real networks ---------------------------------------------------------------------------------------------------


@cache
def real(which):
    if which == "digits":
        images = zoo.digits()[0][:12]
        return graph.prepare(zoo.digits_cnn("skew")), [image[None] for image in images]
    lines = zoo.classifier_lines(3, 5)[0]
    return graph.prepare(zoo.direction_classifier(), {"x": (1, 3, 48, 192)}), [line[None] for line in lines]


@pytest.mark.parametrize("which", ["digits", "classifier"])
def test_real_networks_get_what_their_observers_choose(which):
    model, samples = real(which)
    calibration = calibrate(model, samples)
    names = list(dict.fromkeys(write.quantized_tensors(model).activations.values()))
    assert calibration.tensors == tuple(names)
    (source,) = (entry.name for entry in model.graph.input)
    computed = outputs_of(model, [n for n in names if n != source], [{source: x} for x in samples])
    picked = names[:: max(1, len(names) // 6)]
    for name, method in itertools.product(picked, OBSERVERS):
        data = samples if name == source else [values[name] for values in computed]
        same(calibration.observer(name, method), alone(data, method), U8)


def test_the_ranges_make_a_network_that_reads_digits():
    model = graph.prepare(zoo.digits_cnn())
    train, _, images, labels = zoo.digits()
    calibration = calibrate(model, (image[None] for image in train[:50]), methods=["mse"])
    tensors = write.quantized_tensors(model)
    activations = {name: calibration.qparams(root, U8, "mse") for name, root in tensors.activations.items()}
    written = write.write_qdq(model, activations, {}, tensors)
    session = ort.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    right = session.run(None, {"input": images})[0].argmax(axis=1) == labels
    assert right.sum() >= 530


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_samples():
    psutil = pytest.importorskip("psutil")
    resident, process = [], psutil.Process()

    def lines():
        for i in range(60):
            resident.append(process.memory_info().rss)
            yield RNG(i).standard_normal((1, 200_000 + 1000 * (i % 7))).astype(np.float32)

    calibrate(TWICE, lines(), NAMES)
    assert resident[59] - resident[10] < 8 << 20  # 49 more samples hold 120 MB of activations


def test_no_sample_and_no_activation_is_kept():
    import gc
    import weakref

    class Traced(np.ndarray):
        pass

    seen = []

    def samples():
        for x in batches():
            gc.collect()
            assert not any(one() is not None for one in seen[:-1])
            x = x.view(Traced)
            seen.append(weakref.ref(x))
            yield x

    calibrate(TWICE, samples(), NAMES)


def test_saved_and_loaded_it_chooses_the_same_and_is_written_the_same(tmp_path):
    model, samples = real("digits")
    made = calibrate(model, samples, percentile=99.5)
    made.save(tmp_path / "c.npz")
    loaded = Calibration.load(tmp_path / "c.npz", model)
    assert (loaded.tensors, loaded.methods, loaded.samples) == (made.tensors, made.methods, made.samples)
    assert loaded.percentile == 99.5
    for name, method in itertools.product(made.tensors, made.methods):
        same(loaded.observer(name, method), made.observer(name, method), U8)
    before = (tmp_path / "c.npz").read_bytes()
    loaded.save(str(tmp_path / "d.npz"))
    assert (tmp_path / "d.npz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npz", "d.npz"]


def test_double_precision_survives_the_file(tmp_path):
    model = network(
        ("Add", ["x", "x"], ["h"]), ("Cast", ["h"], ["y"], ("to", TensorProto.FLOAT)), kind=TensorProto.DOUBLE
    )
    made = calibrate(model, [x.astype(np.float64) / 3 for x in batches()], NAMES)
    made.save(tmp_path / "c.npz")
    for name, method in itertools.product(NAMES, OBSERVERS):
        same(Calibration.load(tmp_path / "c.npz").observer(name, method), made.observer(name, method), U8)


def test_a_file_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    calibrate(TWICE, batches(), NAMES, methods=["mse", "min_max"]).save(path)
    other = network(("Add", ["x", "x"], ["h"]), ("Abs", ["h"], ["y"]))
    with pytest.raises(ValueError, match="another network"):
        Calibration.load(path, other)
    with pytest.raises(ValueError, match="no method 'entropy', only mse, min_max"):
        Calibration.load(path, TWICE, methods=["mse", "entropy"])
    monkeypatch.setitem(OBSERVERS, "mse", lambda: MSEObserver(bins=64))
    with pytest.raises(ValueError, match="another version"):
        Calibration.load(path, TWICE)
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "missing.npz")


def test_a_damaged_file_is_refused_wherever_it_is_cut(tmp_path):
    path = tmp_path / "c.npz"
    calibrate(TWICE, batches(), NAMES).save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    damaged = [content[:cut] for cut in (0, 1, 100, len(content) // 2, len(content) - 1)]
    for wrong in (*damaged, bytes(flipped), b"no such thing", b"PK\x05\x06" + bytes(18)):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"is not a calibration, or damaged"):
            Calibration.load(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(path)
    np.savez(path, x=np.array([object()]))
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(path)


def test_what_is_lent_is_a_copy():
    calibration = calibrate(TWICE, batches(), NAMES)
    for method in OBSERVERS:
        before = calibration.range("h", method)
        calibration.observer("h", method).update(np.float32([1e6, -1e6]))
        np.testing.assert_array_equal(calibration.range("h", method), before)


# -- what is refused -------------------------------------------------------------------------------------------------

X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_activation_that_is_no_number_is_named_with_its_sample(value):
    bad = X.copy()
    bad[1, 2] = value
    with pytest.raises(ValueError, match=r"sample 2: the tensor 'h' holds NaN or infinity"):
        calibrate(TWICE, [X, X, bad], ["h"])
    root = network(("Sqrt", ["x"], ["y"]))
    with pytest.raises(ValueError, match=r"sample 1: the tensor 'y' holds NaN"):
        calibrate(root, [X, -X], ["x", "y"])


@pytest.mark.parametrize(
    "sample, sentence",
    [
        (
            np.ones((2, 3), int),
            r"sample 1: the input 'x' takes float32 of shape \(\?, \?\), got int64 of shape \(2, 3\)",
        ),
        (np.ones(3, np.float32), r"takes float32 of shape \(\?, \?\), got float32 of shape \(3,\)"),
        ({"y": X}, "sample 1: expected an array for 'x', got 'y'"),
        ({"x": X, "z": X}, "expected an array for 'x', got 'x', 'z'"),
        ({}, "expected an array for 'x'"),
        ({"x": [[1.0]]}, "the input 'x' takes float32.*got list"),
        (7, "expected an array for 'x', got int"),
        (None, "got NoneType"),
        (np.array([["a"]]), "got <U1"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(sample, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(TWICE, [X, sample], NAMES)


def test_fixed_axes_and_pairs_of_inputs_are_checked():
    fixed = network(("Relu", ["x"], ["y"]), inputs=(("x", [1, "k"]),))
    with pytest.raises(
        ValueError, match=r"sample 0: .* takes float32 of shape \(1, \?\), got float32 of shape \(2, 3\)"
    ):
        calibrate(fixed, [X], ["y"])
    two = network(("Add", ["a", "b"], ["y"]), inputs=(("a", ["n", 3]), ("b", ["n", 3])))
    with pytest.raises(ValueError, match="sample 0: expected an array for 'a', 'b', got ndarray"):
        calibrate(two, [X], ["y"])
    with pytest.raises(ValueError, match="sample 0: ONNX Runtime cannot run the network: "):
        calibrate(two, [{"a": X, "b": np.ones((5, 3), np.float32)}], ["y"])


def test_doubles_are_taken_for_floats():
    wide = [x.astype(np.float64) for x in batches()]
    np.testing.assert_array_equal(
        calibrate(TWICE, wide, ["h"]).range("h"), calibrate(TWICE, batches(), ["h"]).range("h")
    )
    with pytest.raises(ValueError, match="sample 0: the tensor 'x' holds"):
        calibrate(TWICE, [X * np.float64(1e300)], ["x"])


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"tensors": ["z"]}, "the network computes no tensor 'z'"),
        ({"tensors": []}, "no tensor to calibrate"),
        ({"tensors": NAMES, "methods": ["best"]}, "methods must be some of .* got 'best'"),
        ({"tensors": NAMES, "methods": []}, "methods must be some of"),
        ({"tensors": NAMES, "percentile": 30}, "percentile must be above 50"),
        ({"tensors": NAMES, "threads": 0}, "must be"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        calibrate(TWICE, [X], **options)


def test_no_samples_empty_tensors_and_integers_are_refused():
    with pytest.raises(ValueError, match="there are no samples"):
        calibrate(TWICE, [], NAMES)
    with pytest.raises(ValueError, match="the tensor 'x' was empty in every sample"):
        calibrate(TWICE, [X[:, :0], X[:0]], NAMES)
    shape = network(("Shape", ["x"], ["y"]))
    with pytest.raises(ValueError, match=r"the tensor 'y' is a tensor\(int64\): only floats"):
        calibrate(shape, [X], ["y"])
    with pytest.raises(ValueError, match="ONNX Runtime cannot load the network: "):
        calibrate(network(("Nonsense", ["x"], ["y"])), [X], ["y"])


def test_what_was_not_calibrated_cannot_be_chosen():
    calibration = calibrate(TWICE, [X], ["h"], methods=["mse", "sqnr", "moving_average"])
    with pytest.raises(ValueError, match="the tensor 'x' was not calibrated"):
        calibration.range("x", "mse")
    with pytest.raises(ValueError, match="'entropy' was not calibrated, only mse, sqnr, moving_average"):
        calibration.qparams("h", U8, "entropy")
    for method, settings in (
        ("mse", {"bins": 1024}),
        ("sqnr", {"bins": 256}),
        ("sqnr", {"rules": "aimet-onnx"}),
        ("sqnr", {"clamp_beyond": 1.0}),
        ("moving_average", {"momentum": 0.5}),
        ("mse", {"block_size": (1, -1)}),
    ):
        with pytest.raises(ValueError, match="what was kept does not serve"):
            calibration.range("h", method, **settings)
    with pytest.raises(ValueError, match="p must be positive"):
        calibration.range("h", "mse", p=-1)


def test_progress_goes_to_stderr_and_is_off_by_default(capsys):
    calibrate(TWICE, batches(), NAMES)
    assert capsys.readouterr() == ("", "")
    calibrate(TWICE, batches(), NAMES, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "5/5" in err


def test_an_interrupt_passes_through_and_leaves_no_thread_behind():
    import threading

    def samples():
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(TWICE, samples(), NAMES)
    assert not [one for one in threading.enumerate() if one.name.startswith("calibrate")]


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [binary_bins, spread_bins, mirrored_bins, zeroed_bins])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_compiled_count_is_the_plain_one(start, dtype):
    rng = RNG(3)
    plain, fast = Histogram(64, start), Histogram(64, start)
    for size in (1, 3, 1000, 5000, 100_000):
        x = (rng.standard_normal(size) * rng.uniform(0.1, 9)).astype(dtype)
        plain.add(x, [])
        fast.take(x, x.min(), x.max())
        for part in ("counts", "anchor", "width", "first", "last", "low", "high"):
            np.testing.assert_array_equal(vars(plain)[part], vars(fast)[part])


def test_a_large_batch_is_counted_as_its_parts():
    x = RNG(4).standard_normal((1100, 1000)).astype(np.float32)
    x[0, 0], x[0, 1] = x.max(), x.min()
    for start in (binary_bins, spread_bins):
        large, small = Histogram(64, start), Histogram(64, start)
        large.add(x, [])
        for part in x:
            small.add(part if small.counts.size else x[:1], [])
        assert large.counts.sum() == x.size and (start is spread_bins or (large.counts == small.counts).all())


@pytest.mark.parametrize("bins", [2, 64, 512, 2048])
def test_a_coarser_histogram_is_the_one_that_fewer_bins_would_have_filled(bins):
    fine, coarse = Histogram(2048), Histogram(bins)
    for x in batches(8, seed=5):
        fine.add(x, [])
        coarse.add(x, [])
    merged = fine.coarser(bins)
    assert merged.width == coarse.width
    for one, other in ((merged, coarse), (coarse, merged)):
        filled = np.flatnonzero(one.counts[0])
        shift = int(one.first[0] - other.first[0])
        np.testing.assert_array_equal(one.counts[0, filled], other.counts[0, filled + shift])


@pytest.mark.parametrize("make", [MSEObserver, SQNRObserver, EntropyObserver])
def test_an_estimate_never_drops_the_best_candidate(make, monkeypatch):
    """With estimates that keep every candidate, all are priced exactly; the choice must be the same."""
    from qtools import _prices

    rng, cases = RNG(6), []
    for shape in ((1,), (50,), (3000,)):
        z = rng.standard_normal(shape)
        cases += [z, np.maximum(z, 0), np.append(z, 60), z * 0, np.rint(z), z - 5, np.clip(3 * z, 0, 6), z * 1e-30]
    observers = [make(bins=64).update(x.astype(np.float32)) for x in cases]
    grids = [U8, S8, U4, Grid(2, signed=True, symmetric=True), Grid(16)]
    quick = [observer.range(grid) for observer in observers for grid in grids]

    def unsure(function):
        shape = (lambda *g: g[3].size) if function is _prices._cross_entropies else (lambda *g: (2, g[2].size))
        unknown = lambda *given: np.full(shape(*given), np.nan)  # noqa: E731
        if function is _prices._cross_entropies:
            return lambda *given: (unknown(*given), np.ones(given[3].size, np.int64))
        return unknown

    monkeypatch.setattr(_prices, "compiled", unsure)
    np.testing.assert_array_equal([observer.range(grid) for observer in observers for grid in grids], quick)


def test_a_tally_keeps_one_histogram_for_each_way_to_lay_bins():
    tally = Tally(OBSERVERS)
    tally.take(X)
    assert {key: h.bins for key, h in tally.histograms.items()} == {
        "binary_bins": 2048,
        "spread_bins": 512,
        "mirrored_bins": 2048,
    }
    assert Tally(["mse"]).histograms["binary_bins"].bins == 512
    assert not tally.take(np.float32([np.nan])) and tally.take(np.zeros((0, 2), np.float32))
    assert tally.histograms["binary_bins"].counts.sum() == X.size
    assert tally.lend(PercentileObserver(99.0)).percentile == 99.0


def test_importing_loads_neither_onnx_runtime_nor_numba():
    program = f"import sys, {module.__name__}; print(sorted({{'onnxruntime', 'numba'}} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
