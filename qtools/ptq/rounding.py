"""Rounding of weights that looks at what a layer computes, not at its weights: GPTQ, AdaRound, coordinate descent.

A layer's outputs miss those of the float network by what its own rounding does, and that of the layers before it.  The
mean square of this needs no more of the calibration data than moments: the Gram matrix of the inputs, as they come out
of the quantized layers before, and their products with the outputs of the float network.  So every layer is one
`Problem`, and every `Solver` takes a problem and returns codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qtools.affine import LPBQ, Grid, QParams, dequantize, fake_quantize
from qtools.ptq.calibrate import fingerprint
from qtools.ptq.fuse import View
from qtools.ptq.graph import replace_weights
from qtools.ptq.layers import Chain, Layer, Moments, Progress, digest, feeds, layers
from qtools.ptq.stages import State
from qtools.ptq.write import Tensors, fit_biases, quantized_tensors, write_qdq

if TYPE_CHECKING:
    import onnx

CLIPS = tuple(np.linspace(0.4, 1.1, 15).round(2).tolist())
"""Factors of scales that are worth trying."""

_SMALL = 1 << 18  # weights; below that threads of torch wait for each other longer than they work


@dataclass(frozen=True, eq=False)
class Problem:
    """The rounding of a layer as least squares: G groups of C output channels each, which share K inputs.

    A channel's weights ``w`` cost ``power - 2 w . cross + w . gram . w``, the mean square by which its outputs miss
    those that are wanted.

    Parameters
    ----------
    weight : ndarray of float64 (G, C, K)
        Of the float network.
    scale, zero_point : ndarray of float64 (G, C, K)
        Of each weight, whatever shares them.
    grid : Grid
    gram : ndarray (G, K, K)
        Mean products of the inputs with each other.
    cross : ndarray (G, C, K)
        Mean products of wanted outputs and inputs.
    power : ndarray (G, C)
        Mean squares of the wanted outputs.
    """

    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    grid: Grid
    gram: np.ndarray
    cross: np.ndarray
    power: np.ndarray

    def values(self, codes: np.ndarray) -> np.ndarray:
        """The weights that codes stand for."""
        return (codes - self.zero_point) * self.scale

    def nearest(self, weight: np.ndarray) -> np.ndarray:
        """The codes (as float64) nearest to some weights."""
        return np.clip(np.rint(weight / self.scale) + self.zero_point, self.grid.qmin, self.grid.qmax)

    def error(self, codes: np.ndarray) -> np.ndarray:
        """What codes cost, by channel (G, C); a perfect fit may come out a rounding error below zero."""
        values = self.values(codes)
        return self.power + ((values @ self.gram - 2 * self.cross) * values).sum(-1)

    @cached_property
    def target(self) -> np.ndarray:
        """The real weights that cost least (G, C, K); `gram` must be invertible."""
        return np.linalg.solve(self.gram, self.cross.mT).mT

    def damped(self, damp: float) -> Problem:
        """The same with a cost for the squared distance from `weight`: `damp` times the mean power of an input.

        `gram` is invertible then, and a few samples do not decide about many weights.
        """
        inputs = self.gram.shape[1]
        price = damp * np.trace(self.gram, axis1=1, axis2=2)[:, None, None] / inputs
        price = np.where(price > 0, price, 1.0)  # inputs that are always zero say nothing
        gram, cross = self.gram + price * np.eye(inputs), self.cross + price * self.weight
        return replace(self, gram=gram, cross=cross, power=self.power + price[..., 0] * (self.weight**2).sum(-1))

    def better(self, codes: np.ndarray) -> np.ndarray:
        """Codes as integers, but nearest rounding for the channels where that costs less."""
        nearest = self.nearest(self.weight)
        return np.where((self.error(codes) <= self.error(nearest))[..., None], codes, nearest).astype(np.int64)


Solver = Callable[[Problem], np.ndarray]
"""Takes a `Problem` whose `gram` is invertible and returns integer codes (G, C, K); its repr tells its settings."""


@dataclass(frozen=True)
class Nearest:
    """Each weight to the code nearest to it."""

    def __call__(self, problem: Problem) -> np.ndarray:
        return problem.nearest(problem.weight).astype(np.int64)


@dataclass(frozen=True)
class GPTQ:
    """One input after the other: its weights are rounded, and all later ones make up for that as well as they can.

    Parameters
    ----------
    by_power : bool
        The inputs of most power first, rather than as they come.

    References
    ----------
    E. Frantar et al., GPTQ, ICLR 2023, section 3.3; that the weights start from their least-squares target for the
    quantized inputs is from Y. Li et al., GPTAQ, ICML 2025.
    """

    by_power: bool = True

    def __call__(self, problem: Problem) -> np.ndarray:
        power = np.diagonal(problem.gram, axis1=1, axis2=2)
        order = np.argsort(-power if self.by_power else 0 * power, axis=1, kind="stable")
        gram = np.take_along_axis(np.take_along_axis(problem.gram, order[:, :, None], 1), order[:, None], 2)
        parts = (problem.target, problem.scale, problem.zero_point)
        left, scale, zero_point = (np.take_along_axis(part, order[:, None], 2) for part in parts)
        # Row k: how all later weights answer to an error in weight k, times its diagonal.
        answers = np.linalg.cholesky(np.linalg.inv(gram)).mT
        codes = np.empty_like(left)
        for k in range(codes.shape[-1]):
            code = np.rint(left[..., k] / scale[..., k]) + zero_point[..., k]
            codes[..., k] = np.clip(code, problem.grid.qmin, problem.grid.qmax)
            missed = left[..., k] - (codes[..., k] - zero_point[..., k]) * scale[..., k]
            left[..., k:] -= (missed / answers[:, k, k, None])[..., None] * answers[:, None, k, k:]
        return problem.better(np.take_along_axis(codes, np.argsort(order, axis=1)[:, None], 2))


@dataclass(frozen=True)
class Descent:
    """From the codes of another solver on, each weight in turn to its best code given all others, until none moves.

    Parameters
    ----------
    start : Solver
    sweeps : int
        At most, over all weights.

    References
    ----------
    K. Behdin et al., QuantEase, 2023, section 3.
    """

    start: Solver = GPTQ()
    sweeps: int = 20

    def __call__(self, problem: Problem) -> np.ndarray:
        codes, grid = self.start(problem).astype(np.float64), problem.grid
        slope = problem.values(codes) @ problem.gram - problem.cross  # half of it
        for _ in range(self.sweeps):
            before = codes.copy()
            for k in range(codes.shape[-1]):
                scale = problem.scale[..., k]
                best = np.rint(codes[..., k] - slope[..., k] / (problem.gram[:, k, k, None] * scale))
                step = np.clip(best, grid.qmin, grid.qmax) - codes[..., k]
                codes[..., k] += step
                moved = np.nonzero(step)  # soon few channels do
                slope[moved] += (step * scale)[moved][:, None] * problem.gram[moved[0], k]
            if np.array_equal(codes, before):
                break
        return problem.better(codes)


@dataclass(frozen=True)
class AdaRound:
    """Learns for every weight whether it goes up or down; being in between is free at first, then ever dearer.

    By way of the Gram matrix every step sees all data, and nothing is drawn at random.

    Parameters
    ----------
    iterations : int
    rate : float
        Of Adam.
    price : float
        Of a weight halfway between two codes, in what an error of one step costs in a mean weight of the channel.
    warm : float
        Share of the iterations that are free.
    beta : (float, float)
        Exponent of the price at first and at last; a high one leaves alone what is not nearly there.

    References
    ----------
    M. Nagel et al., Up or Down?, ICML 2020, section 3: all as there but for the activation function, left out here.
    """

    iterations: int = 2000
    rate: float = 0.01
    price: float = 1.0
    warm: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)

    def __call__(self, problem: Problem) -> np.ndarray:
        import torch

        unit = (np.diagonal(problem.gram, axis1=1, axis2=2)[:, None] * problem.scale**2).mean(-1, keepdims=True)
        steps, zero_point = problem.weight / problem.scale, problem.zero_point
        down, low, high = np.floor(steps), problem.grid.qmin, problem.grid.qmax
        parts = down + zero_point, problem.target / problem.scale + zero_point, problem.scale / np.sqrt(unit)
        parts = (*parts, problem.gram, np.log((steps - down + 0.1) / (1.1 - steps + down)))
        floor, target, scale, gram, free = (torch.tensor(part, dtype=torch.float32) for part in parts)
        inside = (floor >= low) & (floor < high)
        adam = torch.optim.Adam([free], self.rate, fused=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if free.numel() < _SMALL else threads)
        try:
            for iteration in range(self.iterations):
                share = free.sigmoid()
                up = (1.2 * share - 0.1).clamp_(0, 1)
                slope = (((floor + up).clamp_(low, high) - target).mul_(scale) @ gram).mul_(2 * scale)
                if (done := iteration / self.iterations - self.warm) >= 0:
                    swing = (1 + np.cos(np.pi * done / (1 - self.warm))) / 2
                    beta = self.beta[1] + (self.beta[0] - self.beta[1]) * swing
                    aside = 2 * up - 1
                    slope -= 2 * self.price * beta * aside.abs().pow_(beta - 1).copysign_(aside)
                free.grad = slope * (share - share * share) * ((up > 0) & (up < 1) & inside)
                adam.step()
        finally:
            torch.set_num_threads(threads)
        return problem.better(np.clip(down + zero_point + (free.numpy() >= 0), low, high))


# -- networks --------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """How the rounding of a layer went.

    Its outputs against those of the float network on the calibration data (dB), `before`: to nearest at the scales
    given, and `after`; the share of codes that `changed` from the nearest ones, and by how many steps at most; the
    factors of the scales (nested, or one for all).
    """

    before: float
    after: float
    changed: float
    furthest: int
    clip: list | float


class Rounded(NamedTuple):
    """New weights (float32, on their grids) and biases, the encodings with new scales, reports by node.

    `left` names the weights that keep nearest rounding, for what they are in is no `layers.Layer`.
    """

    values: State
    params: dict[str, QParams | LPBQ]
    layers: dict[str, Report]
    left: list[str]


def round_network(
    network: onnx.ModelProto,
    activations: Mapping[str, QParams],
    params: Mapping[str, QParams | LPBQ],
    samples: Iterable[Mapping[str, np.ndarray] | np.ndarray],
    solver: Solver = Descent(),
    *,
    tensors: Tensors | None = None,
    bias: bool = True,
    clips: Sequence[float] = (),
    damp: float = 0.1,
    positions: int = 512,
    state: Path | str | None = None,
    progress: bool = False,
) -> Rounded:
    """Round the weights of a network layer by layer, each for its inputs as they come out of the layers before.

    Parameters
    ----------
    network, activations, params, tensors
        As for `write.write_qdq`; weights without an encoding stay float.
    samples : iterable
        As `calibrate.calibrate` takes them; what later layers need of them stays in memory.
    solver : Solver
    bias : bool
        Also give each bias its least-squares optimum.
    clips : sequence of float
        Factors to try beforehand for the scales of each channel (of the whole weight if channels share them), such as
        `CLIPS`; the one is kept with which the best real weights, rounded to nearest, cost least.
    damp : float
        See `Problem.damped`.
    positions : int
        Of a sample's outputs that count at most, drawn at random where there are more.
    state : path, optional
        File of what is finished, from which the same call goes on after an interruption, to the same result.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ValueError
        If a sample or an encoding does not fit or holds NaN; if `state` is damaged, or that of another call.
    """
    from tqdm import tqdm

    if not (0 < damp < np.inf and positions >= 1 and all(0 < clip < np.inf for clip in clips)):
        raise ValueError(f"damp, positions and clips are finite and above 0, got {damp}, {positions} and {clips}")
    tensors, view, fed = tensors or quantized_tensors(network), View(network), feeds(network, samples)
    weights = {name: params[name] for name in tensors.weights if name in params}
    found = layers(network, weights)
    chosen = {name: _qparams(encoding) for name, encoding in {**activations, **params}.items()}
    scales = {f"{name} {one.grid}": np.stack([one.scale, one.zero_point]) for name, one in chosen.items()}
    settings = repr((solver, bias, tuple(clips), damp, positions))
    done = Progress(state, fingerprint(network), settings, digest(scales), *map(digest, fed))
    quantized = write_qdq(network, activations, {name: params[name] for name in params if name not in weights}, tensors)
    sources = {node.name: node.input[0] for node in quantized.graph.node}
    trial = {name: fake_quantize(view.value(name), _qparams(encoding)) for name, encoding in weights.items()}
    trial |= {one.bias_name: view.value(one.bias_name) for one in found if one.bias_name} | done.arrays
    seen = Chain(quantized, [sources[one.node.name] for one in found], fed, trial)
    real = Chain(network, [one.node.output[0] for one in found], fed)
    for layer in tqdm(found, "rounding", unit=" layers", file=sys.stderr, disable=not progress):
        name, weight = layer.node.name, layer.weight.name
        if len(done.notes) == len(found):
            break
        pairs = zip(seen.reach(sources[name]), real.reach(layer.node.output[0]))
        if name in done.notes:
            continue
        moments = Moments()
        for number, (x, y) in enumerate(pairs):
            moments.add(*layer.data(x, y, positions, (len(done.notes), number)))
        try:
            values, report = _solved(layer, moments, params[weight], solver, bias, clips, damp)
        except ValueError as error:
            raise ValueError(f"the layer {name!r} cannot be rounded: {error}") from None
        trial.update(values)
        done.add(name, report, values)
    reports = {name: Report(*note) for name, note in done.notes.items()}
    rounded = {one.weight.name: _scaled(params[one.weight.name], reports[one.node.name].clip) for one in found}
    params = fit_biases(replace_weights(network, done.arrays), activations, {**params, **rounded}, tensors)
    return Rounded(done.arrays, params, reports, [name for name in weights if name not in rounded])


def _solved(
    layer: Layer,
    moments: Moments,
    encoding: QParams | LPBQ,
    solver: Solver,
    bias: bool,
    clips: Sequence[float],
    damp: float,
) -> tuple[State, Report]:
    """A layer's new weights and bias, and how it went."""
    free = bias and bool(layer.bias_name)
    means = moments.without_bias(None if free else layer.bias)
    problem = _problem(layer, encoding, means)
    before, clip = problem.error(problem.nearest(problem.weight)), 1.0
    if clips:
        clip = _best_clip(layer, problem.damped(damp), _qparams(encoding).scale, clips)
        encoding = _scaled(encoding, clip)
        problem = _problem(layer, encoding, means)
    codes = solver(problem.damped(damp))
    grid, rows = problem.grid, layer.weight.rows
    in_layout = np.ascontiguousarray(layer.weight.from_rows(codes.reshape(rows.shape).astype(grid.dtype)))
    values = {layer.weight.name: dequantize(in_layout, _qparams(encoding))}
    if free:
        x, y = moments.means()[:2]
        values[layer.bias_name] = (y - (problem.values(codes) @ x[..., None])[..., 0]).ravel().astype(np.float32)
    steps = np.abs(codes - problem.nearest(problem.weight))
    sqnr = (_decibels(problem.power, error) for error in (before, problem.error(codes)))
    return values, Report(*sqnr, float((steps > 0).mean()), int(steps.max()), clip)


