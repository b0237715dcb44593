"""Counting layers, the time model, its fit to published latencies, language models, the CPU, and the command."""

import csv
import importlib.util
import json
import math
import sys
from collections import defaultdict
from dataclasses import astuple, replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, parser

from qtools import cli, zoo
from qtools.npu import roofline, soc
from qtools.npu.roofline import PRECISIONS, Layer
from qtools.ptq import convert, fuse, graph
from qtools.zoo import shapes

DATA = soc.TABLE.parent
FIT = json.loads((DATA / "results/measured/07_fit.json").read_text())
S24 = {name: soc.rates("sm8650", name) for name in ("float", "w8a8", "w8a16", "w4a16")}


def recipe():
    spec = importlib.util.spec_from_file_location("roofline_fit", DATA / "recipes/roofline_fit.py")
    module = sys.modules["roofline_fit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of_table():
    found = defaultdict(list)
    with (DATA / "model_layers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["model"]].append(row)
    return found


def parsed(body: str, x: str = "1,8,6,6", more: str = "") -> onnx.ModelProto:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{x}] x) => (float[1] y) {more} {{{body}}}'
    model = parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def weight(*sizes: int) -> str:
    """The text of a constant `w` of this shape."""
    return f"s = Constant <value = int64[{len(sizes)}] {{{', '.join(map(str, sizes))}}}> () w = ConstantOfShape (s)"


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(rows_of_table()))
def test_macs_of_the_layer_table_are_kept_to_the_last_one(name):
    network = roofline.from_table(name)
    assert network.macs == sum(int(row["macs"]) for row in rows_of_table()[name])
    assert not network.unknown
    for layer in network.layers:
        if layer.channels:
            per_output = layer.depth * (layer.macs // layer.outputs // layer.depth)
            assert layer.macs == layer.outputs * per_output and layer.rows * layer.channels == layer.outputs
    unshaped = [layer for layer in network.layers if layer.macs and not layer.channels and layer.op != "attention"]
    assert not unshaped


@pytest.mark.parametrize("build", [shapes.resnet50, shapes.mobilenet_v2])
def test_a_network_counts_the_same_from_onnx_as_from_the_table(build):
    fields = ("kind", "macs", "inputs", "outputs", "rows", "depth", "channels", "nodes")
    network = roofline.from_onnx(graph.prepare(build(), {"x": (1, 3, 224, 224)}))
    table = roofline.from_table(build.__name__)
    assert network.macs == table.macs == {"resnet50": 4_089_184_256, "mobilenet_v2": 300_774_272}[build.__name__]
    ours, theirs = ([[getattr(layer, one) for one in fields] for layer in one.layers] for one in (network, table))
    if build is shapes.resnet50:  # torchvision runs the shortcut last, this one before the addition: the same order
        assert sorted(ours, key=str) == sorted(theirs, key=str)
    else:
        assert ours == theirs


def macs_by_running(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> int:
    """An independent count: ONNX Runtime says how large every output is, the weight how many products each takes."""
    watched = graph.copy_of(model)
    del watched.graph.output[:]
    products = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    watched.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in products)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    results = ort.InferenceSession(watched.SerializeToString(), options).run(None, feeds)
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    return sum(
        result.size * (math.prod(sizes[node.input[1]][1:])) for node, result in zip(products, results, strict=True)
    )


def test_efficientnet_lite0_counts_what_a_run_of_it_takes():
    model = graph.prepare(zoo.efficientnet_lite0(), {"x": (1, 3, 224, 224)})
    assert roofline.from_onnx(model).macs == macs_by_running(model, {"x": np.zeros((1, 3, 224, 224), np.float32)})


def test_a_quantized_network_has_the_layers_of_the_float_one():
    float_network = fuse.fuse(graph.prepare(zoo.digits_cnn("mini"), {"input": (1, 1, 8, 8)}))
    samples = ({"input": image[None]} for image in zoo.digits()[0][:4])
    quantized = convert.quantize_network(float_network, samples, convert.Options(use_per_channel_quantization=True))
    before, after = roofline.from_onnx(float_network), roofline.from_onnx(quantized.network)
    assert [layer.op for layer in before.layers] == [layer.op for layer in after.layers] and not after.unknown
    assert [astuple(layer)[2:9] for layer in before.layers] == [astuple(layer)[2:9] for layer in after.layers]


def test_torch_and_onnx_count_the_same():
    import torch

    module = roofline.from_torch(zoo.digits_module("skew"), torch.zeros(1, 1, 8, 8))
    network = roofline.from_onnx(graph.prepare(zoo.digits_cnn("skew"), {"input": (1, 1, 8, 8)}))
    assert not module.unknown and len(module.layers) == len(network.layers)
    for ours, theirs in zip(module.layers, network.layers):
        assert (ours.kind, ours.macs, ours.rows, ours.depth, ours.channels, ours.inputs, ours.outputs) == (
            theirs.kind, theirs.macs, theirs.rows, theirs.depth, theirs.channels, theirs.inputs, theirs.outputs,
        )  # fmt: skip


def test_attention_of_torch_is_taken_apart():
    import torch

    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    network = roofline.from_torch(layer, torch.zeros(1, 10, 64))
    assert not network.unknown
    assert network.macs == 10 * 64 * (3 * 64 + 64 + 128 + 128) + 2 * 10 * 10 * 64
    assert sum(one.op == "softmax" for one in network.layers) == 1


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([(1, 8), (2, 8), (8, 8), (4, 16)]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 1),
    st.booleans(),
)
def test_convolutions_are_counted_product_by_product(widths, kernel, stride, pad, transposed):
    groups, out = widths
    weight = [8, out // groups, kernel, kernel] if transposed else [out, 8 // groups, kernel, kernel]
    op = "ConvTranspose" if transposed else "Conv"
    options = dict(group=groups, strides=[stride] * 2, pads=[pad if kernel > 1 else 0] * 4)
    model = parsed("y = Identity (x)", "1,8,5,5")
    model.graph.node[0].CopyFrom(helper.make_node(op, ["x", "w"], ["y"], **options))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(weight, np.float32), "w"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    result = ort.InferenceSession(model.SerializeToString()).run(None, {"x": np.ones((1, 8, 5, 5), np.float32)})[0]
    # For every output element (of a transposed one: for every input element) one product a weight it meets.
    places = 8 * 5 * 5 if transposed else result.size
    expected = sum(1 for _ in range(places) for _ in range(math.prod(weight[1:])))
    (layer,) = roofline.from_onnx(model).layers
    assert layer.macs == expected and layer.weights == math.prod(weight) and layer.outputs == result.size
    assert layer.kind == ("depthwise" if groups == 8 and (weight[1] if not transposed else 1) == 1 else "matrix")


@pytest.mark.parametrize(
    ("x", "body", "macs", "sizes"),
    [
        ("2,7,5", f"{weight(5, 3)} y = MatMul (x, w)", 2 * 7 * 5 * 3, (14, 5, 3)),
        ("4,7,5", "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)", 4 * 7 * 7 * 5, (7, 5, 7)),
        ("6,5", f"{weight(9, 5)} y = Gemm <transB = 1> (x, w)", 6 * 5 * 9, (6, 5, 9)),
        ("5,6", f"{weight(5, 9)} y = Gemm <transA = 1> (x, w)", 6 * 5 * 9, (6, 5, 9)),
        ("5", f"{weight(5, 3)} y = MatMul (x, w)", 15, (1, 5, 3)),
    ],
)
def test_products_of_matrices(x, body, macs, sizes):
    layer = roofline.from_onnx(parsed(body, x)).layers[-1]
    assert (layer.macs, (layer.rows, layer.depth, layer.channels)) == (macs, sizes)


CONV = f"{weight(8, 8, 1, 1)} c = Conv (x, w)"
BIAS = "b = Constant <value = float[1, 8, 1, 1] {1, 1, 1, 1, 1, 1, 1, 1}> ()"


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (f"{CONV} y = Relu (c)", ["Conv"]),
        (f"{CONV} {BIAS} y = Add (c, b)", ["Conv"]),
        (f"{CONV} g = Sigmoid (c) y = Mul (c, g)", ["Conv"]),
        (f"{CONV} r = Reshape (c, s) y = Relu (r)", ["Conv"]),
        (f"{CONV} a = Add (c, x) y = Relu (a)", ["Conv", "Add"]),
        (f"{CONV} y = Mul (c, x)", ["Conv", "Mul"]),
        (
            f"{CONV} o = Constant <value = int64[4] {{1, 8, 6, 6}}> () p = ConstantOfShape (o) y = Add (c, p)",
            ["Conv", "Add"],
        ),
        (f"{CONV} t = Transpose (c) y = Relu (t)", ["Conv", "Transpose", "Relu"]),
        (f"{CONV} p = GlobalAveragePool (c) y = Sigmoid (p)", ["Conv", "GlobalAveragePool", "Sigmoid"]),
        (f"{CONV} n = Shape (c) y = Reshape (c, n)", ["Conv"]),
        ("y = Relu (x)", ["Relu"]),
    ],
)
def test_what_is_folded_and_what_is_not(body, kept):
    body = body.replace("Reshape (c, s)", "Reshape (c, k) ").replace(
        CONV, f"k = Constant <value = int64[1] {{-1}}> () {CONV}"
    )
    assert [layer.op for layer in roofline.from_onnx(parsed(body)).layers] == kept


