"""Networks that compute the same from weights that are easier to quantize, and biases that undo a mean error.

All networks are prepared and fused (see `graph.prepare`, `fuse.fuse`), and the one given stays as it was.  Samples are
what `calibrate` takes; each counts the same.  Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019 (arXiv:1906.04721).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qtools.ptq import fuse, graph
from qtools.ptq.calibrate import Network
from qtools.ptq.stages import Stages

if TYPE_CHECKING:
    import onnx

_RELUS_AND_POOLS = ("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_DEAD = 2.0**-23  # of the largest weight: what float32 loses beside it
Samples = Iterable[Any]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Equalized:
    """A network, the pairs of layers that were equalized, and in a sentence why any other layer is the second of none.

    `replaced`: by result, how far the samples exceed the bound of every Clip that became a Relu; NaN without samples.
    """

    network: onnx.ModelProto
    pairs: list[Pair]
    skipped: dict[str, str]
    replaced: dict[str, float]
    sweeps: int


@dataclass(frozen=True)
class Shifted:
    """A network with other biases; by node, what was added to them, and in a sentence why nothing was."""

    network: onnx.ModelProto
    shifts: Arrays
    skipped: dict[str, str]


def equalize(
    network: onnx.ModelProto, *, relu6: str = "keep", samples: Samples = (), iterations: int = 1000
) -> Equalized:
    """Rescale the channels between layers so that the weights before and behind have the same ranges (section 4.1).

    Channel i is divided by ``s = sqrt(r1 / r2)`` in the first layer and multiplied by it in the second, where r1 and r2
    are the largest magnitudes of its weights there; around a depthwise convolution the ranges of all three layers
    become their geometric mean in one step, as in AIMET.  This goes on from the first layer to the last until no range
    moves by more than a millionth.  A channel with next to no weights on one side (2^-23 of the largest) is left alone.
    Between two layers may stand Relu, LeakyRelu, PRelu, pools, and what flattens, if no tensor is read twice.

    Parameters
    ----------
    network : ModelProto
    relu6 : {'keep', 'unreached', 'replace'}
        A Clip from 0 to b does not commute with scales.  'keep' leaves the layers around it alone; 'replace' makes a
        Relu of it, which changes the network where values are above b; 'unreached' does if none of the samples' are.
    samples : iterable
        For 'unreached', and to learn what 'replace' costs.
    iterations : int
        At most so many sweeps; AIMET does one.

    Raises
    ------
    ValueError
        If a setting is another one, a weight is NaN or infinite, or the samples do not fit the network.
    """
    samples = list(samples)
    if relu6 not in ("keep", "replace", "unreached" if samples else None) or not iterations >= 1:
        raise ValueError(f"relu6 is keep, replace or, given samples, unreached, not {relu6!r}; iterations are above 0")
    net, pairs, replaced = _Net(network), [], {}
    seen = _moments(net, samples) if samples else {}
    for pair in net.pairs:
        high = seen[pair.first.name][3].max() if seen else math.nan
        over = {clip: float(np.maximum(high - bound, 0)) for clip, bound in pair.clips}
        kept = [clip for clip, by in over.items() if relu6 == "keep" or (relu6 == "unreached" and by > 0)]
        if why := pair.shared or (kept and f"the bound of the Clip {kept[0]!r} before it does not scale with channels"):
            net.skip(pair.second, why)
        else:
            pairs.append(pair)
            replaced |= over
    sweeps = _balance(pairs, iterations)
    for clip in map(net.view.makers.get, replaced):
        clip.op_type, clip.input[:] = "Relu", clip.input[:1]
    return Equalized(net.written(), pairs, net.skipped, replaced, sweeps)


def absorb_high_biases(network: onnx.ModelProto, samples: Samples, *, deviations: float | None = 3.0) -> Shifted:
    """Move what a Relu lets through for nearly every value into the bias of the layer behind it (section 4.1.3).

    ``relu(y) = relu(y - c) + c`` wherever ``y >= c``: the first bias loses c, the second gains W c.  Where zeros are
    padded, c would have to be, and where a Clip stands, its bound would have to move: both are skipped.

    Parameters
    ----------
    network : ModelProto
    samples : iterable
    deviations : float or None
        ``c = max(0, mean - deviations * std)`` of what the samples give a channel ahead of its Relu; the paper takes 3,
        and the statistics from BatchNorms.  None: ``c = max(0, smallest value)``, no result of the samples changes.

    Raises
    ------
    ValueError
        If a weight is NaN or infinite, `deviations` is negative, or the samples do not fit the network.
    """
    if deviations is not None and not deviations >= 0:
        raise ValueError(f"deviations must be 0 or more, or None; got {deviations!r}")
    moments, shifts = _moments(net := _Net(network), samples), {}
    for pair in net.pairs:
        uneven = pair.pads or pair.clips or pair.second.node.op_type == "ConvTranspose"
        if why := pair.shared or ("c would not come through everywhere alike" if uneven else ""):
            net.skip(pair.second, why)
            continue
        mean, std, low, _ = moments[pair.first.name]
        excess = np.maximum(low if deviations is None else mean - deviations * std, 0)
        shifts[pair.first.name] = shifts.get(pair.first.name, 0) - excess
        shifts[pair.second.name] = shifts.get(pair.second.name, 0) + pair.second.response(pair.spread(excess))
    return net.shifted(shifts)


def correct_biases(
    network: onnx.ModelProto, weights: Arrays, samples: Samples, *, analytical: bool = False, progress: bool = False
) -> Shifted:
    """Change biases so that quantized weights give every channel the mean that the float ones give (section 4.2).

    Empirical (appendix D): both networks run on the samples, and from the first layer to the last each bias takes up
    the difference of the means, those before it corrected.  Analytical: every shift is ``(W - W_q) E[x]``, which takes
    one run of the float network and knows neither borders nor what quantized layers before do to x.  E[x] is measured;
    the paper, which has no samples, takes the mean of a clipped normal distribution.  The network returned has the
    float weights still, with biases that suit the quantized ones.

    Parameters
    ----------
    network : ModelProto
    weights : mapping of str to ndarray
        By initializer, as they will be: quantized and dequantized.
    samples : iterable
    analytical : bool
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ValueError
        If weights or samples do not fit the network.
    """
    net, new = _Net(network), _Net(graph.replace_weights(network, weights))
    net.skipped = {name: why for name, why in net.skipped.items() if name not in net.layers}
    layers = [layer for layer in net.layers.values() if layer.weight.name in weights]
    if not analytical:
        return net.shifted(_mean_differences(net, new, layers, samples, progress))
    means: dict[str, list[np.ndarray]] = {layer.name: [] for layer in layers}
    for values in _watched(net, [layer.node.input[0] for layer in layers], samples, progress):
        for layer in layers:
            means[layer.name].append(layer.rows(values[layer.node.input[0]]).mean(1))
    both = [{name: one.layers[name].response(np.mean(x, axis=0)) for name, x in means.items()} for one in (net, new)]
    return net.shifted({name: both[0][name] - both[1][name] for name in means})


# -- networks as chains of layers ------------------------------------------------------------------------------------


@dataclass(repr=False)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul; `blocks` are its weights by group, output, input, place in the kernel."""

    node: onnx.NodeProto
    weight: graph.Weight
    bias: np.ndarray
    slot: str  # the constant that holds the bias, if there is one
    axis: int  # of the channels in what it reads and makes
    end: str  # what it makes, bias included

    def __post_init__(self) -> None:
        rows, groups = self.weight.rows.astype(np.float64), graph.attribute(self.node, "group", 1)
        self.inputs = groups * np.delete(self.weight.values.shape, self.weight.channel_axis)[0]
        self.blocks, self.name = rows.reshape(groups, len(rows) // groups, self.inputs // groups, -1), self.node.name

    def ranges(self, axis: int) -> np.ndarray:  # the largest magnitudes by output (axis 2) or by input (axis 1)
        return np.abs(self.blocks).max(axis=(axis, 3)).ravel()

    def response(self, x: np.ndarray) -> np.ndarray:
        """What it makes on average, less its bias, of inputs that are each the same at all places."""
        strides = graph.attribute(self.node, "strides", ()) if self.node.op_type == "ConvTranspose" else ()
        return np.einsum("goip,gi->go", self.blocks, x.reshape(len(self.blocks), -1)).ravel() / math.prod(strides)

    def rows(self, values: np.ndarray) -> np.ndarray:
        """What it made or read, one row for each channel."""
        return np.moveaxis(values, self.axis, 0).reshape(values.shape[self.axis], -1).astype(np.float64)


@dataclass(repr=False)
class Pair:
    """Two layers with nothing between them but operators that let factors of single channels through.

    The outputs of the first were divided by `factors`, the inputs of the second multiplied; `before`: the old `ranges`.
    """

    first: Layer
    second: Layer
    between: tuple[str, ...]
    clips: list[tuple[str, float]]  # their results and bounds
    pads: bool  # between, or in the second
    shared: str  # why the tensors between may not change, if so

    def __post_init__(self) -> None:
        self.factors, self.before = np.ones(len(self.first.bias)), self.ranges()

    def spread(self, x: np.ndarray) -> np.ndarray:
        """From one number a channel to one an input of the second: a picture's places were laid out in a row."""
        return np.repeat(x, self.second.inputs // x.size)

    def ranges(self) -> np.ndarray:
        """The largest magnitudes of the weights that make a channel, and of those that read it; (2, channels)."""
        return np.stack([self.first.ranges(2), self.second.ranges(1).reshape(len(self.first.bias), -1).max(axis=1)])

    def divide(self, factors: np.ndarray) -> None:
        self.factors, self.first.bias = self.factors * factors, self.first.bias / factors
        self.first.blocks /= factors.reshape(*self.first.blocks.shape[:2], 1, 1)
        self.second.blocks *= self.spread(factors).reshape(len(self.second.blocks), 1, -1, 1)


class _Net:
    """A copy of a network, its layers by node, and its pairs, in the order of their second layers."""

    def __init__(self, network: onnx.ModelProto) -> None:
        self.view = fuse.View(graph.copy_of(network))
        nodes = {node.name: node for node in self.view.nodes}
        found = {name: self._layer(nodes[name], weight) for name, weight in graph.weights(network).items()}
        self.layers = {name: layer for name, layer in found.items() if layer is not None}
        why = "its weights or biases are shared, or it is no plain operator with a bias"
        self.skipped = {name: f"{name}: {why}" for name in found if name not in self.layers}
        self._ends = {layer.end: layer for layer in self.layers.values()}
        self.pairs = list(filter(None, map(self._pair, self.layers.values())))

    def skip(self, layer: Layer, why: str) -> None:
        self.skipped[layer.name] = f"{layer.name}: {why}"

    def _layer(self, node: onnx.NodeProto, weight: graph.Weight) -> Layer | None:
        view, axis, end, slot = self.view, 1, node.output[0], [*node.input[2:], ""][0]
        if not np.isfinite(weight.values).all():
            raise ValueError(f"the weights of {node.name!r} hold NaN or infinity")
        if not fuse.foldable(view, node) or graph.attribute(node, "transA", 0):
            return None
        if node.op_type == "MatMul":
            add, axis = view.only_reader(end), len(view.shapes.get(end, ())) - 1
            if weight.values.ndim > 2 or axis < 1 or add is None or add.op_type != "Add" or not view.arithmetic(add):
                return None
            end, slot = add.output[0], next(name for name in add.input if name != end)
        bias = view.value(slot) if slot else np.zeros(1)
        if node.op_type in ("MatMul", "Gemm"):
            bias = fuse.per_channel(view, bias, node)
        if bias is None or (slot and view.only_reader(slot) is None):
            return None
        return Layer(node, weight, np.broadcast_to(bias, len(weight.rows)).astype(np.float64), slot, axis, end)

    def _pair(self, second: Layer) -> Pair | None:
        names, between, clips = [second.node.input[0]], [], []
        while names[-1] not in self._ends:
            node = self.view.makers.get(names[-1])
            if node is None:
                return self.skip(second, "it reads an input of the network")
            if not self._lets_through(node, clips):
                return self.skip(second, f"the {node.op_type} {node.output[0]!r} before it lets no factors through")
            between.insert(0, node)
            names.append(node.input[0])
        first = self._ends[names[-1]]
        if first.axis != second.axis or (first.axis > 1 and any("Pool" in node.op_type for node in between)):
            return self.skip(second, f"its inputs are not the channels of {first.name!r}")
        pads = any(fuse.pads(node) for node in (*between, second.node) if node.op_type != "MaxPool")
        shared = [name for name in names if self.view.only_reader(name) is None]
        why = f"{shared[0]!r} on the way to it is an output, or not read once" if shared else ""
        return Pair(first, second, tuple(node.op_type for node in between), clips, pads, why)

    def _lets_through(self, node: onnx.NodeProto, clips: list[tuple[str, float]]) -> bool:
        if node.op_type == "Clip":
            low, high = map(self.view.scalar, [*node.input[1:], "", ""][:2])
            clips.append((node.output[0], high))
            return low == 0 and high is not None
        if node.op_type in ("Flatten", "Reshape", "Squeeze"):  # certainly lays all behind the first axis in a row
            old, new = (self.view.shapes.get(name, [0, 0]) for name in (node.input[0], node.output[0]))
            return all(old[1:]) and new == [old[0], math.prod(old[1:])]
        return node.op_type in _RELUS_AND_POOLS

    def shifted(self, shifts: Arrays) -> Shifted:
        for name, shift in shifts.items():
            self.layers[name].bias = self.layers[name].bias + shift
        return Shifted(self.written(), shifts, self.skipped)

    def written(self) -> onnx.ModelProto:
        """The network with the weights and biases that the layers have now."""
        for layer in self.layers.values():
            rows = layer.blocks.reshape(len(layer.bias), -1)
            fuse.put(self.view, layer.weight.name, layer.weight.from_rows(rows))
            if layer.slot:
                fuse.put(self.view, layer.slot, layer.bias)
            elif layer.bias.any():
                fuse.rescale(self.view, layer.node, None, layer.bias)
        graph.drop_unused(self.view.model)
        return self.view.model


def _balance(pairs: list[Pair], iterations: int) -> int:
    """Balance all pairs until they stay as they are, those that a depthwise convolution joins in one step; sweeps."""
    runs: list[list[Pair]] = []
    for pair in pairs:
        joined = [run for run in runs if run[-1].second is pair.first and pair.first.blocks.shape[1:3] == (1, 1)]
        (joined or [runs])[0].append(pair if joined else [pair])
    sweeps, moved = 0, math.inf
    while sweeps < iterations and moved > 1e-6:
        sweeps, moved = sweeps + 1, 0.0
        for run in runs:
            ranges = np.stack([*(pair.first.ranges(2) for pair in run), run[-1].ranges()[1]])
            alive = (ranges > _DEAD * ranges.max(axis=1, keepdims=True)).all(axis=0)
            logs = np.log(np.where(alive, ranges, 1))
            apart = logs - logs.mean(axis=0)
            for pair, factors in zip(run, np.exp(np.cumsum(apart, axis=0))):
                pair.divide(factors)
            moved = max(moved, np.abs(apart).max())
    return sweeps


def _watched(net: _Net, names: Sequence[str], samples: Samples, progress: bool) -> Iterator[dict]:
    """Some tensors, sample for sample."""
    from tqdm import tqdm

    running, number = Network(net.view.model, names, 0), -1
    for number, sample in enumerate(tqdm(samples, unit=" samples", file=sys.stderr, disable=not progress)):
        values = running.run(number, sample)
        if bad := [name for name in names if not np.isfinite(values[name]).all()]:
            raise ValueError(f"sample {number}: the tensor {bad[0]!r} holds NaN or infinity")
        yield values
    if number < 0:
        raise ValueError("there are no samples")


def _moments(net: _Net, samples: Samples) -> dict[str, list[np.ndarray]]:
    """Mean, standard deviation, smallest and largest value of every channel that the layers make."""
    seen: dict[str, list] = {name: [] for name in net.layers}
    for values in _watched(net, [layer.end for layer in net.layers.values()], samples, False):
        for name, layer in net.layers.items():
            rows = layer.rows(values[layer.end])
            seen[name].append([rows.mean(1), np.square(rows).mean(1), rows.min(1), rows.max(1)])
    for name, each in seen.items():
        means, squares, lows, highs = np.swapaxes(each, 0, 1)
        std = np.sqrt(np.maximum(squares.mean(0) - means.mean(0) ** 2, 0))
        seen[name] = [means.mean(0), std, lows.min(0), highs.max(0)]
    return seen


def _mean_differences(net: _Net, new: _Net, layers: list[Layer], samples: Samples, progress: bool) -> Arrays:
    """What the biases of a quantized network lack, layer by layer."""
    from tqdm import tqdm

    inputs = [entry.name for entry in net.view.model.graph.input if entry.name not in net.view.constants]
    stages = [Stages(each.view.model, [layer.node.output[0] for layer in layers]) for each in (net, new)]
    states, shifts = [list(_watched(net, inputs, samples, False))] * 2, {}
    for piece, layer in enumerate(tqdm(layers, unit=" layers", file=sys.stderr, disable=not progress)):
        cut = layer.node.output[0]
        states = [[network.run(piece, state) for state in each] for network, each in zip(stages, states)]
        mean, now = (np.mean([layer.rows(state[cut]).mean(1) for state in each], axis=0) for each in states)
        shifts[layer.name] = mean - now
        for made in [np.moveaxis(state[cut], layer.axis, -1) for state in states[1]]:
            made += shifts[layer.name]  # in place
    return shifts