def _decibels(power: np.ndarray, error: np.ndarray) -> float:
    least = np.finfo(np.float64).eps * power.sum()  # what sums of float64 can tell from nothing
    return float(10 * np.log10(power.sum() / max(error.sum(), least))) if least > 0 else 0.0


def _problem(layer: Layer, encoding: QParams | LPBQ, means: Sequence[np.ndarray]) -> Problem:
    qparams = _qparams(encoding)
    parts = (layer.grouped(part, qparams.grid.block_size) for part in (qparams.scale, qparams.zero_point))
    return Problem(layer.grouped(layer.weight.values), *parts, qparams.grid, *means)


def _best_clip(layer: Layer, problem: Problem, scale: np.ndarray, clips: Sequence[float]) -> list | float:
    """For the scales of each channel the factor with which the target, rounded to nearest, costs least."""
    tried = [replace(problem, scale=problem.scale * clip) for clip in clips]
    costs = np.array([one.error(one.nearest(problem.target)).ravel() for one in tried])
    axis = layer.weight.channel_axis
    if scale.ndim != layer.weight.values.ndim or scale.shape[axis] != costs.shape[1]:
        return float(clips[costs.sum(1).argmin()])
    shape = [-1 if other == axis else 1 for other in range(scale.ndim)]
    return np.array(clips)[costs.argmin(0)].reshape(shape).tolist()


def _scaled(encoding: QParams | LPBQ, clip: list | float) -> QParams | LPBQ:
    clip = np.asarray(clip, np.float32)
    if isinstance(encoding, LPBQ):
        channel = np.asarray(encoding.channel_scale * clip, np.float32)
        return LPBQ(replace(encoding.qparams, scale=encoding.block_scale * channel), encoding.block_scale, channel)
    return replace(encoding, scale=np.asarray(encoding.scale * clip, np.float32))


def _qparams(encoding: QParams | LPBQ) -> QParams:
    return encoding.qparams if isinstance(encoding, LPBQ) else encoding
