"""A Llama as ONNX with fixed shapes, and in codes, for the HTP backend.

Queries that share keys are stacked along the tokens, so that nothing is repeated; RMSNorm is one operator.  The backend
takes the embedding's Gather too; `IntegerNetwork` begins behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qtools.affine import Grid, QParams, choose_lpbq, qparams_from_range
from qtools.encodings import Encoding, Rule
from qtools.llm.checkpoint import EMBEDDING, HEAD, NORM
from qtools.llm.llama import Llama, rotate
from qtools.ptq import graph
from qtools.ptq.calibrate import Calibration, calibrate
from qtools.ptq.convert import Converted, Options, quantize_network

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

W8A8, W8A16, W4A16 = (Options(a, w, use_per_row_quantization=True) for w, a in ((8, 8), (8, 16), (4, 16)))
SOFTMAX16 = (Rule("*.softmax", 16, None, "activation"),)
KV8 = (Rule("*.cached", 8, True, "activation"),)  # symmetric: codes less their zero point fit into 8 bits
"""Schemes, a scale for each output of a linear layer; 16 bits for attention weights, or 8 for keys and values."""


def to_onnx(
    model: Llama, tokens: int, *, layers: Sequence[int] | None = None, start: Literal["embedding", "ids"] = "embedding"
) -> onnx.ModelProto:
    """The network on so many tokens, in floats; its weights have the model's names, and are transposed.

    Parameters
    ----------
    model : Llama
    tokens : int
        Length of the one sequence that it takes, from position 0 on.
    layers : sequence of int, optional
        Only these blocks; by default all of them, the last norm and the head.
    start : {'embedding', 'ids'}
        Whether its input is ``embedding`` (1, tokens, hidden_size) or ``ids`` (1, tokens) of int32.

    Returns
    -------
    ModelProto
        Shapes inferred, every node named as what it makes.  Tensors of block 0 begin with ``0.``; the output is
        ``logits`` (1, tokens, vocab_size), or ``N.out`` (1, tokens, hidden_size) of the last block.

    Raises
    ------
    ValueError
        If one of them is unknown, or there are no tokens.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    config, whole, x = model.config, layers is None, "embedding"
    layers = list(range(config.num_hidden_layers) if whole else layers)
    if (
        tokens < 1
        or start not in ("embedding", "ids")
        or not layers
        or not {*layers} <= {*range(config.num_hidden_layers)}
    ):
        raise ValueError(f"there is no network of layers {layers} on {tokens} tokens from {start!r} on")
    net = _Graph(model, tokens)
    source = helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, tokens, config.hidden_size])
    if start == "ids":
        source = helper.make_tensor_value_info("ids", TensorProto.INT32, [1, tokens])
        x = net("Gather", net.constant(EMBEDDING, model.weights[EMBEDDING].float()), "ids", to=x)
    for layer in layers:
        x = net.block(layer, x)
    if whole:
        head = net.constant(HEAD, model.weights[EMBEDDING if config.tie_word_embeddings else HEAD].float().T)
        x = net("MatMul", net.norm(NORM, x, "norm"), head, to="logits")
    output = helper.make_tensor_value_info(x, TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(values, name) for name, values in net.constants.items()]
    made = helper.make_graph(net.nodes, "llama", [source], [output], constants)
    network = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)  # RMSNormalization
    return onnx.shape_inference.infer_shapes(network, check_type=True, strict_mode=True)


