"""What the type of each tensor does to a network's outputs: measured, or guessed.

`sensitivity` changes the type of one tensor at a time, or of a few together, and runs what is behind it; `proxy` looks
at the rounding of the tensor alone, on a few samples.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qtools._files import replace_file
from qtools.affine import LPBQ, QParams, fake_quantize
from qtools.encodings import Encoding, Rule
from qtools.ptq.calibrate import Calibration
from qtools.ptq.convert import Options, quantize_network
from qtools.ptq.fuse import View
from qtools.ptq.graph import replace_weights
from qtools.ptq.stages import Stages, State
from qtools.ptq.write import quantized_tensors, write_qdq

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

_DEFAULTS = Options()
FLOAT = 32
"""The width of a tensor that is left float."""
Types = dict[str, int]
"""Bits by tensor; those not named are float."""
Candidates = dict[str, dict[int, QParams | LPBQ]]
Metric = Callable[[dict[str, np.ndarray], np.ndarray], float]
"""From the outputs for some samples, joined along axis 0, and the numbers of these samples; higher is better."""
Direction = Literal["one_quantized", "one_spared"]
_BATCH = 256  # samples that run together where a network takes batches
_SESSIONS = 3  # for what is behind a change, kept at a time


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What the type of each tensor, or of a few together, does to the outputs.

    Parameters
    ----------
    units : tuple of tuple of str
        The tensors whose type changed together; mostly one.
    kinds : tuple of {'activation', 'weight'}
    bits : tuple of int
        The types tried.
    losses : ndarray of shape (units, bits, subsets)
        What of the metric the change costs, NaN where it was not tried; without a metric that of `noise`.
    noise : ndarray of the same shape
        What the change adds to the noise power of the outputs, as a share of their power.
    direction : {'one_quantized', 'one_spared'}
    rerun : float
        Operators that ran, as a share of those that run where every change means the whole network.
    """

    units: tuple[tuple[str, ...], ...]
    kinds: tuple[str, ...]
    bits: tuple[int, ...]
    losses: np.ndarray
    noise: np.ndarray
    direction: Direction
    rerun: float

    @property
    def names(self) -> tuple[str, ...]:
        """The first tensor of each unit."""
        return tuple(unit[0] for unit in self.units)

    @property
    def mean(self) -> np.ndarray:
        """Losses of shape (units, bits)."""
        return self.losses.mean(2)

    @property
    def spread(self) -> np.ndarray:
        """Standard deviation of the losses from subset to subset; NaN if there is but one."""
        several = self.losses.shape[2] > 1
        return self.losses.std(2, ddof=1) if several else np.full(self.losses.shape[:2], np.nan)

    @property
    def gains(self) -> np.ndarray:
        """What most bits save over fewest, of shape (units, 2): in the metric, and in noise."""
        order = np.argsort(self.bits)
        means = np.stack([self.losses, self.noise])[:, :, order].mean(3)
        tried = ~np.isnan(means)
        few, most = tried.argmax(2, keepdims=True), means.shape[2] - 1 - tried[:, :, ::-1].argmax(2, keepdims=True)
        return (np.take_along_axis(means, few, 2) - np.take_along_axis(means, most, 2))[:, :, 0].T

    def ranking(self) -> list[str]:
        """The names, those first that gain most by more bits; the noise decides between equals."""
        return [self.names[i] for i in np.lexsort(-self.gains.T[::-1])]


# -- measuring -------------------------------------------------------------------------------------------------------


