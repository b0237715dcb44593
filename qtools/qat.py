"""Quantization-aware training: a torch network is trained with the rounding that it will get on the phone.

`QuantSim` puts a fake quantizer behind every tensor that the quantized network will round, and nowhere else: it writes
the model as ONNX once, lets `write.quantized_tensors` decide there, and finds each tensor's place in the torch model by
its name (torch.fx).  What is trained is therefore what `QuantSim.export` writes.  This module is torch throughout.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils.parametrize import register_parametrization

from qtools import encodings as files
from qtools._files import replace_file
from qtools.affine import Grid, QParams, blocks_of, choose_qparams
from qtools.observers import OBSERVERS, Observer
from qtools.ptq.convert import Converted
from qtools.ptq.fuse import View, claim, fuse, with_shapes
from qtools.ptq.graph import drop_unused, prepare, replace_weights, set_nodes
from qtools.ptq.write import Supergroup, fit_biases, quantized_tensors, write_qdq

if TYPE_CHECKING:
    import onnx

Where = Path | str
Inputs = Tensor | tuple[Tensor, ...]
CONFIG = Path(__file__).resolve().parents[1] / "data/qnn_config.json"
_CONTAINER = 8  # bits of the smallest activation of the HTP
_KNOWN = re.compile(
    r"/(defaults/(ops/is_(output_quantized|symmetric)|params/is_(quantized|symmetric)|strict_symmetric"
    r"|per_channel_quantization)|op_type/\w+/(is_(output_quantized|symmetric)|per_channel_quantization)"
    r"|(op_type/\w+/)?params/weight/is_(quantized|symmetric)|model_input/is_input_quantized)=(True|False)"
    r"|/(params/bias/is_quantized|defaults/unsigned_symmetric)=False"
    r"|/(defaults/hw_version|supergroup_pass_list|op_type/\w+/encoding_constraints/\w+)=.*"  # changes nothing
)


class FakeQuantize(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale``, with gradients for `x` and `scale`.

    Rounding counts as the identity: the gradient passes straight through to `x`, but where its code is clamped (Bengio,
    Léonard and Courville 2013, section 3).  The scale's is ``round(x / s) - x / s``, or the code where that is clamped,
    times `gain` (Esser et al., Learned Step Size Quantization, ICLR 2020, equation 3 and section 2.2).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, gain: float) -> Tensor:
        ratio = x / scale
        rounded = ratio.round()
        codes = rounded.clamp(low, high)
        ctx.save_for_backward(ratio, codes, codes == rounded, scale)
        ctx.gain = gain
        return codes * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, codes, inside, scale = ctx.saved_tensors
        slope = torch.where(inside, codes - ratio, codes) if ctx.needs_input_grad[1] else None
        grad_scale = None if slope is None else (grad * slope).sum_to_size(scale.shape) * ctx.gain
        return grad * inside, grad_scale, None, None, None


class Quantizer(nn.Module):
    """The fake quantizer of one tensor: a layer behind an activation, or the parametrization of a weight.

    Its codes are those of the grid less the zero point, which is calibrated and stays: `last` codes above `low`.
    `name` is the tensor's in ONNX, `method` one of `observers.OBSERVERS`; only a weight has a `shape`.
    """

    def __init__(self, name: str, grid: Grid, method: str, learned: bool, shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.name, self.grid, self.method, self.is_weight = name, grid, method, shape is not None
        counts = [count for count, _ in blocks_of(shape or (), grid.block_size)]
        self.scale = nn.Parameter(torch.full(counts, torch.nan), requires_grad=learned)
        self.register_buffer("low", torch.zeros(counts))
        self.register_buffer("last", torch.tensor(float(grid.qmax - grid.qmin)))
        self.observer: Observer | None = None
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid; while the ranges are sought, `x` itself."""
        if self.observer is not None:
            if not self.is_weight or self.observer.shape is None:  # once is enough
                self.observer.update(x.detach())
            return x
        features = x.numel() / (self.scale.numel() if self.is_weight else max(len(x), 1))
        return FakeQuantize.apply(x, self.step, self.low, self.low + self.last, (features * self.grid.qmax) ** -0.5)

    @property
    def step(self) -> Tensor:
        """The scale; training may have turned its sign."""
        if not self.ready:
            raise ValueError(f"the quantizer of {self.name!r} has no range yet: call compute_encodings first")
        return self.scale.abs()

    @torch.no_grad()
    def take(self, qparams: QParams) -> None:
        """Set scale and zero point."""
        self.scale.copy_(torch.as_tensor(qparams.scale))
        self.low.copy_(torch.as_tensor(self.grid.qmin - qparams.zero_point))
        self.ready = True

    def qparams(self) -> QParams:
        """Grid, scale and zero point in a container of 4, 8 or 16 bits; of an activation 8 or 16."""
        bits = max(self.grid.bits, 4 if self.is_weight else _CONTAINER)
        symmetric = self.grid.symmetric and (self.grid.signed or bits == self.grid.bits)
        grid = replace(self.grid, bits=bits, symmetric=symmetric, narrow_range=False)
        zero_point = (self.grid.qmin - self.low).cpu().numpy().astype(np.int32)
        return QParams(grid, self.step.detach().cpu().numpy(), zero_point)