def test_what_is_not_known_is_named_and_costs_something():
    body = "a, b = MyOperator (x) y = Add (a, x)"
    model = parsed(body, more="<float[1,8,6,6] a, float[1,8,6,6] b>")
    network = roofline.from_onnx(model)
    assert network.unknown == ("MyOperator",)
    assert roofline.work(network.layers[0], PRECISIONS["w8a8"], S24["w8a8"]).vector == 3 * 8 * 36
    row = dict(op="wavelet", kernel="", groups=1, macs=0, weight_elems=0, input_elems=5, output_elems=5)
    assert roofline.from_rows([row]).unknown == ("wavelet",)


def test_embeddings_read_the_rows_they_need_and_not_the_table():
    body = f"{weight(5000, 64)} i = Cast <to = 7> (x) y = Gather (w, i)"
    layer = roofline.from_onnx(parsed(body, "10")).layers[-1]
    assert (layer.weights, layer.inputs, layer.outputs) == (0, 640, 640)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"macs": "x"}, "layer 0 must have a kernel and whole numbers"),
        ({"macs": -1}, "negative"),
        ({"output_elems": math.nan}, "whole numbers"),
        ({"kernel": "3xy"}, "whole numbers"),
    ],
)
def test_rows_that_make_no_sense_are_refused(change, message):
    row = dict(op="conv2d", kernel="3x3", groups=1, macs=9, weight_elems=9, input_elems=1, output_elems=1)
    with pytest.raises(ValueError, match=message):
        roofline.from_rows([row | change])
    with pytest.raises(ValueError, match="layer 0"):
        roofline.from_rows([{"op": "relu"}])


