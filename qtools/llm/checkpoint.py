"""Weights of the Llama architecture as they lie in files: Hugging Face's folders and GGUF.

Whatever is wrong with a file is a `ValueError` of one sentence.  Nothing here runs code that a file holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError, model_validator

from qtools.llm._shards import read_checkpoint

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a block, in the order in which they run."""

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_UNUSED = ".rotary_emb.inv_freq"  # older checkpoints store it; it follows from rope_theta
_DIGITS = {"smollm": True, "gpt-2": False}  # byte-level BPE of GGUF files: whether each digit stands alone
_FILLED = 0.9  # of the rows of an embedding; some models fill it up to a round number
_CONTROL = 3  # the type of tokens that stand for no text, in GGUF files
_GGUF = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{short}": f"self_attn.{short[0]}_proj" for short in ("q", "k", "v", "output")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


class Config(BaseModel):
    """The keys of a Hugging Face config.json that this network needs; one that it cannot follow is an error."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: Literal["llama"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt = None  # as many as heads
    head_dim: PositiveInt = None  # hidden_size / num_attention_heads
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: None = None
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        rope = found.get("rope_parameters")  # where newer files keep both of the others
        if isinstance(rope, dict):
            plain = rope.get("rope_type", "default") == "default"
            found = {**found, **rope, "rope_scaling": None if plain else rope}
        heads, size = found.get("num_attention_heads"), found.get("hidden_size")
        given = {key: value for key, value in found.items() if value is not None}
        if isinstance(heads, int) and isinstance(size, int) and heads > 0:
            given = {"num_key_value_heads": heads, "head_dim": size // heads} | given
        return given

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("the heads must be a multiple of the key-value heads, and head_dim even")
        return self

    def linears(self, layer: int) -> dict[str, tuple[int, int]]:
        """Names of the weights of a block's linear layers, in the order of `LINEARS`, with (outputs, inputs)."""
        size, inner = self.hidden_size, self.intermediate_size
        queries, keys = (self.head_dim * n for n in (self.num_attention_heads, self.num_key_value_heads))
        shapes = ((queries, size), (keys, size), (keys, size), (size, queries), (inner, size), (inner, size))
        parts = ("self_attn",) * 4 + ("mlp",) * 3
        names = (f"model.layers.{layer}.{part}.{name}.weight" for part, name in zip(parts, LINEARS))
        return dict(zip(names, (*shapes, (size, inner))))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by its name; a tied head is not among them."""
        found: dict[str, tuple[int, ...]] = {EMBEDDING: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            norms = ("input_layernorm", "post_attention_layernorm")
            found |= {f"model.layers.{layer}.{name}.weight": (self.hidden_size,) for name in norms}
            found |= self.linears(layer)
        head = {} if self.tie_word_embeddings else {HEAD: (self.vocab_size, self.hidden_size)}
        return {**found, NORM: (self.hidden_size,), **head}


class Checkpoint(Mapping[str, "Tensor"]):
    """The weights of a file or folder, each read when it is asked for, checked, and not kept.

    Parameters
    ----------
    path : str or Path
        A folder with config.json, model.safetensors (or shards with model.safetensors.index.json) and perhaps
        tokenizer.json; or a GGUF file, whose weights are dequantized and whose query and key rows are reordered.

    Raises
    ------
    ValueError
        In one sentence, whatever is wrong: nothing to read, a malformed config, a network that is not a Llama, a
        shard that is missing, names or shapes that do not fit, pickled weights, a tokenizer that does not fit.  On
        reading a weight: NaN or infinity.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        opened = _open_gguf if path.suffix == ".gguf" else _open_folder
        with _in_one_sentence(path):
            self.config, found, self._read, self.tokenizer = opened(path)
        self.path, self._names = path, list(wanted := self.config.shapes())
        if missing := [name for name in wanted if name not in found]:
            raise ValueError(f"{path} lacks {len(missing)} weights that its config names, {missing[0]} first")
        if wrong := [name for name in found if found[name] != wanted.get(name)]:
            expected = wanted.get(wrong[0], "none of that name")
            raise ValueError(f"{path}: {wrong[0]} has shape {found[wrong[0]]}, its config wants {expected}")
        size = self.tokenizer.get_vocab_size() if self.tokenizer else self.config.vocab_size
        if not _FILLED * self.config.vocab_size <= size <= self.config.vocab_size:
            raise ValueError(f"{path}: a tokenizer of {size} tokens for an embedding of {self.config.vocab_size} rows")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with _in_one_sentence(self.path):
            weight = self._read(name)
        if not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise ValueError(f"{self.path}: {name} holds NaN, infinity or no floats")
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def half_split(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key weight in the order of `rotate`, from that of pairs that stand side by side."""
    return weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


_Opened = tuple[Config, dict[str, tuple[int, ...]], Callable[[str], "Tensor"], "Tokenizer | None"]


def _open_folder(path: Path) -> _Opened:
    from safetensors import safe_open
    from tokenizers import Tokenizer

    if path.is_file():
        raise ValueError("a checkpoint is a folder of safetensors or a .gguf file; a pickle can run code")
    config = Config.model_validate_json((path / "config.json").read_bytes())
    stored = {name: one for name, one in read_checkpoint(path)[1].items() if not name.endswith(_UNUSED)}
    if config.tie_word_embeddings:
        stored.pop(HEAD, None)

    def read(name: str) -> Tensor:
        with safe_open(stored[name].path, "pt") as file:
            return file.get_tensor(name)

    tokenizer = path / "tokenizer.json"
    known = Tokenizer.from_file(str(tokenizer)) if tokenizer.is_file() else None
    return config, {name: one.shape for name, one in stored.items()}, read, known


def _open_gguf(path: Path) -> _Opened:
    import torch
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(path)
    field = {name: entry.contents() for name, entry in reader.fields.items() if name.startswith(("general.", "llama."))}
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    rope = field.get("llama.rope.scaling.type", "none")
    config = Config.model_validate(
        {
            "model_type": field.get("general.architecture"),
            "vocab_size": int(tensors[EMBEDDING].shape[1]) if EMBEDDING in tensors else None,
            "hidden_size": field.get("llama.embedding_length"),
            "intermediate_size": field.get("llama.feed_forward_length"),
            "num_hidden_layers": field.get("llama.block_count"),
            "num_attention_heads": field.get("llama.attention.head_count"),
            "num_key_value_heads": field.get("llama.attention.head_count_kv"),
            "head_dim": field.get("llama.attention.key_length"),
            "rms_norm_eps": field.get("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": field.get("llama.rope.freq_base"),
            "rope_scaling": None if rope == "none" else rope,
            "tie_word_embeddings": HEAD not in tensors,
        }
    )

    def read(name: str) -> Tensor:
        weight = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        return half_split(weight, config.head_dim) if name.endswith(("q_proj.weight", "k_proj.weight")) else weight

    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    return config, shapes, read, _gguf_tokenizer(reader)


def _hf_name(name: str) -> str:
    """Hugging Face's name of a weight of a GGUF file; one that is not known stays as it is."""
    ends = {"token_embd.weight": EMBEDDING, "output_norm.weight": NORM, "output.weight": HEAD}
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _GGUF:
            return f"model.layers.{layer}.{_GGUF[part]}.weight"
    return ends.get(name, name)


def _gguf_tokenizer(reader: GGUFReader) -> Tokenizer | None:
    """The tokenizer of a GGUF file, if it is byte-level BPE of a kind known here."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def field(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents() if f"tokenizer.ggml.{name}" in reader.fields else None

    if field("model") != "gpt2" or field("pre") not in _DIGITS:
        return None
    tokens = field("tokens")
    merges = [tuple(merge.split(" ")) for merge in field("merges") or ()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Digits(individual_digits=True)] * _DIGITS[field("pre")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, field("token_type")) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    return tokenizer


@contextmanager
def _in_one_sentence(path: Path) -> Iterator[None]:
    """What the libraries find wrong with a file, as one ValueError that names it."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "config"
        raise ValueError(f"{path}: {where}: {first['msg']}") from error
    except Exception as error:  # tokenizers raises nothing more special, and a broken GGUF file nearly everything
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
