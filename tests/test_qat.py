"""Quantization-aware training: its gradients are torch's, and what is trained is what is exported."""

import copy
import gzip
import itertools
import json
import math
import operator
import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from qtools import encodings, qat, zoo
from qtools.affine import Grid, QParams
from qtools.metrics import sqnr_db
from qtools.npu import htp
from qtools.ptq import fuse, graph, write
from qtools.ptq.convert import Options, Runner, prepared, quantize_network
from qtools.qat import QuantizationSimModel, QuantSim

ROOT = Path(__file__).resolve().parents[1]
needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")
SOME = settings(max_examples=40, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def digits() -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in zoo.digits()]


def calibration(seed: int = 0) -> list[torch.Tensor]:
    chosen = np.random.default_rng(1000 + seed).choice(1257, 256, replace=False)
    return [digits()[0][chosen[start : start + 64]] for start in range(0, 256, 64)]


def sim_of(weight_bits: int = 8, act_bits: int = 8, **more) -> QuantSim:
    """The digits network, calibrated."""
    sim = QuantSim(zoo.digits_module(), digits()[0][:1], weight_bits=weight_bits, act_bits=act_bits, **more)
    sim.calibrate(calibration())
    return sim


def train(sim: QuantSim, epochs: int = 5, lr: float = 0.02, steps: int | None = None) -> None:
    """SGD with momentum and a cosine, batches of 64."""
    images, labels = digits()[:2]
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(sim.model.parameters(), lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 20)
    batches = (part for _ in range(epochs) for part in torch.randperm(1257, generator=generator).split(64))
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        functional.cross_entropy(sim.model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()


def logits(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).numpy()


def codes_apart(sim: QuantSim, inputs: tuple[torch.Tensor, ...]) -> np.ndarray:
    """How many codes lie between the simulation's outputs and those of the exported network in ONNX Runtime."""
    converted = sim.export()
    names = [entry.name for entry in converted.network.graph.output]
    given_ = dict(zip([entry.name for entry in converted.network.graph.input], (x.numpy() for x in inputs)))
    with torch.no_grad():
        ours = sim.model.eval()(*inputs)
    ours = ours if isinstance(ours, tuple) else (ours,)
    theirs = Runner(converted.network, names)(given_)
    assert len(ours) == len(theirs)
    steps = [float(converted.encodings.activations[name].scale) for name in names]
    apart = [np.abs(a.numpy() - b) / step for a, b, step in zip(ours, theirs, steps)]
    return np.concatenate([part.ravel() for part in apart])


# -- gradients -------------------------------------------------------------------------------------------------------


def ours(x, scale, low, high, gain, upstream):
    """Result of `FakeQuantize` and its gradients."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = qat.FakeQuantize.apply(x, scale, low, high, gain)
    y.backward(upstream)
    return y.detach(), x.grad, scale.grad


@SOME
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8, 16]), st.integers(0, 3), st.integers(-6, 1))
def test_what_passes_straight_through_is_what_torch_lets_through(seed, bits, zero, power) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, 50, generator=generator)
    scale, qmax = torch.tensor(2.0**power), 2**bits - 1  # torch multiplies by 1 / scale: equal at powers of two
    theirs = x.clone().requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(theirs, scale.item(), zero, 0, qmax)
    y.backward(upstream)
    got, grad, _ = ours(x, scale, torch.tensor(-float(zero)), torch.tensor(float(qmax - zero)), 1.0, upstream)
    assert torch.equal(got, y) and torch.equal(grad, theirs.grad)


@SOME
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]))
def test_per_channel_too(seed, bits) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, 5, 3, 2, 2, generator=generator)
    scale = 2.0 ** torch.randint(-4, 1, (5,), generator=generator)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    theirs = x.clone().requires_grad_()
    y = torch.fake_quantize_per_channel_affine(theirs, scale, torch.zeros(5, dtype=torch.int32), 0, low, high)
    y.backward(upstream)
    got, grad, _ = ours(x, scale[:, None, None, None], low, high, 1.0, upstream)
    assert torch.equal(got, y) and torch.equal(grad, theirs.grad)


@SOME
@given(st.integers(0, 10**6), st.sampled_from([2, 4, 8]), st.integers(0, 3), st.floats(0.001, 2))
def test_the_step_learns_what_torch_lets_it_learn(seed, bits, zero, gain) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(2, 50, generator=generator)
    scale = torch.tensor([2.0**-3], requires_grad=True)
    theirs, qmax = x.clone().requires_grad_(), 2**bits - 1
    y = torch._fake_quantize_learnable_per_tensor_affine(theirs, scale, torch.tensor([float(zero)]), 0, qmax, gain)
    y.backward(upstream)
    got, grad, grad_scale = ours(x, scale.detach(), -zero, qmax - zero, gain, upstream)
    assert torch.equal(got, y) and torch.equal(grad, theirs.grad)
    torch.testing.assert_close(grad_scale, scale.grad, rtol=1e-4, atol=1e-5)


def lsq(x: float, step: float, lowest: int, highest: int) -> float:
    """How a quantized number changes with the step: equation 3 of the paper, for one number.

    As in torch, and unlike there, what still rounds to the last code is not yet clipped.
    """
    code = round(x / step)
    return lowest if code < lowest else highest if code > highest else code - x / step


@pytest.mark.parametrize("channels", [1, 4])
def test_the_step_of_a_weight_is_learned_as_the_paper_says(channels) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    grid = Grid(3, True, True, block_size=(1 if channels > 1 else -1, -1, -1, -1))
    quantizer = qat.Quantizer("w", grid, "min_max", True, tuple(weight.shape))
    steps = torch.linspace(0.2, 0.6, channels).reshape(channels, 1, 1, 1)
    quantizer.take(QParams(grid, steps.numpy(), np.zeros(steps.shape, np.int32)))
    quantizer(weight).sum().backward()
    rows = weight.reshape(channels, -1).double()
    gain = 1 / math.sqrt(rows.shape[1] * 3)  # 1 / sqrt(N Q_P), N weights that share a step
    expected = [sum(lsq(x, s, -4, 3) for x in row) * gain for row, s in zip(rows.tolist(), steps.flatten().tolist())]
    np.testing.assert_allclose(quantizer.scale.grad.flatten(), expected, rtol=1e-4)


def test_the_step_of_an_activation_is_learned_by_the_features_of_one_sample() -> None:
    grid = Grid(4)
    quantizer = qat.Quantizer("x", grid, "min_max", True)
    quantizer.take(QParams(grid, np.float32(0.1), np.int32(0)))
    x = torch.rand(5, 7, 2, generator=torch.Generator().manual_seed(2)) * 2
    quantizer(x).sum().backward()
    expected = sum(lsq(value, np.float32(0.1).item(), 0, 15) for value in x.double().flatten().tolist())
    assert quantizer.scale.grad.item() == pytest.approx(expected / math.sqrt(14 * 15), rel=1e-4)


def test_the_gradients_are_those_that_aimet_was_recorded_with() -> None:
    recorded = gzip.decompress((ROOT / "tests/data/aimet_oracle.json.gz").read_bytes())
    x, upstream = (
        torch.from_numpy(np.random.default_rng(seed).normal(0, sd, 32).astype(np.float32))
        for seed, sd in ((20, 1.5), (21, 1.0))
    )
    symmetric = 0
    for probe in json.loads(recorded)["gradient_probe"]:
        steps = 2 ** probe["bitwidth"] - 1
        scale = torch.tensor((probe["set_max"] - probe["set_min"]) / steps)
        low = round(probe["set_min"] / scale.item())
        got, grad, grad_scale = ours(x, scale, low, low + steps, 1.0, upstream)
        np.testing.assert_allclose(got, probe["y"], rtol=1e-6)
        np.testing.assert_allclose(grad, probe["grad_x"], rtol=1e-6)
        if probe["mode"] == "symmetric":  # both ends move with the step, as here
            assert grad_scale.item() / steps == pytest.approx(probe["grad_max"], rel=1e-5)
            symmetric += 1
    assert symmetric == 1


# -- where it rounds -------------------------------------------------------------------------------------------------

ACTIVATIONS = ["input", "act", *(f"b{i}.act{j}" for i in (1, 2, 3) for j in (1, 2)), "pool", "fc"]
CONVOLUTIONS = ["stem", *(f"b{i}.{kind}" for i in (1, 2, 3) for kind in ("dw", "pw"))]
WEIGHTS = [f"{name}.weight" for name in (*CONVOLUTIONS, "fc")]


def configured(folder: Path, **changes) -> Path:
    """The shipped configuration with some of its entries replaced, as a file."""
    config = json.loads(qat.CONFIG.read_text())
    for place, value in changes.items():
        *steps, last = place.split("__")
        node = config
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = value
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def rounded(folder: Path, **changes) -> QuantSim:
    return QuantSim(zoo.digits_module(), digits()[0][:1], configured(folder, **changes))


def test_a_convolution_and_its_activation_are_rounded_once() -> None:
    sim = QuantSim(zoo.digits_module(), digits()[0][:1])
    assert list(sim.quantizers) == [*ACTIVATIONS, *WEIGHTS]


def test_the_shipped_supergroups_are_the_converters() -> None:
    listed = json.loads(qat.CONFIG.read_text())["supergroups"]
    assert [tuple(group["op_list"]) for group in listed] == list(write.SUPERGROUPS)


def test_without_supergroups_the_convolutions_are_rounded_too(tmp_path: Path) -> None:
    sim = rounded(tmp_path, supergroups=[])
    assert set(sim.quantizers) == {*ACTIVATIONS, *CONVOLUTIONS, *WEIGHTS}
    sim.calibrate(calibration())
    assert (codes_apart(sim, (digits()[2],)) > 0.5).mean() < 0.01


def test_a_batch_norm_within_a_supergroup_is_folded(tmp_path: Path) -> None:
    sim = rounded(tmp_path, supergroups=[{"op_list": ["Conv", "BatchNormalization", "Clip"]}])
    assert list(sim.quantizers) == [*ACTIVATIONS, *WEIGHTS]


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({"model_input__is_input_quantized": "False"}, {"input"}),
        ({"defaults__ops__is_output_quantized": "False"}, set(ACTIVATIONS) - {"input"}),
        ({"op_type__Gemm__is_output_quantized": "False"}, {"fc"}),
        ({"op_type__Clip": {"is_output_quantized": "False"}}, {name for name in ACTIVATIONS if "act" in name}),
        ({"defaults__params__is_quantized": "False"}, set(WEIGHTS)),
        ({"params__weight__is_quantized": "False"}, set(WEIGHTS)),
        ({"op_type__Gemm__params__weight__is_quantized": "False"}, {"fc.weight"}),
    ],
)
def test_what_the_configuration_leaves_out_stays_float(tmp_path: Path, changes, gone) -> None:
    sim = rounded(tmp_path, **changes)
    assert {*ACTIVATIONS, *WEIGHTS} - set(sim.quantizers) == gone
    sim.calibrate(calibration())
    converted = sim.export()
    floats = {
        name for side in ("activation", "param") for name, e in converted.encodings.of(side).items() if e.scale is None
    }
    assert floats - {"flatten"} == gone and converted.encodings.activations.get("flatten").bits in (8, 32)
    again = quantize_network(converted.float_network, [digits()[2][:4].numpy()], overrides=converted.encodings)
    (one,), (two,) = (Runner(made, ["fc"])(digits()[2].numpy()) for made in (converted.network, again.network))
    np.testing.assert_array_equal(one, two)
    assert sqnr_db(logits(sim.model, digits()[2]), one) > 40


def test_who_shares_a_scale(tmp_path: Path) -> None:
    per_channel = QuantSim(zoo.digits_module(), digits()[0][:1]).quantizers
    per_tensor = QuantSim(zoo.digits_module(), digits()[0][:1], per_channel=False).quantizers
    mixed = rounded(tmp_path, op_type__Gemm__per_channel_quantization="False").quantizers
    assert per_channel["b1.dw.weight"].scale.shape == (32, 1, 1, 1) and per_channel["fc.weight"].scale.shape == (10, 1)
    assert all(per_tensor[name].scale.numel() == 1 for name in WEIGHTS)
    assert mixed["fc.weight"].scale.numel() == 1 and mixed["stem.weight"].scale.numel() == 32


def test_strictly_symmetric_weights_leave_their_lowest_code_unused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, lowest = nn.Sequential(nn.Linear(40, 8)), torch.randn(4, 40), {}
    for strict in ("False", "True"):
        path = configured(tmp_path, defaults__strict_symmetric=strict)
        sim = QuantSim(model, x, path, weight_bits=2, weight_scheme="mse")
        sim.calibrate([x])
        lowest[strict] = codes(sim.export().network, "0.weight").min()
    assert lowest == {"False": -2, "True": -1}


@pytest.mark.parametrize("act_bits", [4, 8])
def test_symmetric_activations_have_zero_in_the_middle(tmp_path: Path, act_bits) -> None:
    path = configured(tmp_path, defaults__ops__is_symmetric="True", op_type__Clip__is_symmetric="False")
    sim = sim_of(8, act_bits, config=path)
    zero = {name: int(e.zero_point) for name, e in sim.export().encodings.activations.items()}
    assert zero["input"] == zero["fc"] == 2 ** (act_bits - 1) and zero["act"] == 0
    assert (codes_apart(sim, (digits()[2],)) > 0.5).mean() < 0.01


@pytest.mark.parametrize("weight_bits", [2, 8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_may_be_asymmetric(tmp_path: Path, weight_bits, per_channel) -> None:
    path = configured(tmp_path, defaults__params__is_symmetric="False")
    sim = sim_of(weight_bits, 4, config=path, per_channel=per_channel)
    found = sim.export().encodings.params["b1.dw.weight"]
    assert not found.symmetric and not found.signed and found.scale.shape == ((32,) if per_channel else ())
    assert (codes_apart(sim, (digits()[2][:200],)) > 0.5).mean() < 0.01


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"defaults__ops__is_quantized": "True"}, "it has /defaults/ops/is_quantized=True"),
        ({"model_input__is_input_quantized": "yes"}, "it has /model_input/is_input_quantized=yes"),
        ({"params__bias__is_quantized": "True"}, "it has /params/bias/is_quantized=True"),
        ({"defaults__unsigned_symmetric": "True"}, "it has /defaults/unsigned_symmetric=True"),
        ({"superb_groups": []}, r"it has /superb_groups=\[\]"),
    ],
)
def test_a_configuration_with_other_keys_or_values_is_refused(tmp_path: Path, changes, said) -> None:
    with pytest.raises(ValueError, match=rf"^\S+config\.json is not a configuration: {said}$"):
        rounded(tmp_path, **changes)


def test_a_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ValueError, match=r"^\S+c\.json is not a configuration: [^\n]+$"):
        QuantSim(zoo.digits_module(), digits()[0][:1], tmp_path / "c.json")


def test_keys_of_aimet_that_change_nothing_here_are_read(tmp_path: Path) -> None:
    limits = {"min": 0.0, "max": 1.0}
    changes = {"op_type__Sigmoid__encoding_constraints": limits, "supergroup_pass_list": ["MatmulAdd"]}
    sim = rounded(tmp_path, defaults__hw_version="V75", **changes)
    assert list(sim.quantizers) == [*ACTIVATIONS, *WEIGHTS]


# -- what is exported ------------------------------------------------------------------------------------------------


def codes(network: onnx.ModelProto, name: str) -> np.ndarray:
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    return values[f"{name}.codes"].astype(int)


@pytest.fixture(scope="module", params=[(8, 8), (8, 16), (4, 8), (4, 4), (3, 4), (2, 4)], ids="W{0[0]}A{0[1]}".format)
def trained(request) -> QuantSim:
    """After a few steps with a rate high enough to move everything."""
    weight_bits, act_bits = request.param
    sim = sim_of(weight_bits, act_bits, weight_scheme="sqnr", act_scheme="percentile")
    train(sim, lr=0.05, steps=6)
    return sim


def test_the_exported_network_computes_what_was_trained(trained: QuantSim) -> None:
    apart = codes_apart(trained, (digits()[2],))
    sixteen = trained.quantizers["fc"].grid.bits == 16
    apart = np.maximum(apart, codes_apart(trained, (digits()[2] * 3,)))  # beyond what it was calibrated with, too
    # Sums in another order differ in their last bits: a few numbers at a tie go the other way, by a code.
    assert (apart > 0.5).mean() < (0.15 if sixteen else 0.01)
    assert apart.max() < (3.5 if sixteen else 1.5)


def test_converting_once_more_moves_nothing(trained: QuantSim, tmp_path: Path) -> None:
    converted = trained.export(tmp_path, "digits")
    network = prepared(tmp_path / "digits.onnx")
    used = {name for node in converted.float_network.graph.node for name in node.input}
    assert {tensor.name for tensor in converted.float_network.graph.initializer} <= used
    found = encodings.read(tmp_path / "digits.encodings")
    again = quantize_network(network, [digits()[2][:2].numpy()], Options(), found)
    assert again.notes == [] and encodings.compare(converted.encodings, again.encodings) == []
    assert {*again.encodings.activations} == {*converted.encodings.activations}
    assert {*again.encodings.params} == {*converted.encodings.params}
    (one,), (two,) = (Runner(made, ["fc"])(digits()[2].numpy()) for made in (converted.network, again.network))
    np.testing.assert_array_equal(one, two)


def test_codes_stay_within_their_bits_in_wider_containers(trained: QuantSim) -> None:
    network = trained.export().network
    for name in WEIGHTS:
        bits = trained.quantizers[name].grid.bits
        assert codes(network, name).min() >= -(2 ** (bits - 1)) and codes(network, name).max() < 2 ** (bits - 1)
    names = [f"{name}.codes" for name in ACTIVATIONS[1:]]
    network.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    found = Runner(network, names)(digits()[2].numpy())
    most = 2 ** trained.quantizers["act"].grid.bits - 1
    assert all(part.max() <= most for part in found)
    assert sum(part.max() == most for part in found) >= 3, "the range is that of a percentile: something is beyond it"


def codes_apart_on_htp(sim: QuantSim, x: torch.Tensor) -> np.ndarray:
    converted = sim.export()
    network = converted.network
    for entry in (*network.graph.input, *network.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 1
    del network.graph.value_info[:]
    session = htp.session(onnx.shape_inference.infer_shapes(network, data_prop=True))
    found = np.concatenate([session.run(None, {"input": one.numpy()[None]})[0] for one in x])
    return np.abs(found - logits(sim.model, x)) / converted.encodings.activations[network.graph.output[0].name].scale


@needs_backend
def test_the_htp_takes_a_range_that_is_wider_than_its_activation_function() -> None:
    sim, x = wider(8)
    apart = codes_apart_on_htp(sim, x[:8])
    assert apart.max() < 2.5 and (apart > 0.5).mean() < 0.15


@needs_backend
@pytest.mark.parametrize("weight_bits", [2, 8])
def test_the_htp_takes_4_bit_activations_and_computes_the_same(weight_bits) -> None:
    torch.manual_seed(1)
    blocks = nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x = torch.randn(64, 3, 8, 8)
    sim = QuantSim(model, x[:1], weight_bits=weight_bits, act_bits=4, act_scheme="percentile")
    sim.calibrate([x])
    apart = codes_apart_on_htp(sim, x[:24])
    # It rounds what it multiplies accumulators with: some numbers near a tie go the other way, by one of 16 codes.
    assert apart.max() < 1.5 and (apart > 0.5).mean() < 0.4


def test_before_training_the_ranges_are_those_of_the_converter() -> None:
    samples = [part.numpy() for part in calibration()]
    network = fuse.fuse(graph.prepare(zoo.digits_cnn()))
    options = Options(use_per_channel_quantization=True, use_per_row_quantization=True)
    for scheme in ("min-max", "sqnr"):
        chosen = {"act_quantizer_calibration": scheme, "param_quantizer_calibration": scheme}
        theirs = quantize_network(network, samples, Options(**vars(options) | chosen)).encodings
        own = sim_of(weight_scheme=scheme, act_scheme=scheme).export().encodings
        for kind in ("activation", "param"):
            for a, b in zip(own.of(kind).values(), theirs.of(kind).values(), strict=True):
                np.testing.assert_allclose(a.scale, b.scale, rtol=1e-4)
                np.testing.assert_array_equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_channel_that_is_rounded_away_keeps_its_bias(per_channel) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = 1e-12
        model[0].bias.copy_(torch.tensor([0.1, 0.7, -0.2]))
    x = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sim = QuantSim(model, x[:1], weight_bits=2, per_channel=per_channel)
    sim.calibrate([x])
    assert (codes_apart(sim, (x,)) > 0.5).mean() == 0
    assert sim.model(x)[:, 1].mean().item() == pytest.approx(0.7, abs=0.01)
    converted = sim.export()
    again = quantize_network(converted.float_network, [x.numpy()], overrides=converted.encodings)
    assert encodings.compare(converted.encodings, again.encodings) == []


class Branches(nn.Module):
    """Functions and modules, sums and concatenations, one module for all activations, in place where torch can."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm, self.relu, self.dropout = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.up = nn.ConvTranspose2d(16, 6, 2, 2, groups=2)
        self.dense, self.norm1, self.scale = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LayerNorm(5)

    def forward(self, x, y):
        a = self.relu(self.norm(self.first(x)))
        b = self.relu(self.second(a))
        b += a
        c = functional.hardswish(torch.cat([b, a], 1))
        c = functional.relu6(self.up(functional.max_pool2d(c, 2)), inplace=True)
        d = self.dropout(c.mean((2, 3)))
        e = self.scale(self.norm1(self.dense(d)))
        return torch.softmax(e, -1), e * y + 0.25


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 4)])
def test_branches_functions_and_reused_modules(weight_bits, act_bits) -> None:
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(3)
    model = Branches()
    for norm in (model.norm, model.norm1):
        norm.running_mean.normal_(0, 0.2), norm.running_var.uniform_(0.5, 1.5), norm.weight.data.uniform_(-1, 1.5)
    x, y = torch.randn(40, 2, 8, 8, generator=generator), torch.randn(40, 5, generator=generator)
    before = copy.deepcopy(model.state_dict())
    sim = QuantSim(model, (x[:2], y[:2]), weight_bits=weight_bits, act_bits=act_bits)
    sim.calibrate([(x, y)])
    assert sim.quantizers["scale.weight"].grid.bits == 8 and sim.quantizers["dense.weight"].grid.bits == weight_bits
    assert sim.model.training and model.training, "as it came"
    optimizer = torch.optim.SGD(sim.model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        probabilities, other = sim.model(x, y)
        (probabilities.square().mean() + (other - 1).square().mean()).backward()
        assert all(parameter.grad is not None for parameter in sim.model.parameters())
        optimizer.step()
    apart = codes_apart(sim, (x, y))
    assert (apart > 0.5).mean() < 0.02
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items()), (
        "the model given is not touched"
    )
    real = model.eval()(x, y)[1].detach().numpy()
    assert sqnr_db(real, sim.model(x, y)[1].detach().numpy()) > (15 if act_bits == 8 else 1)