def test_unknown_networks_shapes_and_empty_ones_are_refused():
    with pytest.raises(ValueError, match="has no network 'alexnet': it has mobilenet_v2"):
        roofline.from_table("alexnet")
    with pytest.raises(ValueError, match="the size of the tensor 'x' is not known"):
        roofline.from_onnx(parsed("y = Relu (x)", "N,8"))
    with pytest.raises(ValueError, match="no layers"):
        roofline.predict([], PRECISIONS["w8a8"], S24["w8a8"])


# -- bytes and time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [("w8a8", (640, 300, 80)), ("w8a16", (640, 600, 80)), ("w4a16", (320, 600, 80)), ("float", (1280, 600, 0)),
     ("float32", (2560, 1200, 0))],
)  # fmt: skip
def test_bytes_of_each_precision(name, expected):
    layer = Layer("a", "Conv", "matrix", 3200, 640, 100, 200, 5, 32, 20)
    assert roofline.traffic(layer, PRECISIONS[name]) == expected
    assert roofline.intensity(layer, PRECISIONS[name]) == pytest.approx(6400 / sum(expected))


def test_whole_tiles_are_what_the_matrix_unit_works_on():
    """49 pixels, 3 channels in, 40 out, 3x3: a tile of 64 (8 bits) or two of 32 (16), 32 deep, 64 wide, nine times."""
    layer = Layer("a", "Conv", "matrix", 49 * 3 * 40 * 9, 1, 1, 1, 49, 3, 40)
    tiles = {"w8a8": 64 * 32 * 64 * 9, "w8a16": 64 * 32 * 64 * 9, "float": 64 * 32 * 64 * 9}
    wide = replace(layer, macs=65 * 3 * 40 * 9, rows=65)
    wide_tiles = {"w8a8": 128 * 32 * 64 * 9, "w8a16": 96 * 32 * 64 * 9, "float": 96 * 32 * 64 * 9}
    for name in tiles:
        assert roofline.work(layer, PRECISIONS[name], S24[name]).matrix == pytest.approx(tiles[name])
        assert roofline.work(wide, PRECISIONS[name], S24[name]).matrix == pytest.approx(wide_tiles[name])
    unknown = replace(layer, rows=0, depth=0, channels=0)
    assert roofline.work(unknown, PRECISIONS["w8a8"], S24["w8a8"]).matrix == layer.macs