class BiasQuantizer(nn.Module):
    """The parametrization of a bias: an int32 at the scale of its accumulator, that of the input times the weight's."""

    def __init__(self, source: Quantizer, weight: Quantizer) -> None:
        super().__init__()
        self._both = source, weight  # in a tuple, so that they are modules of their own places only

    def forward(self, bias: Tensor) -> Tensor:
        """`bias`, rounded; the gradient passes straight through."""
        source, weight = self._both
        if source.observer is not None:
            return bias
        step = (source.step * weight.step).detach().flatten()
        step = step.repeat(bias.shape[-1] // len(step))  # the groups of a ConvTranspose share the scales
        return FakeQuantize.apply(bias, step, -torch.inf, torch.inf, 1.0)


class QuantSim:
    """A copy of a torch network that computes with the rounding of its quantized self, to be trained.

    BatchNorms are folded into what stands before them.  What the code decides by ``self.training`` is decided as in
    eval mode; Dropout modules stay.  A ValueError in one sentence refuses control flow that depends on data, parameters
    used twice, BatchNorms that cannot be folded, methods that work in place, Linear on more than two axes
    (ONNX transposes its weights), and functions of torch that ONNX writes as several operators, which round between.

    `model` is a torch.fx.GraphModule, to be trained in any loop, whose parameters are the weights and the scales;
    `quantizers` has them by the tensors' names in ONNX.

    Parameters
    ----------
    model : torch.nn.Module
    example : Tensor or tuple of Tensor
        Inputs; the first axis is that of the batch.
    config : path, optional
        Like AIMET's ``config_file``; by default, and for a ``qnn_config.json`` that is not there, the one in ``data``.
        Its hw_version, encoding_constraints and supergroup_pass_list change nothing.
    weight_bits, act_bits : int
        2, 3, 4 or 8; 4, 8 or 16.
    weight_scheme, act_scheme : str
        How `compute_encodings` chooses ranges, see `observers.OBSERVERS`; 'sqnr' is AIMET's tf_enhanced.
    per_channel : bool, optional
        A scale for each output channel of weights; by default as the configuration says.
    learned : bool
        Learn the scales like the weights (LSQ); otherwise they stay as calibrated.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        config: Where | None = None,
        *,
        weight_bits: int = 8,
        act_bits: int = 8,
        weight_scheme: str = "min-max",
        act_scheme: str = "min-max",
        per_channel: bool | None = None,
        learned: bool = True,
    ) -> None:
        schemes = [scheme.replace("-", "_") for scheme in (weight_scheme, act_scheme)]
        if weight_bits not in (2, 3, 4, 8) or act_bits not in (4, 8, 16) or not {*schemes} <= {*OBSERVERS}:
            allowed = f"weights have 2, 3, 4 or 8 bits, activations 4, 8 or 16; schemes are {', '.join(OBSERVERS)}"
            raise ValueError(f"{allowed}; got {weight_bits}, {act_bits}, {weight_scheme!r}, {act_scheme!r}")
        self.quantizers: dict[str, Quantizer] = {}
        self._flags, self._groups = _config(config)
        example = example if isinstance(example, tuple) else (example,)
        self.model = _traced(model, example)
        self._network, places = _network(self.model, example)
        self._owners = _owners(self.model, self._network)
        tensors, view = quantized_tensors(self._network, self._groups), View(self._network)
        for name in dict.fromkeys(tensors.activations.values()):
            grid = self._activation(view.makers[name].op_type if name in view.makers else None, act_bits)
            if grid is not None:
                self._insert(places, Quantizer(name, grid, schemes[1], learned))
        self.model.recompile()
        for name in (*tensors.weights, *tensors.constants):
            op, values, axis = view.readers[name][0].op_type, view.value(name), tensors.weights.get(name)
            wide = Grid(max(act_bits, _CONTAINER))
            grid = wide if axis is None else self._weight(op, weight_bits, values.ndim, axis, per_channel)
            if name not in self._owners and values.size > 1:
                raise ValueError(f"the model computes with the constant {name!r}: make it a parameter")
            if name in self._owners and grid is not None:
                self.quantizers[name] = Quantizer(name, grid, schemes[0], learned, values.shape)
                register_parametrization(*self._owners[name], self.quantizers[name], unsafe=True)
        for name, (source, weight) in tensors.biases.items():
            both = [self.quantizers.get(key) for key in (tensors.activations.get(source), weight)]
            if all(both):
                register_parametrization(*self._owners[name], BiasQuantizer(*both), unsafe=True)
        self.model.train(model.training)

    def _insert(self, places: Mapping[str, Node], quantizer: Quantizer) -> None:
        """Put the quantizer of an activation behind the node that makes it."""
        if (name := quantizer.name) not in places:
            raise ValueError(f"a function of torch is several operators in ONNX, which round between them, at {name!r}")
        node, path = places[name], f"quantizers.{places[name].name}"
        self.quantizers[name] = quantizer
        self.model.add_submodule(path, quantizer)
        with self.model.graph.inserting_after(node):
            behind = self.model.graph.call_module(path, (node,))
        node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)

    def _activation(self, op: str | None, bits: int) -> Grid | None:
        """The grid of what an operator gives out, or for None of an input; None for a float."""
        both = f"/op_type/{op}", "/defaults/ops"
        asked = self._flag("is_output_quantized", *both) if op else self._flag("is_input_quantized", "/model_input")
        return Grid(bits, symmetric=self._flag("is_symmetric", *both)) if asked else None

    def _weight(self, op: str, bits: int, rank: int, axis: int, per_channel: bool | None) -> Grid | None:
        """The grid of an operator's weights; None for floats."""
        places = (f"/op_type/{op}/params/weight", "/params/weight", "/defaults/params")
        symmetric = self._flag("is_symmetric", *places)
        if per_channel is None:
            per_channel = self._flag("per_channel_quantization", f"/op_type/{op}", "/defaults")
        blocks = tuple(1 if per_channel and i == axis else -1 for i in range(rank))
        grid = Grid(bits, symmetric, symmetric, symmetric and self._flag("strict_symmetric", "/defaults"), blocks)
        return grid if self._flag("is_quantized", *places) else None

    def _flag(self, key: str, *places: str) -> bool:
        """What the configuration says in the first of these places that it has."""
        said = [str(self._flags[f"{place}/{key}"]) for place in places if f"{place}/{key}" in self._flags]
        return said[:1] == ["True"]

    def compute_encodings(self, forward_pass_callback: Callable, forward_pass_callback_args: Any = None) -> None:
        """Choose all ranges: of weights from the weights, of activations from what passes, all in float.

        The callback is called with `model`, in eval mode, and `forward_pass_callback_args`; it runs the model on some
        batches.  If a tensor gets no data, or NaN or infinity, that is a ValueError, and the ranges stay as they were.
        """
        training, every = self.model.training, self.quantizers.values()
        try:
            for one in every:
                one.observer = OBSERVERS[one.method](block_size=one.grid.block_size)
            with torch.no_grad():
                forward_pass_callback(self.model.eval(), forward_pass_callback_args)
            if unseen := [one.name for one in every if one.observer.shape is None]:
                raise ValueError(f"no data reached {unseen[0]!r}: the callback has to run the model")
            for one, qparams in [(one, one.observer.qparams(one.grid)) for one in every]:
                one.take(qparams)
        finally:
            for one in every:
                one.observer = None
            self.model.train(training)

    def calibrate(self, batches: Iterable[Inputs]) -> None:
        """`compute_encodings` with batches of inputs."""
        self.compute_encodings(lambda model, _: [model(*(x if isinstance(x, tuple) else (x,))) for x in batches])

    def freeze(self) -> QuantSim:
        """Learn no scale from now on; returns itself."""
        for quantizer in self.quantizers.values():
            quantizer.scale.requires_grad_(False)
        return self

    @torch.no_grad()
    def export(self, path: Where | None = None, filename_prefix: str = "model", dummy_input: Any = None) -> Converted:
        """The network as it is now: in float, with its encodings, and with QuantizeLinear and DequantizeLinear nodes.

        The float network holds rounded weights, so that 2 and 3 bits fit into a container of 4.  Activations of 4 bits
        get one of 8, the HTP's smallest, and a Min that ends at their highest code; it reads what is on the same grid.

        With `path`, a folder, ``PREFIX.onnx`` (in float) and ``PREFIX.encodings`` (1.0.0) are written; `dummy_input` is
        what programs for AIMET pass, and not needed.
        """
        chosen = {name: quantizer.qparams() for name, quantizer in self.quantizers.items()}
        values = {name: getattr(*owner).detach().cpu().numpy() for name, owner in self._owners.items()}
        network = replace_weights(self._network, values)
        chosen |= {new: chosen[name] for new, name in _limit(network, self.quantizers.values()).items()}
        tensors, view = quantized_tensors(network := with_shapes(network), self._groups), View(network)
        activations = {name: chosen[root] for name, root in tensors.activations.items() if root in chosen}
        params = {name: choose_qparams(view.value(name), Grid(_CONTAINER)) for name in tensors.constants}
        params |= {name: chosen[name] for name in (*tensors.weights, *tensors.constants) if name in chosen}
        for _ in range(2):  # a channel that the first rounds to zero, for the sake of its bias, has a free scale then
            params = fit_biases(network, activations, params, tensors)
        sides = [dict.fromkeys(names, files.Encoding(32)) for names in (tensors.activations, tensors.weights)]
        for side, found in zip(sides, (activations, params)):
            side.update((name, files.Encoding.from_qparams(qparams)) for name, qparams in found.items())
        made = write_qdq(network, activations, params, tensors)
        converted = Converted(network, made, files.Encodings(*sides), tensors)
        if path is not None:
            converted.files = [Path(path) / f"{filename_prefix}{ending}" for ending in (".onnx", ".encodings")]
            replace_file(converted.files[0], network.SerializeToString())
            files.write(converted.encodings, converted.files[1])
        return converted

    def save(self, path: Where) -> None:
        """Write weights and ranges, as they are trained, as a safetensors file."""
        replace_file(Path(path), save({key: part.contiguous() for key, part in self.model.state_dict().items()}))

    def load(self, path: Where) -> QuantSim:
        """Read what `save` wrote of the same network at the same widths, or raise ValueError; returns itself."""
        own, shapes = self.model.state_dict(), lambda state: {key: part.shape for key, part in state.items()}
        with _said(f"{path} holds no such simulation"):
            state = load(Path(path).read_bytes())
            if shapes(state) != shapes(own) or any(state[key] != own[key] for key in own if key.endswith(".last")):
                raise ValueError("it is of another network, or of other widths or granularities")
        self.model.load_state_dict(state)
        for quantizer in self.quantizers.values():
            quantizer.ready = bool(quantizer.scale.isfinite().all())
        return self


def QuantizationSimModel(
    model: nn.Module,
    dummy_input: Inputs,
    quant_scheme: str = "tf_enhanced",
    default_output_bw: int = 8,
    default_param_bw: int = 8,
    config_file: Where | None = None,
) -> QuantSim:
    """A `QuantSim` by the names that AIMET gives its arguments.

    `quant_scheme` is 'tf' (or 'min_max'), 'tf_enhanced' or 'percentile', with or without 'post_training_' before it;
    the scales are learned.
    """
    name = str(quant_scheme).removeprefix("post_training_")
    scheme = {"tf": "min_max", "tf_enhanced": "sqnr"}.get(name, name)
    bits = {"weight_bits": default_param_bw, "act_bits": default_output_bw}
    return QuantSim(model, dummy_input, config_file, **bits, weight_scheme=scheme, act_scheme=scheme)


def _config(path: Where | None) -> tuple[dict[str, str], list[Supergroup]]:
    """The flags of a configuration by their paths in it, and its supergroups, BatchNormalization left out."""
    path = CONFIG if path is None or (str(path) == CONFIG.name and not Path(path).exists()) else Path(path)
    with _said(f"{path} is not a configuration"):
        flags = json.loads(path.read_bytes(), object_hook=_flat)
        groups = [group["/op_list"] for group in flags.pop("/supergroups", [])]
        groups = [tuple(op for op in group if op != "BatchNormalization") for group in groups]  # that is folded
        if unknown := [f"{key}={flag}" for key, flag in flags.items() if not _KNOWN.fullmatch(f"{key}={flag}")]:
            raise ValueError(f"it has {unknown[0]}")
    return flags, [group for group in groups if len(group) > 1]


def _flat(found: dict[str, Any]) -> dict[str, Any]:
    """An object whose objects are flat: the leaves by their paths."""
    parts = {key: part if isinstance(part, dict) else {"": part} for key, part in found.items()}
    return {f"/{key}{path}": leaf for key, part in parts.items() for path, leaf in part.items()}


def _traced(model: nn.Module, example: tuple[Tensor, ...]) -> GraphModule:
    """A copy of the model as a graph, in eval mode, its BatchNorms folded, with the type of every tensor."""
    model = copy.deepcopy(model).eval()
    with _said("torch.fx cannot trace this model"):
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for node in traced.graph.nodes:
        module = traced.get_submodule(node.target) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", node.target)
        if (node.op == "call_method" and name.endswith("_")) or name in ("relu_", "leaky_relu_"):
            raise ValueError(f"the model changes a tensor in place by {name!r}: use the function without underscore")
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "inplace"}
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            before = node.args[0]
            with _said(f"the BatchNorm {node.target!r} follows no convolution or Linear of its own"):
                layer = traced.get_submodule(before.target) if len(before.users) == 1 else None
                fold = nn.utils.fuse_linear_bn_eval if isinstance(layer, nn.Linear) else nn.utils.fuse_conv_bn_eval
                folded = fold(layer, module, **({"transpose": True} if "Transpose" in type(layer).__name__ else {}))
            # A bias that only the fold brings would not be trained.
            traced.set_submodule(before.target, folded.requires_grad_(layer.weight.requires_grad))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    for module in [module for module in traced.modules() if hasattr(module, "inplace")]:
        module.inplace = False
    with _said("the model does not run on the example"), torch.no_grad():
        expected = model(*copy.deepcopy(example))
    with _said("the model, as torch.fx traces it, does not compute the same"), torch.no_grad():
        torch.testing.assert_close(ShapeProp(traced).propagate(*example), expected, rtol=1e-3, atol=1e-3)
    return traced