class Of(nn.Module):
    """A model of one function and some modules."""

    def __init__(self, function, **modules) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def gated(halves):
    return halves[0] * torch.sigmoid(halves[1])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.AvgPool2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Sigmoid(), nn.Flatten(), nn.Linear(256, 3), nn.Softmax(-1))),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.Hardsigmoid(), nn.Upsample(scale_factor=2), nn.Dropout()),
        nn.Sequential(
            Of(lambda self, x: self.b(self.a(x).relu().view(x.size(0), -1)), a=nn.Conv2d(4, 2, 1), b=nn.Linear(128, 3))
        ),
        nn.Sequential(Of(lambda self, x: gated(self.a(x).chunk(2, 1)), a=nn.Conv2d(4, 4, 1))),
    ],
)
def test_small_networks(model) -> None:
    torch.manual_seed(5)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2), module.weight.data.uniform_(-1, 1)
    x = torch.randn(20, 4, 8, 8)
    for act_bits in (8, 4):
        sim = QuantSim(model, x[:1], act_bits=act_bits)
        sim.calibrate([x])
        assert (codes_apart(sim, (x,)) > 0.5).mean() < 0.005
        assert sqnr_db(logits(model.eval(), x), logits(sim.model, x)) > (30 if act_bits == 8 else 8)