def test_activations_go_through_dram_when_they_do_not_fit():
    half = 4 * 2**20
    fits, spills = (Layer("a", "Add", "vector", inputs=half, outputs=half + more) for more in (0, 1))
    eight = PRECISIONS["w8a8"], S24["w8a8"]
    assert roofline.work(fits, *eight).dram == 0 and roofline.work(spills, *eight).dram == 2 * half + 1
    assert roofline.work(fits, PRECISIONS["w8a16"], S24["w8a16"]).dram == 4 * half
    assert roofline.work(replace(spills, nodes=2), *eight).dram == 0  # two heads, one after the other


def test_concatenation_is_free_in_floating_point_only():
    layer = Layer("a", "Concat", "concat", inputs=100, outputs=100)
    assert sum(roofline.work(layer, PRECISIONS["float"], S24["float"])) == 0
    assert roofline.work(layer, PRECISIONS["w8a8"], S24["w8a8"])[2:4] == (200, 1)


def by_hand(network, precision, rates):
    """The model once more, in plain sums, from its description."""
    wide = {"float": 2, "w8a8": 1, "w8a16": 2}[precision]
    busy = memory = 0.0
    for one in network.layers:
        io = (one.inputs + one.outputs) * wide
        memory += one.weights * (2 if precision == "float" else 1) + (io if io > 8 * 1024**2 else 0)
        memory += 4 * one.channels if one.weights and precision != "float" else 0
        if one.kind == "concat" and precision == "float":
            continue
        busy += rates.node
        if one.kind == "matrix":
            macs = one.macs
            for size, step in ((one.rows, 64 // wide), (one.depth, 32), (one.channels, 32)):
                macs *= -(-size // step) * step / size if size else 1
            busy += macs / rates.matrix
        elif one.kind == "depthwise":
            busy += one.macs * wide / rates.depthwise
        else:
            busy += io / rates.vector
    memory /= rates.bandwidth
    return rates.fixed + (busy**rates.overlap + memory**rates.overlap) ** (1 / rates.overlap)


@pytest.mark.parametrize("name", ["resnet50", "densenet121", "vit", "fcn_resnet50", "shufflenet_v2"])
@pytest.mark.parametrize("precision", ["float", "w8a8", "w8a16"])
def test_a_prediction_is_what_the_formula_gives(name, precision):
    network, rates = roofline.from_table(name), S24[precision]
    found = roofline.predict(network, PRECISIONS[precision], rates)
    assert found.seconds == pytest.approx(by_hand(network, precision, rates), rel=1e-9)
    assert found.seconds == pytest.approx(rates.fixed + sum(one.seconds for one in found.layers), rel=1e-9)
    assert max(found.busy, found.memory) <= found.seconds - rates.fixed <= found.busy + found.memory


@given(st.floats(0, 1e3), st.floats(0, 1e3), st.floats(1, 50))
@settings(deadline=None)
def test_overlap_lies_between_the_larger_and_the_sum(busy, memory, p):
    both = roofline.overlapped(busy, memory, p)
    assert max(busy, memory) * (1 - 1e-9) - 1e-29 <= both <= (busy + memory) * (1 + 1e-9) + 1e-29
    assert roofline.overlapped(busy, memory, 1) == pytest.approx(busy + memory, rel=1e-9, abs=1e-29)
    assert roofline.overlapped(busy, memory, math.inf) == pytest.approx(max(busy, memory), rel=1e-9, abs=1e-29)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["matrix", "depthwise", "vector", "bandwidth"]), st.floats(1.01, 10))
def test_a_faster_chip_is_never_slower(field, factor):
    network = roofline.from_table("mobilenet_v2")
    faster = replace(S24["w8a8"], **{field: getattr(S24["w8a8"], field) * factor})
    before, after = (roofline.predict(network, PRECISIONS["w8a8"], rates).seconds for rates in (S24["w8a8"], faster))
    assert before / factor <= after < before


def test_what_bounds_a_layer():
    conv = Layer("conv", "Conv", "matrix", 64 * 256 * 256 * 900, 256 * 256, 1, 1, 64 * 900, 256, 256)
    linear = Layer("linear", "Gemm", "matrix", 4096 * 4096, 4096 * 4096, 4096, 4096, 1, 4096, 4096)
    tiny = Layer("tiny", "Add", "vector", inputs=16, outputs=8)
    found = roofline.predict([conv, linear, tiny], PRECISIONS["w8a8"], S24["w8a8"])
    assert [one.bound for one in found.layers] == ["compute", "memory", "overhead"]
    ridge = roofline.ridge(S24["w8a8"])
    assert ridge == pytest.approx(2 * S24["w8a8"].matrix / 60e9)
    assert roofline.intensity(linear, PRECISIONS["w8a8"]) < 2.1 < ridge < roofline.intensity(conv, PRECISIONS["w8a8"])


def test_the_articles_formula():
    """Once more from the table itself: convolutions and linear layers, int8, 36 TOPS, 50 GB/s, each the larger."""
    off, table = [], rows_of_table()
    with (DATA / "latency.csv").open(newline="") as file:
        latencies = list(csv.DictReader(file))
    for row in latencies:
        seconds = 0.0
        for one in table[row["model"]]:
            if one["op"] in ("conv2d", "conv3d", "linear"):
                elements = sum(int(one[key]) for key in ("weight_elems", "input_elems", "output_elems"))
                seconds += max(2 * int(one["macs"]) / 36e12, elements / 50e9)
        assert roofline.article_seconds(roofline.from_table(row["model"])) == pytest.approx(seconds, rel=1e-12)
        if row["precision"] == "w8a8":
            off.append(abs(1e3 * seconds / float(row["inference_time_ms"]) - 1))
    assert 100 * np.median(off) == pytest.approx(FIT["values"]["article_median"])


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_the_recorded_fit_is_what_the_recipe_gives_and_what_the_model_predicts():
    fit, recorded = recipe(), FIT["parameters"]
    rows = fit.read()
    assert fit.fit(rows, 1) == pytest.approx([entry["value"] for entry in recorded.values()], rel=2e-3)
    modelled = fit.modelled(np.array([entry["value"] for entry in recorded.values()]), rows)
    for name, precision, seconds in zip(rows.names, rows.precisions, modelled):
        network = roofline.from_table(name)
        assert roofline.predict(network, PRECISIONS[precision], S24[precision]).seconds == pytest.approx(
            seconds, rel=1e-9
        )


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "wideresnet50"])
def test_a_network_is_predicted_without_its_own_latencies(name):
    """Out-of-fold predictions are recorded as made, and do not move when what is left out becomes ten times slower."""
    fit = recipe()
    rows = fit.read()
    rows.seconds[rows.names == name] *= 10
    own = rows.names == name
    predicted = 1e3 * fit.modelled(fit.fit(rows[~own], 1), rows[own])
    assert predicted == pytest.approx([e["ms"] for e in FIT["out_of_fold"] if e["network"] == name], rel=2e-3)


