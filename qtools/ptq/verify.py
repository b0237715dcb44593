"""A quantized network four times over: in floats, simulated, in integers, on the HTP backend; where they part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from qtools.metrics import sqnr_db
from qtools.npu import capabilities, htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import graph
from qtools.ptq.convert import Runner, in_words, kinds

if TYPE_CHECKING:
    import onnx

_AT_ONCE = 64  # tensors that one graph on the backend gives out; with a few hundred it fails to run
_NAMED = 4  # nodes, before the rest is only counted


@dataclass
class Layer:
    """One tensor's codes, simulated and in integers or on the backend.

    Parameters
    ----------
    name : str
    equal_percent : float
        Share of equal codes.
    worst : int
        Largest distance.
    """

    name: str
    equal_percent: float
    worst: int


@dataclass
class Verification:
    """What `verify` found.

    Parameters
    ----------
    outputs : list of dict
        For each output: name, SQNR against float of the simulation, the integers and the backend, SQNR of the latter
        two against the simulation (dB), and how often the largest entry is the same one (percent); None for a side
        that does not run.
    integers : list of Layer
        Every tensor in the order of the network, computed in integers, if they suffice for it.
    layers : list of Layer
        The same on the backend, if it took the network.
    refused : dict of str to str
        Architecture to the nodes that the backend refuses there, and why.
    samples : int
    reason : str
        Why there is no backend, if there is none.
    integer_reason : str
        Why the network was not computed in integers, if it was not.
    """

    outputs: list[dict[str, Any]] = field(default_factory=list)
    integers: list[Layer] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    samples: int = 0
    reason: str = ""
    integer_reason: str = ""

    @property
    def parts_at(self) -> Layer | None:
        """The first tensor of which a code on the backend is more than one from the simulated."""
        return next((layer for layer in self.layers if layer.worst > 1), None)


def verify(
    network: onnx.ModelProto,
    samples: Iterable[Mapping[str, np.ndarray]],
    float_network: onnx.ModelProto | None = None,
    *,
    arch: str = "v75",
    others: Sequence[str] = (),
) -> Verification:
    """Run a quantized network on samples: simulated, in integers, on the HTP backend (emulated), beside its original.

    Parameters
    ----------
    network : ModelProto
        With QuantizeLinear and DequantizeLinear nodes and fixed shapes, as `convert` writes it.
    samples : iterable of mappings
        Input name to array.
    float_network : ModelProto, optional
        Prepared; with the same inputs and outputs.
    arch : str
        On which samples are run.
    others : sequence of str
        Architectures that are only asked whether they take it.

    Raises
    ------
    ValueError
        If the network is a float one, or there is no sample.
    """
    codes = [node.output[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]
    if not codes:
        raise ValueError("this is a float network: qtools convert makes a quantized one of it")
    samples, names = [*samples], [output.name for output in network.graph.output]
    if not samples:
        raise ValueError("there is no sample to verify with")
    _same_ends(network, float_network)
    found = Verification(reason="" if htp.status().available else htp.status().reason, samples=len(samples))
    everything = [*names, *codes]
    sides: dict[str, list[list[np.ndarray]]] = {"float": [], "simulated": _on_cpu(network, everything, samples)}
    if float_network is not None:
        sides["float"] = _on_cpu(float_network, names, samples)
    sides["integers"] = _in_integers(network, everything, samples, found)
    try:
        taken = not found.reason and _asked(network, arch, found)
        for other in others if not found.reason else ():
            _asked(network, other, found)
        sides["HTP"] = on_htp(network, everything, samples, arch) if taken else []
    except htp.HTPUnavailable as unavailable:  # installed, but it does not start
        found.reason, sides["HTP"] = str(unavailable), []
    joined = {
        side: [np.concatenate([np.atleast_1d(one) for one in parts]) for parts in zip(*runs)]
        for side, runs in sides.items()
    }
    found.outputs = [_output(name, index, joined) for index, name in enumerate(names)]
    found.integers, found.layers = (
        [
            _layer(name.removesuffix(".codes"), ours, theirs)
            for name, ours, theirs in zip(codes, joined["simulated"][len(names) :], joined[side][len(names) :])
        ]
        for side in ("integers", "HTP")
    )
    return found


def _same_ends(network: onnx.ModelProto, float_network: onnx.ModelProto | None) -> None:
    for what in ("input", "output") if float_network is not None else ():
        names, others = ({entry.name for entry in getattr(one.graph, what)} for one in (network, float_network))
        if names != others:
            raise ValueError(
                f"the float network is another one: its {what}s are {', '.join(sorted(others))}, "
                f"those of the quantized one {', '.join(sorted(names))}"
            )


def _on_cpu(
    network: onnx.ModelProto, names: Sequence[str], samples: Sequence[Mapping[str, np.ndarray]]
) -> list[list[np.ndarray]]:
    run = Runner(network, names)
    return [run(sample) for sample in samples]


def _in_integers(
    network: onnx.ModelProto, names: Sequence[str], samples: Sequence[Mapping[str, np.ndarray]], found: Verification
) -> list[list[np.ndarray]]:
    try:
        engine = IntegerNetwork(network)
    except ValueError as refused:
        found.integer_reason = str(refused)
        return []
    return [engine(sample, names=names) for sample in samples]


def on_htp(
    network: onnx.ModelProto, wanted: Sequence[str], samples: Sequence[Mapping[str, np.ndarray]], arch: str
) -> list[list[np.ndarray]]:
    """Outputs and codes of every sample on the backend, some tensors at a time: it does not give out any number."""
    from onnx import helper

    there, runs = {output.name for output in network.graph.output}, [[] for _ in samples]
    for start in range(0, len(wanted), _AT_ONCE):
        names, seen = wanted[start : start + _AT_ONCE], graph.copy_of(network)
        seen.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in there)
        opened = htp.session(seen, arch)
        for sample, run in zip(samples, runs):
            run += htp.quietly(opened.run, list(names), dict(sample))
    return runs


def _asked(network: onnx.ModelProto, arch: str, found: Verification) -> bool:
    try:
        htp.session(network, arch)
    except htp.HTPRefused as refused:
        found.refused[arch] = _why(network, refused, arch)
        return False
    return True


def _why(network: onnx.ModelProto, refused: htp.HTPRefused, arch: str) -> str:
    """Which nodes are refused, and why, as far as the table of `capabilities` knows; else in the backend's words."""
    known, table = kinds(network), capabilities.recorded()
    nodes = [re.sub(r"_token_\d+$", "", name) for name in re.findall(r"{ name: (.*?), type: \w+ }", str(refused))]
    groups: dict[str, list[str]] = {}
    for node in nodes:
        refusing = node in known and not table[known[node]][arch].accepted
        groups.setdefault(in_words(known[node]) if refusing else "", []).append(node)
    unknown = groups.pop("", [])
    said = [f"it takes no {kind}: {_listed(names)}" for kind, names in groups.items()]
    if unknown or not said:
        codes = re.findall(r"refuses (\w+ with error \d+)", str(refused))
        who = f"its library says {codes[-1]}" if codes else "its execution provider cannot translate them"
        said.append(f"{_listed(unknown)}: {who}" if unknown else str(refused))
    return "; ".join(said)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _output(name: str, index: int, joined: Mapping[str, list[np.ndarray]]) -> dict[str, Any]:
    sides = ("float", "simulated", "integers", "HTP")
    real, ours, whole, theirs = (joined[side][index] if joined[side] else None for side in sides)

    def quality(reference: np.ndarray | None, other: np.ndarray | None) -> float | None:
        return None if reference is None or other is None else sqnr_db(reference, other)

    def agreement(one: np.ndarray | None, other: np.ndarray | None) -> float | None:
        if one is None or other is None:
            return None
        return 100 * float(np.mean(one.argmax(-1) == other.argmax(-1)))

    return {
        "name": name,
        "simulated_db": quality(real, ours),
        "integer_db": quality(real, whole),
        "htp_db": quality(real, theirs),
        "integer_to_simulated_db": quality(ours, whole),
        "htp_to_simulated_db": quality(ours, theirs),
        "simulated_agreement": agreement(real, ours),
        "integer_agreement": agreement(real, whole),
        "htp_agreement": agreement(real, theirs),
        "integer_to_simulated_agreement": agreement(ours, whole),
        "htp_to_simulated_agreement": agreement(ours, theirs),
    }


def _layer(name: str, ours: np.ndarray, theirs: np.ndarray) -> Layer:
    difference = np.abs(ours.astype(np.int64) - theirs)
    return Layer(name, 100 * float(np.mean(difference == 0)), int(difference.max(initial=0)))