def wider(act_bits: int) -> tuple[QuantSim, torch.Tensor]:
    """A ReLU6 whose last code stands for 7.8, as it may after training."""
    torch.manual_seed(7)
    x = torch.randn(60, 3, 8, 8) * 4
    sim = QuantSim(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6()), x[:1], act_bits=act_bits)
    sim.calibrate([x])
    with torch.no_grad():
        sim.quantizers["_1"].scale.mul_(1.3)
    return sim, x


@pytest.mark.parametrize("act_bits", [4, 8])
def test_a_range_may_be_wider_than_its_activation_function(act_bits) -> None:
    sim, x = wider(act_bits)
    apart = codes_apart(sim, (x,))
    assert apart.max() < 1.5 and (apart > 0.5).mean() < 0.001
    assert logits(sim.model, x).max() == pytest.approx(6, abs=0.4)


# -- training --------------------------------------------------------------------------------------------------------


def test_training_brings_back_what_2_bits_destroyed() -> None:
    images, labels = digits()[2:]
    real = logits(zoo.digits_module(), images)
    sim = sim_of(2, 4, weight_scheme="sqnr", act_scheme="sqnr")
    before = logits(sim.model, images)
    train(sim)
    after = logits(sim.model.eval(), images)
    right = [(found.argmax(1) == labels.numpy()).mean() for found in (before, after)]
    assert right[0] < 0.5 and right[1] > 0.9
    assert sqnr_db(real, before) < 1 and sqnr_db(real, after) > 3.7