def test_no_predictor_sees_the_network_that_it_predicts():
    fit, seen = recipe(), []
    rows = fit.read()

    def predictor(others, itself):
        assert not set(others.names) & set(itself.names) and len(others.names) + len(itself.names) == 39
        assert len(set(itself.names)) == 1  # in all its precisions
        seen.extend(itself.names)
        return itself.seconds

    assert (fit.out_of_fold(rows, predictor) == rows.seconds).all() and len(seen) == 39


def test_the_recorded_errors_are_small_complete_and_add_up():
    table = FIT["out_of_fold"]
    with (DATA / "latency.csv").open(newline="") as file:
        published = {(row["model"], row["precision"]): float(row["inference_time_ms"]) for row in csv.DictReader(file)}
    assert {(e["network"], e["precision"]): e["published_ms"] for e in table} == pytest.approx(published)
    off = np.array([100 * abs(e["ms"] / e["published_ms"] - 1) for e in table])
    values = FIT["values"]
    assert values["fit_median"] == pytest.approx(np.median(off)) and np.median(off) <= 8
    assert values["fit_p90"] == pytest.approx(np.quantile(off, 0.9)) and np.quantile(off, 0.9) <= 35
    assert values["fit_outliers"] == (off > 35).sum()
    assert len(FIT["parameters"]) <= 10
    compared = {name: entry["median"] for name, entry in FIT["compared"].items()}
    assert min(compared, key=compared.get) == "this model"
    assert FIT["three_left_out"]["median"] <= 8 and FIT["three_left_out"]["p90"] <= 35