def _network(traced: GraphModule, example: tuple[Tensor, ...]) -> tuple[onnx.ModelProto, dict[str, Node]]:
    """The model in ONNX, prepared and fused, and its float tensors by their names there; they get those of modules."""
    import onnx

    places, taken = {}, set()
    for node in traced.graph.nodes:
        kind = getattr(node.meta.get("tensor_meta"), "dtype", None)
        if node.op not in ("get_attr", "output") and kind is torch.float32:
            own = node.op in ("placeholder", "call_module") and not node.target.isdigit()
            places[claim(node.target if own else node.name, taken)] = node
    inputs = [node.target for node in traced.graph.nodes if node.op == "placeholder"]
    made = {name: node for name, node in places.items() if node.op != "placeholder"}
    output, content = next(node for node in traced.graph.nodes if node.op == "output"), io.BytesIO()
    given, wanted = output.args, set(output.all_input_nodes)
    names = dict(input_names=inputs, output_names=list(made), dynamic_axes={name: {0: "N"} for name in inputs})
    output.args = (tuple(made.values()),)  # what is an output gets a name
    traced.recompile()
    with _said("torch cannot write this model as an ONNX network of float32"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter, up to opset 20, announces one that needs another package
        torch.onnx.export(traced, example, content, opset_version=20, dynamo=False, **names)
    output.args = given
    model = onnx.load_model_from_string(content.getvalue())
    outputs = [entry for entry in model.graph.output if made[entry.name] in wanted]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    return fuse(prepare(model)), places


def _owners(traced: GraphModule, network: onnx.ModelProto) -> dict[str, tuple[nn.Module, str]]:
    """Where every parameter lies: module and attribute; all of them must come to ONNX as they are, and be read once."""
    view, owners = View(network), {}
    for name, parameter in traced.named_parameters():
        if name not in view.constants or not np.array_equal(view.value(name), parameter.detach().cpu().numpy()):
            raise ValueError(f"the parameter {name!r} does not come to ONNX as it is, but folded or transposed")
        if len(view.readers[name]) > 1:
            raise ValueError(f"the parameter {name!r} is used twice: give each layer its own")
        path, _, key = name.rpartition(".")
        owners[name] = traced.get_submodule(path), key
    return owners


def _limit(model: onnx.ModelProto, quantizers: Iterable[Quantizer]) -> dict[str, str]:
    """Keep activations at or below their highest code, in place; returns new tensors, with those they came of.

    That is done by a Min, which stands alone: behind a convolution or a product the execution provider of the HTP
    (onnxruntime-qnn 2.7.0) translates no Clip that ends below the last code of the container, ReLU6 neither.
    """
    from onnx import helper, numpy_helper

    view, new = View(model), {}
    nodes = {id(None): [], **{id(node): [node] for node in view.nodes}}
    for one in (one for one in quantizers if not one.is_weight):
        source = target = one.name
        maker, last = view.makers.get(target), ((one.low + one.last) * one.step).item()
        ends = [view.scalar(name) for name in maker.input[1:]] if maker is not None and maker.op_type == "Clip" else []
        clips = ends[:1] == [0.0] and None not in ends
        high = min([last, *ends[1:]]) if clips else last
        if one.grid.bits >= _CONTAINER and high == last:
            continue
        if maker is None:  # an input keeps its name
            new[target := view.fresh(f"{source}.limited")] = source
            for reader in view.readers[source]:
                reader.input[:] = [target if name == source else name for name in reader.input]
        else:
            new[source := view.fresh(f"{target}.wide")] = target
            maker.output[:] = [source if name == target else name for name in maker.output]
        if clips:
            maker.op_type = "Relu"
            del maker.input[1:]
        limit = view.fresh(f"{target}.max")
        model.graph.initializer.append(numpy_helper.from_array(np.float32(high), limit))
        nodes[id(maker)].append(helper.make_node("Min", [source, limit], [target], name=f"{target}.min"))
    set_nodes(model, [node for part in nodes.values() for node in part])
    drop_unused(model)
    return new


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Put an error, of whatever type, into a sentence."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
