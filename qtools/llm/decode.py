"""What a token costs: the layers of a decoder, the bytes it must read, and the time on a chip."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from qtools.npu.roofline import PRECISIONS, Layer, predict, simple_layer
from qtools.npu.soc import Rates


class Transformer(NamedTuple):
    """A decoder like Llama: RMSNorm, rotary positions, grouped heads, gated feed-forward."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int


LLAMA2_7B = Transformer(32, 4096, 32, 32, 11008, 32000)
"""H. Touvron et al., Llama 2, arXiv 2307.09288: 6.607e9 weights in matrices, all read for every token."""


class Bits(NamedTuple):
    """Bits of a decoder's weights and of its key-value cache; `group` weights share a 16-bit scale (0: none)."""

    attention: int
    ffn: int
    head: int
    cache: int
    group: int = 0


W4A16 = Bits(4, 4, 8, 8)
"""As in Qualcomm's exports."""


def layers(model: Transformer, tokens: int, context: int, bits: Bits = W4A16, sequences: int = 1) -> list[Layer]:
    """A run over `tokens` new tokens with a static cache of `context` tokens, attention split into its heads.

    With several `sequences`, each of which has a cache of its own, `tokens` is of all of them together.

    So Qualcomm exports these models (AI Hub Models, llama_v2_7b_chat_quantized/README.md).  Each head has the operators
    of ONNX's opset 23: three projections, two rotations, new keys and values converted to the width of the cache and
    appended to it, scores, mask, softmax, mixture.  Raises ValueError if there are no tokens, or more than the context.
    """
    if not 1 <= tokens <= context * sequences:
        raise ValueError(f"tokens must be between 1 and the context of {context * sequences}, got {tokens}")
    hidden, heads, kv, side = model.hidden, model.heads, model.kv_heads, model.hidden // model.heads

    def product(name: str, depth: int, channels: int, width: int, nodes: int = 1) -> Layer:
        size = depth * channels
        scales = 2 * size // bits.group if bits.group else 0
        layer = Layer(name, "linear", "matrix", tokens * size, size, tokens * depth, tokens * channels)
        return replace(layer, rows=tokens, depth=depth, channels=channels, nodes=nodes, weight_bits=width, cache=scales)

    def simple(op: str, read: int, written: int, nodes: int = 1) -> Layer:
        return simple_layer(op, op, read, written, nodes=nodes)

    states, scores, wide, new = tokens * hidden, heads * tokens * context, tokens * model.ffn, tokens * side
    stored = sequences * context * kv * side * bits.cache // 8  # bytes of the keys; as many are values
    mix = Layer("attention", "attention", "matrix", scores * side, rows=tokens, nodes=heads, cache=stored)
    norm, residual = simple("rmsnorm", states, states), simple("add", 2 * states, states)
    block = [
        norm,
        product("qkv", hidden, side * (heads + 2 * kv), bits.attention, heads + 2 * kv),
        simple("rotate", new * (heads + kv), new * (heads + kv), heads + kv),
        simple("cast", 2 * new * kv, new * kv, 2 * kv),
        simple("concat", stored, stored, 2 * kv),  # both caches have as many bytes as this has elements of 16 bits
        replace(mix, inputs=states, outputs=scores, depth=side, channels=context),
        simple("add", scores, scores, heads),
        simple("softmax", scores, scores, heads),
        replace(mix, inputs=scores, outputs=states, depth=context, channels=side),
        product("out", hidden, hidden, bits.attention),
        residual,
        norm,
        product("gate, up", hidden, 2 * model.ffn, bits.ffn, 2),
        simple("mul", 2 * wide, wide),
        product("down", model.ffn, hidden, bits.ffn),
        residual,
    ]
    head = product("head", hidden, model.vocab, bits.head)
    return [simple("gather", states, states), *(block * model.layers), norm, head]


class Reads(NamedTuple):
    """Bytes that main memory must give for one more token of each sequence."""

    weights: float
    scales: float
    cache: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def reads(model: Transformer, context: int, bits: Bits = W4A16, sequences: int = 1) -> Reads:
    """What no chip can do without: every weight once, and every sequence's cache as far as it is filled."""
    run = layers(model, sequences, context, bits, sequences)
    products = [layer for layer in run if layer.weights]
    weights = sum(layer.weights * layer.weight_bits / 8 for layer in products)
    cache = sum(layer.cache for layer in run if layer.op == "attention")
    return Reads(weights, sum(layer.cache for layer in products), cache)


def floor(model: Transformer, bandwidth: float, context: int, bits: Bits = W4A16, sequences: int = 1) -> float:
    """Seconds that a token takes at least where main memory gives `bandwidth` bytes a second."""
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, in bytes a second, got {bandwidth}")
    return reads(model, context, bits, sequences).total / bandwidth


def cache_share(model: Transformer, saved: float, bits: Bits = W4A16) -> float:
    """How long a context must be, in tokens, for a cache of half the bits to save that share of the floor."""
    if not 0 < saved < 0.5:
        raise ValueError(f"half the bits of the cache save between none and half of the time, not {saved}")
    one = reads(model, 1, bits)
    return 2 * saved / (1 - 2 * saved) * (one.weights + one.scales) / one.cache


def seconds(
    model: Transformer, rates: Rates, context: int, prompt: int, bits: Bits = W4A16, chunk: int = 128
) -> tuple[float, float]:
    """Seconds to the first token of a prompt, read `chunk` tokens at a time, and for each token after it (16-bit)."""
    runs = [layers(model, tokens, context, bits) for tokens in (min(chunk, context), 1)]
    first, token = (predict(run, PRECISIONS["w4a16"], rates).seconds for run in runs)
    return math.ceil(prompt / chunk) * first, token