def test_parameters_are_what_hardware_can_be():
    values = {name: entry["value"] for name, entry in FIT["parameters"].items()}
    assert values["matrix_fp16"] == pytest.approx(12.03 / 2, rel=0.1)  # Hao et al.: 12.03 TFLOPS
    assert 12 < 2 * values["matrix_int8"] < 73  # between the least and the largest published TOPS
    assert 1 < values["overlap"] < 10 and 0.5 < values["node"] < 5
    assert all(entry["least"] <= entry["value"] * 1.001 for entry in FIT["parameters"].values())


def test_other_phones_by_ratios_alone():
    found = FIT["other_phones"]
    off = [abs(e["ms"] / e["published_ms"] - 1) for e in found if e["soc"] != "sm8650"]
    assert len(off) == 12 and np.median(off) < 0.13 and max(off) < 0.25
    for entry in found[::4]:
        rates = soc.rates(entry["soc"], entry["precision"])
        seconds = roofline.predict(roofline.from_table(entry["network"]), PRECISIONS[entry["precision"]], rates).seconds
        assert 1e3 * seconds == pytest.approx(entry["ms"])


# -- this computer and the command -------------------------------------------------------------------------------------


def test_this_computer_is_measured_and_runs_about_as_predicted():
    """Other work may slow any of it down, so only the order of magnitude is asked for here; see 07_fit.json."""
    rates = roofline.measure_cpu()
    assert 1e9 < rates.matrix < 1e13 and 1e9 < rates.bandwidth < 1e12 and 1e-8 < rates.node < 1e-4
    off = []
    for size in (1, 3):
        pads = ", ".join([str(size // 2)] * 4)
        body = f"{weight(64, 64, size, size)} y = Conv <pads = [{pads}]> (x, w)"
        model = parsed(body, "1,64,56,56")
        predicted = roofline.predict(roofline.from_onnx(model), PRECISIONS["float32"], rates).seconds
        off.append(abs(math.log(predicted / roofline.run_seconds(model, runs=20))))
    assert min(off) < math.log(3)


def test_the_recorded_comparison_with_onnx_runtime():
    measured = FIT["this_computer"]
    off = [abs(one["ms"] / one["measured_ms"] - 1) for one in measured["networks"]]
    assert len(off) >= 10 and 100 * np.median(off) == pytest.approx(measured["median"]) and np.median(off) <= 0.25


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("roofline") / "net.onnx"
    onnx.save(shapes.mobilenet_v2(), path)
    return path


def test_the_command_tells_and_writes(model_file, capsys):
    args = ["roofline", str(model_file), "--input_dim", "x", "1,3,224,224", "--precision", "w8a16"]
    assert cli.main([*args, "--output", str(model_file.with_suffix(".out"))]) == 0
    said = capsys.readouterr().out
    expected = roofline.predict(roofline.from_table("mobilenet_v2"), PRECISIONS["w8a16"], S24["w8a16"]).seconds
    assert "64 layers, 300.8 MMAC" in said and said.count("saves ") == 3 and "w8a8 instead of w8a16" in said
    told = float(said.partition("predicted ")[2].split()[0])
    assert told == pytest.approx(1e3 * expected, rel=5e-3)
    with model_file.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(float(row["ms"]) for row in rows) == pytest.approx(told - 1e3 * S24["w8a16"].fixed, rel=5e-3)
    assert model_file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_the_savings_say_is_what_the_changed_network_takes():
    from qtools.npu._roofline_command import savings

    network = roofline.from_table("efficientnet_b0")
    now = roofline.predict(network, PRECISIONS["w8a16"], S24["w8a16"]).seconds
    said = savings(network, "w8a16", "sm8650")
    gains = dict(said)
    assert [gain for _, gain in said] == sorted(gains.values(), reverse=True) and min(gains.values()) > 0
    other = roofline.predict(network, PRECISIONS["w8a8"], S24["w8a8"]).seconds
    assert gains["w8a8 instead of w8a16"] == pytest.approx(now - other)
    rest = [layer for layer in network.layers if layer.op != "mul"]
    assert gains["no mul (16 of them)"] == pytest.approx(
        now - roofline.predict(rest, PRECISIONS["w8a16"], S24["w8a16"]).seconds
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the input 'x' has no fixed size: give it with --input_dim x 1,3,224,224"),
        (["--soc", "sm1"], "unknown SoC 'sm1': choose from sm8650"),
        (["--soc", "sm8350"], "too little is published on Snapdragon 888"),
        (["-d", "y", "1,3,224,224"], "the network has no input 'y'"),
        (["-d", "x", "1,3,a"], "expected whole numbers with commas"),
    ],
)
def test_the_command_refuses_in_one_sentence(model_file, capsys, args, message):
    assert cli.main(["roofline", str(model_file), *args]) == 1
    said = capsys.readouterr().err
    assert said.startswith("qtools roofline: ") and message in said and said.count("\n") == 1


def test_the_command_refuses_files_that_are_no_networks(tmp_path, capsys):
    (tmp_path / "bad.onnx").write_text("hello")
    assert cli.main(["roofline", str(tmp_path / "bad.onnx")]) == 1
    assert cli.main(["roofline", str(tmp_path / "none.onnx")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "is not an ONNX network" in said[0] and "no such network" in said[1]