@pytest.mark.parametrize("how", ["frozen", "not learned"])
def test_frozen_scales_stay_while_weights_move(how) -> None:
    sim = sim_of(4, 4, learned=how == "frozen")
    if how == "frozen":
        train(sim, steps=1)
        assert sim.freeze() is sim
    before = {key: value.clone() for key, value in sim.model.state_dict().items()}
    train(sim, steps=2)
    moved = {key for key, value in sim.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if key.endswith(".original")}


def test_learned_scales_move() -> None:
    sim = sim_of(4, 4)
    before = {name: one.scale.clone() for name, one in sim.quantizers.items()}
    train(sim, steps=2)
    assert all(not torch.equal(one.scale, before[name]) for name, one in sim.quantizers.items())


def test_a_scale_that_training_turned_negative_is_its_magnitude() -> None:
    sim = sim_of(4, 4)
    expected = logits(sim.model, digits()[2][:50])
    with torch.no_grad():
        for one in sim.quantizers.values():
            one.scale.neg_()
    np.testing.assert_array_equal(logits(sim.model, digits()[2][:50]), expected)
    assert codes_apart(sim, (digits()[2][:50],)).max() < 1.5


def test_calibration_sees_the_float_network_and_may_be_repeated() -> None:
    sim = sim_of(2, 4)
    first = {name: one.qparams().scale for name, one in sim.quantizers.items()}
    seen = []
    sim.model.train()
    sim.compute_encodings(
        lambda model, args: seen.append((model.training, args, logits(model, calibration()[0]))), "args"
    )
    assert seen[0][:2] == (False, "args")
    np.testing.assert_allclose(seen[0][2], logits(zoo.digits_module(), calibration()[0]), atol=1e-4)
    sim.calibrate(calibration())
    assert all(np.array_equal(one.qparams().scale, first[name]) for name, one in sim.quantizers.items())


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    sim = sim_of(4, 4)
    train(sim, steps=2)
    sim.save(tmp_path / "sim.safetensors")
    other = QuantSim(zoo.digits_module(), digits()[0][:1], weight_bits=4, act_bits=4)
    assert other.load(tmp_path / "sim.safetensors") is other
    images = digits()[2]
    np.testing.assert_array_equal(logits(other.model.eval(), images), logits(sim.model.eval(), images))
    assert other.export().network == sim.export().network