class _Graph:
    """Nodes and constants to be; called with an operator, its inputs, and the name of what it makes."""

    def __init__(self, model: Llama, tokens: int) -> None:
        self.model, self.config, self.tokens = model, model.config, tokens
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._add_tables()

    def __call__(self, op: str, *inputs: str, to: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(op, inputs, [to], name=to, **attributes))
        return to

    def constant(self, name: str, values: Any) -> str:
        self.constants[name] = np.ascontiguousarray(values)
        return name

    def reshape(self, x: str, *shape: int, to: str) -> str:
        return self("Reshape", x, self.constant(f"shape.{'x'.join(map(str, shape))}", np.int64(shape)), to=to)

    def norm(self, name: str, x: str, to: str) -> str:
        weight = self.constant(name, self.model.weights[name].float())
        return self("RMSNormalization", x, weight, to=to, epsilon=self.config.rms_norm_eps)

    def _add_tables(self) -> None:
        """Cosines and sines, those of queries over the root of head_dim, and the mask of all queries of a key."""
        import torch

        config, shape = self.config, (self.tokens, self.config.head_dim // 2)
        turned = rotate(torch.cat((torch.ones(shape), torch.zeros(shape)), 1), 0, config.rope_theta)
        cos, sin = (part.numpy() for part in turned.chunk(2, 1))
        for name, scale in (("q", config.head_dim**-0.5), ("k", 1.0)):
            self.constant(f"{name}.cos", np.float32(scale) * np.hstack([cos, cos]))
            self.constant(f"{name}.sin", np.float32(scale) * np.hstack([-sin, sin]))
        later = np.triu(np.full((self.tokens, self.tokens), -100.0, np.float32), 1)  # added to scores
        self.constant("mask", np.tile(later, (config.num_attention_heads // config.num_key_value_heads, 1)))

    def block(self, layer: int, x: str) -> str:
        config, tokens, prefix = self.config, self.tokens, f"model.layers.{layer}"
        heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def linear(part: str, x: str) -> str:
            name = f"{prefix}.{part}_proj.weight"
            weight = self.constant(name, self.model.weights[name].float().T)
            return self("MatMul", x, weight, to=f"{layer}.{part.split('.')[1]}")

        normed = self.norm(f"{prefix}.input_layernorm.weight", x, f"{layer}.attention_norm")
        q, k, v = (
            self("Transpose", self.reshape(y, 1, tokens, -1, size, to=f"{y}.split"), to=f"{y}.heads", perm=[0, 2, 1, 3])
            for y in [linear(f"self_attn.{name}", normed) for name in "qkv"]
        )
        q = self.reshape(self.rotated(q, "q"), 1, keys, -1, size, to=f"{layer}.q.stacked")
        k = self("Transpose", self.rotated(k, "k"), to=f"{layer}.k.transposed", perm=[0, 1, 3, 2])
        k, v = (self("Identity", y, to=f"{layer}.{name}.cached") for name, y in (("k", k), ("v", v)))  # see KV8
        scores = self("Add", self("MatMul", q, k, to=f"{layer}.scores"), "mask", to=f"{layer}.masked")
        mixed = self("MatMul", self("Softmax", scores, to=f"{layer}.softmax"), v, to=f"{layer}.mixed")
        mixed = self.reshape(mixed, 1, heads, tokens, size, to=f"{layer}.mixed.heads")
        mixed = self("Transpose", mixed, to=f"{layer}.mixed.tokens", perm=[0, 2, 1, 3])
        mixed = self.reshape(mixed, 1, tokens, -1, to=f"{layer}.mixed.joined")
        x = self("Add", x, linear("self_attn.o", mixed), to=f"{layer}.attention")
        normed = self.norm(f"{prefix}.post_attention_layernorm.weight", x, f"{layer}.mlp_norm")
        gate, up = linear("mlp.gate", normed), linear("mlp.up", normed)
        gate = self("Mul", gate, self("Sigmoid", gate, to=f"{layer}.sigmoid"), to=f"{layer}.silu")
        return self("Add", x, linear("mlp.down", self("Mul", gate, up, to=f"{layer}.gated")), to=f"{layer}.out")

    def rotated(self, x: str, table: str) -> str:
        """`llama.rotate`: x * cos + (x with its halves swapped) * sin, the sines of the first half negated."""
        name = x.removesuffix(".heads")
        self("Split", x, to=f"{name}.first", axis=-1, num_outputs=2)
        self.nodes[-1].output.append(f"{name}.second")
        swapped = self("Concat", f"{name}.second", f"{name}.first", to=f"{name}.swapped", axis=-1)
        parts = [self("Mul", y, f"{table}.{f}", to=f"{name}.{f}") for y, f in ((x, "cos"), (swapped, "sin"))]
        return self("Add", *parts, to=f"{name}.rotated")


def inputs(model: Llama, ids: Tensor, layer: int = 0) -> list[dict[str, np.ndarray]]:
    """Token ids (windows, tokens) as samples of a network that starts with this layer and takes an embedding."""
    import torch

    with torch.no_grad():
        x = model.embed(ids)
        for before in range(layer):
            x = model.block(before, x)
    return [{"embedding": window.numpy()} for window in x[:, None]]


def quantize(
    network: onnx.ModelProto,
    samples: Iterable[Mapping[str, np.ndarray]],
    options: Options = W4A16,
    rules: Iterable[Rule] = (),
    blocks: tuple[Literal["plain", "LPBQ"], int] | None = None,
    calibration: Calibration | None = None,
) -> Converted:
    """`convert.quantize_network` for what `to_onnx` made, with what a Llama asks for besides.

    The head keeps 8 bits.  Masked scores are clipped so far below the smallest score that their softmax is none.  A
    16-bit Sigmoid has the encoding that QNN requires, as ONNX Runtime's ``get_qnn_qdq_config`` says.

    Parameters
    ----------
    network, samples, options, rules, calibration
        As for `quantize_network`, `SOFTMAX16` and `KV8` being such rules; the calibration with 'min_max' too.
    blocks : tuple, optional
        'plain' or 'LPBQ', and how many neighbouring inputs of a linear layer of the blocks share a scale.
    """
    samples, bits, wide = list(samples), options.weight_bw, Grid(options.act_bw)
    if calibration is None:
        methods = sorted({"min_max", options.act_quantizer_calibration.replace("-", "_")})
        calibration = calibrate(network, samples, methods=methods, percentile=options.percentile_calibration_value)
    chosen = {}
    for name in (node.output[0] for node in network.graph.node):
        if name.endswith(".masked"):
            low, high = calibration.range(name.replace("masked", "scores"))
            chosen[name] = qparams_from_range(low - wide.bits, high, wide)
        elif name.endswith(".sigmoid") and wide.bits == 16:
            chosen[name] = QParams(wide, np.float32(2**-16), np.int32(0))
    ours = [Rule(HEAD, 8, True, "param")] if HEAD in (one.name for one in network.graph.initializer) else []
    if blocks and blocks[0] == "plain":
        ours.append(Rule("*_proj.weight", bits, True, "param", blocks[1]))
    elif blocks:
        grid = Grid(bits, signed=True, symmetric=True, block_size=(blocks[1], 1))
        chosen |= {w.name: choose_lpbq(w.values, grid) for w in graph.weights(network).values() if "_proj." in w.name}
    for name, qparams in chosen.items():
        kind = "param" if name.endswith("weight") else "activation"
        ours.append(Rule(name, wide.bits, None, kind, encoding=Encoding.from_qparams(qparams)))
    return quantize_network(network, samples, options, [*ours, *rules], calibration=calibration)


def block_qdq(model: Llama, layer: int, ids: Tensor, *options: Any, **more: Any) -> Converted:
    """One decoder block by `quantize`, calibrated on token ids (windows, tokens); `verify.verify` runs it."""
    return quantize(to_onnx(model, ids.shape[1], layers=[layer]), inputs(model, ids, layer), *options, **more)
