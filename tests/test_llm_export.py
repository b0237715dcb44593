"""The Llama as ONNX against the one in torch; its codes against fake quantization, integers and the HTP backend."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor

from qtools.affine import Grid, QParams, choose_qparams, quantize
from qtools.encodings import Rule
from qtools.llm import export
from qtools.llm.checkpoint import EMBEDDING, HEAD, Config
from qtools.llm.evaluate import quantized
from qtools.llm.llama import Llama
from qtools.metrics import sqnr_db
from qtools.npu import htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import fuse
from qtools.ptq.convert import Runner
from qtools.ptq.verify import verify
from qtools.qdq import operator_model

needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")
TOKENS = 12


def llama(**more):
    """Weights drawn at random: small ones, norms about 1, an embedding of size 1."""
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    config, rng = Config(model_type="llama", **{**sizes, **heads, **more}), torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in config.shapes().items():
        drawn = torch.randn(shape, generator=rng)
        weights[name] = 1 + 0.2 * drawn if len(shape) == 1 else drawn if name == EMBEDDING else 0.15 * drawn
    return Llama(config, weights)


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def ids():
    """Two windows to look at, the others to calibrate with."""
    return torch.randint(96, (10, TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(model, ids):
    """The second block in several schemes."""
    schemes = {
        "w8a8": (export.W8A8,),
        "w8a8, softmax 16": (export.W8A8, export.SOFTMAX16),
        "w8a16": (export.W8A16,),
        "w8a16, cache 8": (export.W8A16, export.KV8),
        "w4a16": (),
        "w4a16, cache 8": (export.W4A16, export.KV8),
    }
    blocks = {name: export.block_qdq(model, 1, ids[2:], *options) for name, options in schemes.items()}
    for kind in ("plain", "LPBQ"):
        blocks[f"w4a16 {kind}"] = export.block_qdq(model, 1, ids[2:], blocks=(kind, 32))
    return blocks


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 8, "rope_theta": 500.0},
        {"tie_word_embeddings": False, "rms_norm_eps": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("start", ["embedding", "ids"])
def test_the_onnx_network_is_the_one_in_torch(config, start, ids):
    model = llama(**config)
    network = export.to_onnx(model, TOKENS, start=start)
    onnx.checker.check_model(network, full_check=True)
    sample = {"ids": ids[:1].int().numpy()} if start == "ids" else export.inputs(model, ids[:1])[0]
    logits = Runner(network, ["logits"])(sample)[0]
    expected = model(ids[:1]).numpy()
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-4 < expected.std()


@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_blocks_in_a_row_are_those_in_torch_for_any_number_of_tokens(model, tokens):
    x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(2))
    network = export.to_onnx(model, tokens, layers=[2, 0])
    assert [output.name for output in network.graph.output] == ["0.out"]
    expected = model.block(0, model.block(2, x)).numpy()
    assert np.abs(Runner(network, ["0.out"])({"embedding": x.numpy()})[0] - expected).max() < 1e-4


def test_a_token_does_not_see_those_that_follow(model, ids):
    run = Runner(export.to_onnx(model, TOKENS), ["logits"])
    sample = export.inputs(model, ids[:1])[0]
    changed = sample["embedding"].copy()
    changed[:, -1] += 1
    before, after = run(sample)[0], run({"embedding": changed})[0]
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before - after)[:, -1].max() > 0.1


def test_inputs_of_a_later_layer_are_outputs_of_the_earlier_ones(model, ids):
    first = Runner(export.to_onnx(model, TOKENS, layers=range(2)), ["1.out"])
    for sample, later in zip(export.inputs(model, ids), export.inputs(model, ids, 2), strict=True):
        np.testing.assert_allclose(first(sample)[0], later["embedding"], atol=1e-4)


def test_shapes_are_fixed_and_nodes_are_named_after_what_they_make(model):
    network = export.to_onnx(model, TOKENS)
    view = fuse.View(network)
    assert all(node.name == node.output[0] for node in view.nodes)
    assert all(view.shapes[name] and all(view.shapes[name]) for name in view.makers)
    names = {name for name in model.weights if name != EMBEDDING} | {HEAD}
    assert names == {name for name in view.constants if "weight" in name}
    for name in model.linears():
        np.testing.assert_array_equal(view.value(name), model.weights[name].numpy().T)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"start": "words"}, {"layers": []}, {"layers": [3]}, {"layers": [-1]}, {"layers": [0, 1, 7]}],
    ids=str,
)
def test_what_no_network_can_be_made_of_is_refused_in_a_sentence(model, wrong):
    with pytest.raises(ValueError, match=r"there is no network of layers") as caught:
        export.to_onnx(model, **{"tokens": 4, **wrong})
    assert "\n" not in str(caught.value)


# -- in codes --------------------------------------------------------------------------------------------------------


def types(network):
    """ONNX types of all codes, by the name of the tensor."""
    constants = {tensor.name: tensor for tensor in network.graph.initializer}
    found = {}
    for node in network.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            codes = constants.get(node.input[0]) or constants[node.input[2]]
            found[node.output[0].removesuffix(".codes")] = onnx.TensorProto.DataType.Name(codes.data_type)
    return found


def test_codes_have_the_types_that_were_asked_for(made):
    kinds = {name: types(block.network) for name, block in made.items()}
    weight = "model.layers.1.mlp.down_proj.weight"
    assert {name: kind[weight] for name, kind in kinds.items()} == {
        name: "INT8" if name.startswith("w8") else "INT4" for name in made
    }
    assert {kinds["w8a8"]["1.softmax"], kinds["w8a8"]["1.k.cached"], kinds["w8a8"]["1.out"]} == {"UINT8"}
    assert kinds["w8a8, softmax 16"]["1.softmax"] == "UINT16" != kinds["w8a8, softmax 16"]["1.masked"]
    cached = kinds["w8a16, cache 8"]
    assert [cached[f"1.{name}"] for name in ("k.cached", "v.cached", "k.transposed", "v.heads")] == [
        *["UINT8"] * 2,
        *["UINT16"] * 2,
    ]
    assert made["w8a16, cache 8"].encodings.activations["1.v.cached"].zero_point == 128


def test_blocks_lie_along_the_inputs(made):
    weight = "model.layers.1.mlp.down_proj.weight"
    for kind in ("plain", "LPBQ"):
        network = made[f"w4a16 {kind}"].network
        [node] = [node for node in network.graph.node if node.output[0] == weight]
        attributes = {entry.name: entry.i for entry in node.attribute}
        assert (attributes["axis"], attributes["block_size"]) == (0, 32)
        makers = {name for node in network.graph.node for name in node.output}
        assert (node.input[1] in makers) == (kind == "LPBQ")  # a chain of two scales


def test_the_head_keeps_8_bits_and_rules_have_the_last_word(model, ids):
    network, samples = export.to_onnx(model, TOKENS), export.inputs(model, ids[2:])
    assert types(export.quantize(network, samples).network)[HEAD] == "INT8"
    rule = Rule(HEAD, 4, True, "param")
    assert types(export.quantize(network, samples, export.W4A16, [rule]).network)[HEAD] == "INT4"


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_what_is_masked_is_clipped_and_has_no_weight(made, model, ids, scheme):
    block = made[scheme]
    masked, weights = Runner(block.network, ["1.masked", "1.softmax"])(export.inputs(model, ids[:1], 1)[0])
    later = np.tile(np.triu(np.ones((TOKENS, TOKENS), bool), 1), (2, 1))
    lowest = masked.min()
    assert (masked[..., later] == lowest).all()
    assert (weights[..., later] == 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=TOKENS / 2 / 255)
    # Far finer than with the whole mask in the range, which would be 100 wide.
    assert -40 < lowest < masked[..., ~later].min() - 4


def test_a_16_bit_sigmoid_has_the_encoding_of_the_backend(made):
    for name, scale in (("w8a16", 2.0**-16), ("w4a16", 2.0**-16)):
        encoding = made[name].encodings.activations["1.sigmoid"]
        assert (encoding.scale.item(), encoding.zero_point.item()) == (scale, 0)
    assert made["w8a8"].encodings.activations["1.sigmoid"].scale.item() != 2.0**-16


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone_cost_what_fake_quantization_in_torch_costs(model, ids, bits):
    options = {8: export.W8A16, 4: export.W4A16}[bits]
    network, samples = export.to_onnx(model, TOKENS, layers=range(3)), export.inputs(model, ids)
    run = Runner(export.quantize(network, samples, options).network, ["2.out"])
    other = quantized(model, Grid(bits, signed=True, symmetric=True, block_size=(1, -1)))
    x = y = model.embed(ids[:2])
    for layer in range(3):
        x, y = model.block(layer, x), other.block(layer, y)
    found = np.concatenate([run(sample)[0] for sample in samples[:2]])
    assert sqnr_db(y.numpy(), found) > sqnr_db(x.numpy(), y.numpy()) + 15  # 16-bit activations add little


def test_finer_weights_are_better_ones(made, model, ids):
    sample = export.inputs(model, ids[:1], 1)[0]
    quality = {}
    for name, block in made.items():
        real, ours = (Runner(network, ["1.out"])(sample)[0] for network in (block.float_network, block.network))
        quality[name] = sqnr_db(real, ours)
    assert quality["w4a16"] < quality["w4a16 plain"] < quality["w8a8"] < quality["w8a16"]
    assert quality["w4a16"] < quality["w4a16 LPBQ"] < quality["w8a8"]
    assert quality["w8a16, cache 8"] > quality["w8a16"] - 2


def test_integers_compute_what_the_simulation_does(made, model, ids):
    sample = export.inputs(model, ids[:1], 1)[0]
    for name, least in (("w8a8, softmax 16", 25), ("w8a16, cache 8", 55), ("w4a16", 60), ("w4a16 LPBQ", 60)):
        simulated = Runner(made[name].network, ["1.out"])(sample)[0]
        assert sqnr_db(simulated, IntegerNetwork(made[name].network)(sample)[0]) > least, name


def test_a_calibration_is_used_as_it_is(model, ids):
    from qtools.ptq.calibrate import calibrate

    network, samples = export.to_onnx(model, TOKENS, layers=[0]), export.inputs(model, ids[2:])
    known = calibrate(network, samples, methods=["min_max"])
    ours = export.quantize(network, samples, export.W8A8).network
    assert ours == export.quantize(network, [], export.W8A8, calibration=known).network


def test_samples_that_can_be_read_once_are_enough_for_algorithms_too(model, ids):
    network, samples = export.to_onnx(model, TOKENS, layers=[0]), export.inputs(model, ids[2:])
    options = replace(export.W4A16, algorithms=("bc",))
    once = export.quantize(network, iter(samples), options).network
    assert once == export.quantize(network, samples, options).network


# -- on the backend --------------------------------------------------------------------------------------------------


@needs_backend
@pytest.mark.parametrize(
    ("scheme", "arch", "least"),
    [
        ("w8a8", "v75", 22),
        ("w8a8, softmax 16", "v75", 22),
        ("w8a16, cache 8", "v75", 50),
        ("w4a16, cache 8", "v75", 40),
        ("w4a16 plain", "v73", 40),
        ("w4a16 LPBQ", "v75", 40),
        ("w4a16", "v68", 35),
    ],
)
def test_a_block_runs_on_the_backend_whole(made, model, ids, scheme, arch, least):
    sample = export.inputs(model, ids[:1], 1)[0]
    simulated = Runner(made[scheme].network, ["1.out"])(sample)[0]
    assert sqnr_db(simulated, htp.run(made[scheme].network, sample, arch)["1.out"]) > least


@needs_backend
def test_a_block_can_be_verified_in_one_call(made, model, ids):
    found = verify(made["w4a16"].network, export.inputs(model, ids[:1], 1), made["w4a16"].float_network)
    assert not found.refused and not found.integer_reason
    assert found.parts_at.name in ("1.attention_norm", "1.q")
    assert all(layer.worst <= 2 for layer in found.integers[:3])


@needs_backend
@pytest.mark.parametrize("start", ["embedding", "ids"])
def test_the_whole_network_runs_on_the_backend(model, ids, start):
    network = export.to_onnx(model, TOKENS, start=start)
    samples = [{"ids": one[None].int().numpy()} for one in ids] if start == "ids" else export.inputs(model, ids)
    done = export.quantize(network, samples[2:], export.W8A16, export.KV8)
    found, simulated = htp.run(done.network, samples[0])["logits"], Runner(done.network, ["logits"])(samples[0])[0]
    assert sqnr_db(simulated, found) > 40


@needs_backend
def test_with_another_encoding_the_backend_has_another_sigmoid(model, ids, made):
    own = export.block_qdq(model, 1, ids[2:], export.W8A16, [Rule("1.sigmoid", 16, False, "activation")])
    worst = []
    for block in (made["w8a16"], own):
        gate, expected = Runner(block.network, ["1.gate.codes", "1.sigmoid.codes"])(export.inputs(model, ids[:1], 1)[0])
        alone = Extractor(block.network).extract_model(["1.gate.codes"], ["1.sigmoid.codes"])
        found = htp.run(alone, {"1.gate.codes": gate})["1.sigmoid.codes"]
        worst.append(np.abs(found.astype(int) - expected).max())
    assert worst[0] < 10 < 100 < worst[1]


@needs_backend
def test_the_backend_has_no_4_bit_weight_8_steps_above_its_zero():
    """What parts a network of ONNX Runtime's quantizer from its simulation; ours have no zero points."""
    rng, wide = np.random.default_rng(0), Grid(16)
    x, codes = rng.standard_normal((1, 16, 64)).astype(np.float32), rng.integers(-7, 7, (64, 24))
    codes[rng.integers(0, 64, 5), 3:8] = 7
    zero = QParams(Grid(4, signed=True), np.float32([[0.01]]), np.int32([[-1]]))
    ends = choose_qparams(x, wide), choose_qparams(x @ ((codes + 1) * np.float32(0.01)), wide)
    model, sample = operator_model("MatMul", codes, zero, x.shape, activations=ends), {"x": quantize(x, ends[0])}
    far = np.abs(htp.run(model, sample)["y"].astype(int) - Runner(model, ["y"])(sample)[0]) > 100
    assert np.flatnonzero(far.reshape(-1, 24).any(0)).tolist() == [3, 4, 5, 6, 7]