def test_what_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    sim = sim_of(4, 4)
    sim.save(tmp_path / "sim.safetensors")
    (tmp_path / "damaged").write_bytes((tmp_path / "sim.safetensors").read_bytes()[:-9])
    refused = r"^\S+ holds no such simulation: [^\n]+$"
    for name, weight_bits, per_channel in (
        ("sim.safetensors", 3, None),
        ("sim.safetensors", 4, False),
        ("damaged", 4, None),
        ("absent", 4, None),
    ):
        example = digits()[0][:1]
        other = QuantSim(zoo.digits_module(), example, weight_bits=weight_bits, act_bits=4, per_channel=per_channel)
        before = copy.deepcopy(other.model.state_dict())
        with pytest.raises(ValueError, match=refused):
            other.load(tmp_path / name)
        for key, value in other.model.state_dict().items():
            np.testing.assert_array_equal(value, before[key])


# -- the article's program -------------------------------------------------------------------------------------------


def test_the_printed_program_runs_with_its_import_changed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # there is no qnn_config.json here
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), *head).eval()
    x, y = torch.randn(8, 3, 224, 224), torch.arange(8) % 2
    names = {"torch": torch, "model": model, "criterion": nn.CrossEntropyLoss(), "train_loader": [(x, y)]}
    names["forward_callback"] = lambda model, _: model(x)
    printed = runpy.run_path(ROOT / "notebooks/article_fragments.py")["QAT"]
    program = printed.replace("from aimet_torch.quantsim import", "from qtools.qat import")
    exec(program, names)
    sim = names["sim"]
    assert {one.method for one in sim.quantizers.values()} == {"sqnr"}
    assert functional.cross_entropy(sim.model(x), y) < functional.cross_entropy(model(x), y)
    sim.export(path=tmp_path / "out", filename_prefix="net", dummy_input=torch.randn(1, 3, 224, 224))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["net.encodings", "net.onnx"]
    onnx.checker.check_model(tmp_path / "out/net.onnx", full_check=True)


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("post_training_tf", "min_max"), ("min_max", "min_max"), ("post_training_percentile", "percentile")],
)
def test_the_names_of_aimets_schemes(scheme, method) -> None:
    sim = QuantizationSimModel(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4), scheme, 16, 4)
    assert {one.method for one in sim.quantizers.values()} == {method}
    assert {name: one.grid.bits for name, one in sim.quantizers.items()} == {"input": 16, "_0": 16, "0.weight": 4}


