"""The Llama architecture in plain torch, with the tensor names of Hugging Face's checkpoints.

RMSNorm, rotary positions, grouped queries, SwiGLU (Touvron et al., Llama 2, arXiv 2307.09288, section 2.2).  A model is
a `Config` and a mapping of weights, so that a lazy mapping such as `Checkpoint` runs a network larger than the memory.
`Taps` are functions that it calls on its way: fake quantizers, or whatever looks at the tensors of a linear layer.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from qtools.llm.checkpoint import EMBEDDING, HEAD, NORM, Checkpoint, Config

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor


@dataclass(frozen=True)
class Taps:
    """Functions that a model calls on its tensors, and whose results it goes on with.

    Parameters
    ----------
    input, output : callable, optional
        Take the name of a weight of `Config.linears`, and the input (..., inputs) or output (..., outputs) of its
        layer.
    softmax : callable, optional
        Takes the number of a layer and its attention weights (batch, heads, queries, keys).
    keys, values : callable, optional
        Take the number of a layer and its keys, after their rotation, or values (batch, heads, tokens, head_dim).
    """

    input: Callable[[str, Tensor], Tensor] | None = None
    output: Callable[[str, Tensor], Tensor] | None = None
    softmax: Callable[[int, Tensor], Tensor] | None = None
    keys: Callable[[int, Tensor], Tensor] | None = None
    values: Callable[[int, Tensor], Tensor] | None = None


class Cache(Protocol):
    """What a model needs of a key-value cache."""

    @property
    def length(self) -> int:
        """Tokens that every layer holds."""

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (batch, heads, tokens, head_dim) of a layer; returns those of all tokens."""


@dataclass(frozen=True, eq=False)
class Llama:
    """A network, its weights under Hugging Face's names, and its tokenizer if there is one.

    Weights may be of any float type; the arithmetic is float32.
    """

    config: Config
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer | None = None

    def __call__(self, ids: Tensor, taps: Taps | None = None, cache: Cache | None = None) -> Tensor:
        """Logits (batch, tokens, vocab_size) of token ids (batch, tokens), which follow those in the cache.

        Raises
        ------
        ValueError
            If `ids` has another rank, is empty, or holds what is no token.
        """
        if ids.ndim != 2 or not ids.numel() or int(ids.min()) < 0 or int(ids.max()) >= self.config.vocab_size:
            raise ValueError(f"ids must be (batch, tokens) within 0 and {self.config.vocab_size - 1}")
        x, start = self.embed(ids), cache.length if cache is not None else 0
        for layer in range(self.config.num_hidden_layers):
            x = self.block(layer, x, taps, cache, start)
        return self.head(x)

    def embed(self, ids: Tensor) -> Tensor:
        """The input (batch, tokens, hidden_size) of the first block."""
        return self.weights[EMBEDDING][ids].float()

    def block(
        self, layer: int, x: Tensor, taps: Taps | None = None, cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """One block on x (batch, tokens, hidden_size), whose first token has position `start`."""
        from torch.nn.functional import silu

        taps, prefix = taps or Taps(), f"model.layers.{layer}"

        def linear(name: str, x: Tensor) -> Tensor:
            name = f"{prefix}.{name}_proj.weight"
            x = taps.input(name, x) if taps.input else x
            y = x @ self.weights[name].to(x.dtype).T
            return taps.output(name, y) if taps.output else y

        normed = self._norm(f"{prefix}.input_layernorm.weight", x)
        q, k, v = (self._heads(linear(f"self_attn.{name}", normed)) for name in "qkv")
        q, k = (rotate(part, start, self.config.rope_theta) for part in (q, k))
        k = taps.keys(layer, k) if taps.keys else k
        v = taps.values(layer, v) if taps.values else v
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mixed = _attention(q, k, v, (lambda p: taps.softmax(layer, p)) if taps.softmax else None)
        x = x + linear("self_attn.o", mixed.transpose(1, 2).flatten(2))
        normed = self._norm(f"{prefix}.post_attention_layernorm.weight", x)
        return x + linear("mlp.down", silu(linear("mlp.gate", normed)) * linear("mlp.up", normed))

    def head(self, x: Tensor) -> Tensor:
        """Logits of what the last block returns."""
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return self._norm(NORM, x) @ self.weights[name].to(x.dtype).T

    def with_weights(self, new: Mapping[str, Tensor]) -> Llama:
        """The same network with some of its weights replaced.

        Raises
        ------
        ValueError
            If there is no weight of that name, or one has another shape.
        """
        shapes = self.config.shapes()
        for name, weight in new.items():
            if shapes.get(name) != tuple(weight.shape):
                raise ValueError(
                    f"{name} of shape {tuple(weight.shape)} is no weight of this model: {shapes.get(name)}"
                )
        return replace(self, weights=ChainMap(dict(new), self.weights))

    def linears(self) -> Iterator[str]:
        """Names of the weights of all linear layers but the head, in the order in which they run."""
        return (name for layer in range(self.config.num_hidden_layers) for name in self.config.linears(layer))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt() * self.weights[name]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def generate(model: Llama, ids: Tensor, count: int, cache: Cache | None = None, taps: Taps | None = None) -> Tensor:
    """A prompt (batch, tokens) and the `count` most likely tokens behind it, one after the other.

    The cache, empty at first, holds all of them but the last one in the end; without one, every token is computed anew
    from all those before it.
    """
    import torch

    with torch.no_grad():
        for _ in range(count):
            new = ids if cache is None else ids[:, cache.length :]
            ids = torch.cat((ids, model(new, taps, cache)[:, -1:].argmax(-1)), 1)
    return ids


def rotate(x: Tensor, start: int, theta: float) -> Tensor:
    """Rotary positions of x (..., tokens, head_dim): element i turns with element i + head_dim / 2.

    Su et al., RoFormer, arXiv 2104.09864, equation 34, in the order of Hugging Face's checkpoints.  GGUF files turn
    element 2 i with 2 i + 1, as the paper does: `checkpoint.half_split` reorders their weights.
    """
    import torch

    tokens, size = x.shape[-2:]
    speed = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angle = torch.outer(torch.arange(start, start + tokens, dtype=torch.float32, device=x.device), speed)
    cos, sin, (first, second) = angle.cos(), angle.sin(), x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, tap: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Attention of the last tokens to all of them and none that follow; a tap on its weights takes the slow way."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    if tap is None and q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True)
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(k.shape[2] - q.shape[2] + 1)
    if tap is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=~later)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
    return tap(scores.softmax(-1)) @ v


def load(path: str | Path, *, progress: bool = False) -> Llama:
    """A model with all its weights in memory, as float32.

    Parameters
    ----------
    path : str or Path
        As for `Checkpoint`, which raises the same errors and keeps nothing in memory.
    progress : bool
        Show a bar on stderr.
    """
    checkpoint = Checkpoint(path)
    bar = tqdm(checkpoint.items(), desc=f"loading {checkpoint.path.name}", disable=not progress, leave=False)
    return Llama(checkpoint.config, {name: weight.float() for name, weight in bar}, checkpoint.tokenizer)