def sensitivity(
    network: onnx.ModelProto,
    samples: Sequence[Any],
    calibration: Calibration | Sequence[Calibration],
    metric: Metric | None = None,
    *,
    options: Options = _DEFAULTS,
    direction: Direction = "one_quantized",
    bits: Sequence[int] = (4, 8, 16),
    weight_bits: Sequence[int] | None = None,
    base: int | Mapping[str, int] = 8,
    units: Sequence[Sequence[str] | str] | None = None,
    subsets: int = 4,
    threads: int = 1,
    resume: Path | str | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Change the type of one tensor at a time and measure what that does to the outputs.

    The numbers are those of the loop that writes and runs the whole network for each change.  But what lies before a
    change runs once: the states of all samples walk through the network, and only what is behind a tensor runs for
    each of its types.  The changes are cut into joblib tasks: ``joblib.parallel_config`` says where these run.  A
    constant that is no weight (of an Add, a Mul) has the type of what is computed with it.

    Parameters
    ----------
    network : ModelProto
        Prepared and fused.
    samples : sequence
        As `calibrate` takes them; sample ``i`` belongs to subset ``i % subsets``.
    calibration : Calibration, or one for each subset
    metric : `Metric`, optional
    options : Options
        How encodings are chosen.
    direction : {'one_quantized', 'one_spared'}
        All other tensors float; or all others of the type `base`, and this one of more bits, fewer, or float.
    bits, weight_bits : sequence of int
        The types to try: 4, 8, 16 or `FLOAT`; by default the same for weights.
    base : int or mapping of str to int
        For 'one_spared': one type for all tensors, or one each.
    units : sequence of (sequence of) str, optional
        The tensors whose type changes, together or alone; by default every activation and weight of
        `quantized_tensors` that has a type of its own.
    subsets : int
        How many values each number gets, for its spread.
    threads : int
        Of a session.
    resume : path, optional
        A JSON file that keeps what has been measured: a second call goes on where the first one ended.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ValueError
        If a name, a type, a sample or a calibration does not fit, the network branches (If, Loop), the metric is not
        finite, or `resume` holds other measurements.

    References
    ----------
    M. Nagel et al., A White Paper on Neural Network Quantization, 2021, section 3.7, for both directions.
    """
    calibrations = [calibration] if isinstance(calibration, Calibration) else list(calibration)
    if not 1 <= subsets <= len(samples) or len(calibrations) not in (1, subsets):
        counts = f"{len(samples)} samples and {len(calibrations)} calibrations"
        raise ValueError(f"each subset needs a sample, and all one calibration or each its own: {counts} for {subsets}")
    chosen, types = _units(network, units, direction, base)
    by_kind = {"activation": tuple(bits), "weight": tuple(bits if weight_bits is None else weight_bits)}
    members = [np.arange(len(samples))[i::subsets] for i in range(subsets)]
    parts = [members] if len(calibrations) == 1 else [[part] for part in members]
    tables = []
    for number, (one, part) in enumerate(zip(calibrations, parts)):
        path = None if resume is None else Path(resume) if len(parts) == 1 else Path(f"{resume}.{number}")
        encodings = candidates(network, one, options, {*bits, *by_kind["weight"], *types.values()})
        feeds = [_feeds(network, [samples[i] for i in which]) for which in part]
        work = _Work(network, encodings, feeds, part, chosen, types, threads, metric)
        tables.append(_table(work, by_kind, direction, path, progress))
    joined = {name: np.concatenate([getattr(t, name) for t in tables], axis=2) for name in ("losses", "noise")}
    return replace(tables[0], **joined, rerun=float(np.mean([table.rerun for table in tables])))


@dataclass
class _Work:
    """The changes to measure, and all that this takes."""

    network: onnx.ModelProto
    candidates: Candidates
    feeds: list[list[State]]  # by subset
    members: list[np.ndarray]  # the numbers of the samples, by subset
    units: tuple[tuple[str, ...], ...]
    base: Types
    threads: int
    metric: Metric | None = None
    reals: list[State] = field(default_factory=list)  # what the float network gives, by subset

    def types(self, unit: int, bits: int) -> Types:
        return self.base | dict.fromkeys(self.units[unit], bits)

    @property
    def kinds(self) -> tuple[str, ...]:
        weights = quantized_tensors(self.network).weights
        return tuple("weight" if unit[0] in weights else "activation" for unit in self.units)

    def measured(self, walk: _Walk, changes: list[Change]) -> list[Row]:
        """A row for each change; they come in the order in which they begin."""
        rows = []
        for start, stop, unit, bits in changes:
            given = walk.changed(start, stop, self.types(unit, bits), walk.to(start))
            rows.append(self.row(given, f"with {self.units[unit][0]} of {bits} bits"))
        return rows

    def row(self, given: list[State], where: str) -> Row:
        row = []
        for got, real, which in zip(given, self.reals, self.members):
            value = float(self.metric(got, which)) if self.metric else 0.0
            if not np.isfinite(value):
                raise ValueError(f"the metric is {value} {where}: it must be a finite number")
            row.append((value, _noise(got, real)))
        return row

    def fingerprint(self, changes: list[Change]) -> str:
        feeds = [x.tobytes() for subset in self.feeds for state in subset for x in state.values()]
        chosen = repr((self.units, self.base, changes, self.candidates, getattr(self.metric, "__qualname__", None)))
        content = self.network.SerializeToString(deterministic=True)
        return hashlib.sha256(b"".join([content, chosen.encode(), *feeds])).hexdigest()


Change = tuple[int, int, int, int]
"""From the first piece that reads what changes to where all that read it have run; unit; bits."""
Row = list[tuple[float, float]]
"""Metric and noise of each subset."""


def _noise(got: State, real: State) -> float:
    floats = [name for name, x in real.items() if x.dtype.kind == "f"]
    power = sum(_power(real[name]) for name in floats)
    return sum(_power(got[name] - real[name]) for name in floats) / power if power else 0.0


def _units(
    network: onnx.ModelProto, units: Sequence[Sequence[str] | str] | None, direction: str, base: int | Mapping[str, int]
) -> tuple[tuple[tuple[str, ...], ...], Types]:
    tensors = quantized_tensors(network)
    known = dict.fromkeys([*tensors.activations.values(), *tensors.weights])
    chosen = tuple((unit,) if isinstance(unit, str) else tuple(unit) for unit in (known if units is None else units))
    types = {} if direction == "one_quantized" else dict.fromkeys(known, base) if isinstance(base, int) else {**base}
    if unknown := [name for name in (*(name for unit in chosen for name in unit), *types) if name not in known]:
        raise ValueError(f"the network has no activation or weight {unknown[0]!r} with a type of its own")
    return chosen, types


def candidates(
    network: onnx.ModelProto, calibration: Calibration, options: Options, bits: Collection[int]
) -> Candidates:
    """The encodings that the converter chooses for each activation, weight and constant, by name and bits."""
    if wrong := [width for width in bits if width not in (4, 8, 16, FLOAT)]:
        raise ValueError(f"a type has 4, 8 or 16 bits, or {FLOAT} for float, got {wrong[0]!r}")
    axes, found = quantized_tensors(network).weights, {}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in network.graph.initializer}
    as_float = Rule("*", FLOAT, None, "activation", None, Encoding(FLOAT))
    for width in sorted(set(bits) - {FLOAT}):
        # Weights beside float activations, for a bias can change their scales.
        for rules in ([Rule("*", width, None, "activation")], [as_float, Rule("*", width, None, "param")]):
            chosen = quantize_network(network, (), options, rules, calibration=calibration).encodings
            for name, encoding in (chosen.params if len(rules) == 2 else chosen.activations).items():
                found.setdefault(name, {})[width] = encoding.qparams(shapes.get(name, ()), axes.get(name))
    return found


def _feeds(network: onnx.ModelProto, samples: Sequence[Any]) -> list[State]:
    """Samples as the network takes them, joined where it takes any number at once."""
    inputs, feeds = {entry.name: entry.type.tensor_type.shape.dim for entry in network.graph.input}, []
    for sample in samples:
        feed = dict(sample) if isinstance(sample, Mapping) else dict.fromkeys(list(inputs)[:1], sample)
        if set(feed) != set(inputs) or not all(np.isfinite(x).all() for x in feed.values()):
            raise ValueError(f"a sample must hold finite numbers for {', '.join(inputs)}, got {', '.join(feed)}")
        feeds.append({name: np.ascontiguousarray(feed[name]) for name in inputs})
    if any(not dims or dims[0].dim_value for dims in inputs.values()):
        return feeds
    parts = [feeds[i : i + _BATCH] for i in range(0, len(feeds), _BATCH)]
    return [{name: np.concatenate([feed[name] for feed in part]) for name in inputs} for part in parts]


class _Walk:
    """The states of all samples on their way through a network in pieces, which is written with types put in."""

    def __init__(self, work: _Work, piece: int = 0, states: list[list[State]] | None = None) -> None:
        view, self._work, self._kept = View(work.network), work, {}
        if view.branched:
            raise ValueError("the network branches (If, Loop, Scan): what is behind a tensor cannot be cut out of it")
        self.tensors, self.owners = quantized_tensors(work.network), owners(work.network)
        self._ends = [output.name for output in work.network.graph.output]
        order = {name: number for number, node in enumerate(view.nodes) for name in node.output}
        cuts = sorted({root for root in self.tensors.activations.values() if root in order}, key=order.__getitem__)
        self.stages, self.piece = Stages(work.network, cuts), piece
        self.states = work.feeds if states is None else states

    def spans(self) -> dict[str, list[int]]:
        """The pieces that each tensor (or what was only moved of it) concerns; a cut, the one behind it at least."""
        spans = {entry.name: [0] for entry in self._work.network.graph.input}
        spans |= {cut: [piece] for piece, cut in enumerate(self.stages.cuts, 1)}
        for piece in range(len(self.stages)):
            model, given, _ = self.stages.model(piece, piece + 1)
            for name in (*given, *(tensor.name for tensor in model.graph.initializer)):
                spans.setdefault(self.tensors.activations.get(name, name), []).append(piece)
        for name in self._ends:
            spans.setdefault(self.tensors.activations.get(name, name), []).append(len(self.stages) - 1)
        return spans

    def behind(self, pieces: Collection[int]) -> int:
        """Where these pieces have run; one of few places, so that what is behind needs few sessions."""
        block = math.isqrt(len(self.stages))
        return min(len(self.stages), (max(pieces) // block + 1) * block)

    def full(self, types: Types) -> Types:
        """Types with those of the constants that are no weights."""
        return types | {name: max(types.get(root, FLOAT) for root in roots) for name, roots in self.owners.items()}

    def changes(self, bits: Mapping[str, Sequence[int]]) -> list[Change]:
        spans, work, found = self.spans(), self._work, []
        before = self.full(work.base)
        for unit, kind in enumerate(work.kinds):
            for width in bits[kind]:
                after = self.full(work.types(unit, width))
                changed = [name for name in after if after[name] != before.get(name, FLOAT)]
                pieces = [piece for name in changed for piece in spans[name]]
                found += [(min(pieces), self.behind(pieces), unit, width)] if pieces else []
        return sorted(found)

    def to(self, piece: int) -> list[list[State]]:
        """Walk on, with the types of the base."""
        if piece > self.piece:
            self.states = self.advanced(self.piece, piece, self._work.base, self.states)
            self.piece = piece
        return self.states

    def changed(
        self, piece: int, to: int, types: Types, states: list[list[State]], weights: State | None = None
    ) -> list[State]:
        """What the network gives with other types, or weights, from `piece` up to, and not with, piece `to`."""
        if to == len(self.stages):
            return self.outputs(piece, types, states, weights)
        return self.outputs(to, self._work.base, self.advanced(piece, to, types, states, weights))

    def advanced(
        self, piece: int, to: int, types: Types, states: list[list[State]], weights: State | None = None
    ) -> list[list[State]]:
        """The states ahead of piece `to`."""
        model, given, found = self._written(piece, to, types)
        model = replace_weights(model, weights) if weights else model
        session, needed = _session(model, self._work.threads), self.stages.needed(to)
        found = [name for name in found if name in needed]

        def step(state: State) -> State:
            kept = {name: x for name, x in state.items() if name in needed}
            return kept | dict(zip(found, session.run(found, {name: state[name] for name in given})))

        return [[step(state) for state in subset] for subset in states]

    def outputs(self, piece: int, types: Types, states: list[list[State]], weights: State | None = None) -> list[State]:
        """What the network gives for each subset, from the states ahead of `piece` on."""
        key = piece, *types.items()
        if weights or key not in self._kept:
            model, given, found = self._written(piece, len(self.stages), types)
            model = replace_weights(model, weights) if weights else model
            kept = _session(model, self._work.threads) if found else None, given, found
            if not weights:
                self._kept = dict([*self._kept.items(), (key, kept)][-_SESSIONS:])
        else:
            kept = self._kept[key]
        session, given, found = kept
        done = []
        for subset in states:
            parts = [{n: self.rounded(n, s[n], types) for n in self._ends if n not in found} for s in subset]
            for state, part in zip(subset, parts if session else ()):
                part.update(zip(found, session.run(found, {name: state[name] for name in given})))
            done.append({name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in self._ends})
        return done

    def rounded(self, name: str, x: np.ndarray, types: Types) -> np.ndarray:
        bits = types.get(self.tensors.activations.get(name, name), FLOAT)
        return x if bits == FLOAT else fake_quantize(x, self._work.candidates[name][bits])

    def _written(self, piece: int, to: int, types: Types) -> tuple[onnx.ModelProto, list[str], list[str]]:
        """Some pieces with their encodings; the cut where they end stays as computed: its type may be on trial."""
        model, given, found = self.stages.model(piece, to)
        types, roots, end = self.full(types), self.tensors.activations, None
        if to < len(self.stages):
            end = self.stages.cuts[to - 1]
        else:
            found = [name for name in found if name in self._ends]
            kept = [entry for entry in model.graph.output if entry.name in found]
            del model.graph.output[:]
            model.graph.output.extend(kept)
        inside = [*(tensor.name for tensor in model.graph.initializer), *given]
        inside += [name for node in model.graph.node for name in node.output if name != end]
        typed = {name: types[roots.get(name, name)] for name in inside if roots.get(name, name) in types}
        chosen = {name: self._work.candidates[name][bits] for name, bits in typed.items() if bits != FLOAT}
        activations = {name: chosen.pop(name) for name in [*chosen] if name in roots}
        return write_qdq(model, activations, chosen, self.tensors) if activations or chosen else model, given, found


def _session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def owners(network: onnx.ModelProto) -> dict[str, list[str]]:
    """The constants that are no weights, each with the activations that are computed with it."""
    view, tensors = View(network), quantized_tensors(network)
    made = {name: [gives(view, node, tensors.activations) for node in view.readers[name]] for name in tensors.constants}
    found = {name: [tensors.activations[tensor] for tensor in given if tensor] for name, given in made.items()}
    return {name: roots for name, roots in found.items() if roots}


def gives(view: View, node: onnx.NodeProto, activations: Mapping[str, str]) -> str | None:
    """The tensor with an encoding that an operator gives, after those that run as one with it."""
    name = node.output[0]
    while name not in activations and (after := view.only_reader(name)) is not None:
        name = after.output[0]
    return name if name in activations else None


def _table(
    work: _Work, by_kind: Mapping[str, Sequence[int]], direction: Direction, path: Path | None, progress: bool
) -> Sensitivity:
    """Run what has not been run, here or where joblib is told to."""
    import joblib
    from tqdm import tqdm

    walk = _Walk(work)
    changes, bits = walk.changes(by_kind), tuple(dict.fromkeys((*by_kind["activation"], *by_kind["weight"])))
    work.reals = walk.outputs(0, {}, work.feeds)
    parts = np.array_split(np.arange(len(changes)), max(2, min(48, len(changes) // 4)))
    tasks = {str(number): [changes[i] for i in part] for number, part in enumerate(parts) if len(part)}
    fingerprint = work.fingerprint(changes) if path else ""
    done = _kept(path, fingerprint)
    left = {number: part for number, part in tasks.items() if number not in done}
    if joblib.effective_n_jobs(None) == 1:
        results = ((number, work.measured(walk, part)) for number, part in left.items())
    else:
        results = joblib.Parallel(return_as="generator_unordered")(_calls(work, walk, left))
    for number, rows in tqdm(results, "measuring", len(tasks), initial=len(done), disable=not progress):
        done[number] = rows
        if path:
            replace_file(path, json.dumps({"fingerprint": fingerprint, "tasks": done}).encode())
    given = walk.outputs(walk.piece, work.base, walk.states) if work.base else work.reals
    base = work.row(given, "before any change")
    rows = {(unit, width): base for unit, kind in enumerate(work.kinds) for width in by_kind[kind]}
    rows |= {change[2:]: row for number, part in tasks.items() for change, row in zip(part, done[number])}
    untried = np.full((len(base), 2), np.nan)
    values = np.array([[rows.get((unit, width), untried) for width in bits] for unit in range(len(work.units))])
    values = np.moveaxis(values, 3, 0) - np.array(base).T[:, None, None]
    sizes, runs = walk.stages.sizes, len(changes) + 1 + bool(work.base)
    share = (2 + sum(sum(sizes[change[0] :]) for change in changes) / sum(sizes)) / runs
    losses = -values[0] if work.metric else values[1]
    return Sensitivity(work.units, work.kinds, bits, losses, values[1], direction, share)


def _calls(work: _Work, walk: _Walk, tasks: Mapping[str, list[Change]]) -> Iterator[Any]:
    import joblib

    # Single arrays: joblib gives them to local workers without a copy, and to Dask's once.
    metric, work = work.metric, replace(work, metric=None, feeds=[])
    whole = np.frombuffer(pickle.dumps(work), np.uint8)
    for number, changes in tasks.items():
        states = np.frombuffer(pickle.dumps(walk.to(changes[0][0])), np.uint8)
        yield joblib.delayed(_task)(number, whole, metric, states, changes)


def _task(
    number: str, whole: np.ndarray, metric: Metric | None, states: np.ndarray, changes: list[Change]
) -> tuple[str, list[Row]]:
    work = replace(pickle.loads(whole), metric=metric)
    walk = _Walk(work, changes[0][0], pickle.loads(states))
    return number, work.measured(walk, changes)


def _kept(path: Path | None, fingerprint: str) -> dict[str, list[Row]]:
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kept, tasks = content["fingerprint"], content["tasks"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no measurements, or is damaged: remove it to begin anew") from None
    if kept != fingerprint:
        raise ValueError(f"{path} holds measurements of another network, other samples or options: remove it first")
    return tasks


# -- guessing --------------------------------------------------------------------------------------------------------


def proxy(
    network: onnx.ModelProto,
    samples: Sequence[Any],
    calibration: Calibration,
    kind: Literal["local", "hessian"] = "hessian",
    *,
    options: Options = _DEFAULTS,
    bits: Sequence[int] = (4, 8, 16),
    units: Sequence[Sequence[str] | str] | None = None,
    threads: int = 1,
    progress: bool = False,
) -> Sensitivity:
    """Guess the noise that `sensitivity` finds where all others are float; no type is tried, a few samples do.

    Parameters
    ----------
    kind : {'local', 'hessian'}
        The noise of a tensor's own rounding as a share of its power; or the same noise times what a small random
        change of the tensor does to the outputs (a finite difference, one direction a sample: the trace of JᵀJ, the
        Gauss-Newton Hessian of the squared error), as a share of the power of the outputs.
    network, samples, calibration, options, bits, units, threads, progress
        As for `sensitivity`; each sample is a subset of its own.

    References
    ----------
    Z. Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks, NeurIPS 2020.
    """
    from onnx import numpy_helper
    from tqdm import tqdm

    chosen, _ = _units(network, units, "one_quantized", 0)
    feeds = [_feeds(network, [sample]) for sample in samples]
    work = _Work(network, candidates(network, calibration, options, bits), feeds, [], chosen, {}, threads)
    walk, rng, found = _Walk(work), np.random.default_rng(0), {}
    reals, spans = walk.outputs(0, {}, feeds), walk.spans()
    weights = {t.name: numpy_helper.to_array(t) for t in network.graph.initializer if t.name in walk.tensors.weights}
    names = sorted({name for unit in chosen for name in unit}, key=lambda name: (spans[name][0], name))
    for name in tqdm(names, "guessing", disable=not progress):
        start, stop = min(spans[name]), walk.behind(spans[name])
        states = walk.to(start)
        values = [weights[name]] * len(states) if name in weights else [state[name] for (state,) in states]
        errors = np.array([[_power(x - walk.rounded(name, x, {name: width})) for x in values] for width in bits])
        if kind == "local":
            found[name] = errors / np.maximum([_power(x) for x in values], 1e-30)
            continue
        size = 1e-2 * np.sqrt(np.mean([np.square(x).mean() for x in values])) + 1e-12
        moves = [
            (size * rng.standard_normal(x.shape)).astype(x.dtype) for x in values[: 1 if name in weights else None]
        ]
        if name in weights:
            given = walk.changed(start, stop, {}, states, {name: weights[name] + moves[0]})
        else:
            moved = [[state | {name: state[name] + move}] for (state,), move in zip(states, moves)]
            given = walk.changed(start, stop, {}, moved)
        answers = np.array([_noise(got, real) for got, real in zip(given, reals)])
        found[name] = errors * answers / np.array([_power(move) for move in moves])
    noise = np.array([sum(found[name] for name in unit) for unit in chosen])
    return Sensitivity(chosen, work.kinds, tuple(bits), noise, noise, "one_quantized", 0.0)


def _power(x: np.ndarray) -> float:
    return float(np.square(x, dtype=np.float64).sum())