def test_a_configuration_file_in_the_folder_is_the_one_that_is_meant(tmp_path: Path, monkeypatch) -> None:
    configured(tmp_path, model_input__is_input_quantized="False").rename(tmp_path / "qnn_config.json")
    monkeypatch.chdir(tmp_path)
    assert "input" not in QuantSim(zoo.digits_module(), digits()[0][:1], "qnn_config.json").quantizers


# -- what is refused -------------------------------------------------------------------------------------------------


def shortcut(self, x):
    x = self.a(x)
    return self.b(x) + x


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            Of(lambda self, x: self.a(x) if x.sum() > 0 else x, a=nn.Linear(4, 4)),
            "torch.fx cannot trace this model: symbolically traced variables cannot be used as inputs to control flow",
        ),
        (Of(lambda self, x: self.a(self.a(x)), a=nn.Linear(4, 4)), "the parameter 'a.weight' is used twice"),
        (Of(lambda self, x: self.a(x).relu_(), a=nn.Linear(4, 4)), "changes a tensor in place by 'relu_'"),
        (Of(lambda self, x: torch.relu_(self.a(x)), a=nn.Linear(4, 4)), "changes a tensor in place by 'relu_'"),
        (Of(shortcut, a=nn.Linear(4, 4), b=nn.ReLU(True)), "as torch.fx traces it, does not compute the same"),
        (
            Of(shortcut, a=nn.Linear(4, 4), b=lambda x: functional.relu(x, True)),
            "as torch.fx traces it, does not compute the same",
        ),
        (
            Of(shortcut, a=nn.Linear(4, 4), b=lambda x: operator.iadd(x, 1)),
            "as torch.fx traces it, does not compute the same",
        ),
        (Of(shortcut, a=nn.Linear(4, 4), b=nn.BatchNorm1d(4)), "the BatchNorm 'b'"),
        (Of(lambda self, x: self.b(self.a(x).relu()), a=nn.Linear(4, 4), b=nn.BatchNorm1d(4)), "the BatchNorm 'b'"),
        (Of(lambda self, x: self.a(x), a=nn.Sequential(nn.Linear(4, 4), nn.SiLU())), "several operators in ONNX"),
        (Of(lambda self, x: self.a(x[:, None]), a=nn.Linear(4, 4)), "'a.weight' does not come to ONNX as it is"),
        (Of(lambda self, x: self.a(x) * 2, a=nn.Linear(4, 4)), "'a.weight' does not come to ONNX as it is"),
        (
            Of(lambda self, x: self.a(x), a=nn.Linear(5, 4)),
            "the model does not run on the example: mat1 and mat2",
        ),
        (Of(lambda self, x: self.a(x).relu() * torch.arange(4.0), a=nn.Linear(4, 4)), "computes with the constant"),
        (
            Of(lambda self, x: torch.linalg.inv(self.a(x)), a=nn.Linear(4, 4)),
            "torch cannot write this model as an ONNX network of float32",
        ),
    ],
)
def test_models_that_cannot_be_simulated_are_refused_in_a_sentence(model, said) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        QuantSim(model, torch.randn(4, 4))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "arguments", [{"weight_bits": 5}, {"act_bits": 2}, {"act_scheme": "tf"}, {"weight_scheme": "absmax"}]
)
def test_arguments_that_do_not_fit_are_refused_in_a_sentence(arguments) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+got [^\n]+$"):
        QuantSim(nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 4), **arguments)


def test_nothing_is_computed_before_there_are_ranges(tmp_path: Path) -> None:
    sim, other = (QuantSim(zoo.digits_module(), digits()[0][:1]) for _ in range(2))
    sim.save(tmp_path / "without")
    other.load(tmp_path / "without")
    for call in (sim.export, other.export, lambda: sim.model(digits()[0][:1])):
        with pytest.raises(
            ValueError, match=r"^the quantizer of '\S+' has no range yet: call compute_encodings first$"
        ):
            call()


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda model, _: None, "no data reached 'input'"),
        (lambda model, _: model(torch.full((2, 1, 8, 8), math.nan)), "cannot observe NaN or infinity"),
        (lambda model, _: [model(torch.ones(2, 1, 8, 8)), 1 / 0], "division by zero"),
    ],
)
def test_a_calibration_that_fails_leaves_the_ranges_as_they_were(callback, said) -> None:
    sim = sim_of()
    before = logits(sim.model, digits()[2][:8])
    with pytest.raises((ValueError, ZeroDivisionError), match=said):
        sim.compute_encodings(callback)
    np.testing.assert_array_equal(logits(sim.model, digits()[2][:8]), before)
