"""How far the ways to run a quantized network agree, code by code: simulated, in integers, by kernels, on the backend.

The float simulation (the QDQ network in ONNX Runtime, its optimizations off) is what all others are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qtools import affine, zoo
from qtools._files import replace_json
from qtools.affine import Grid
from qtools.npu import htp, integer
from qtools.ptq import fuse, graph
from qtools.ptq.convert import Options, Runner, quantize_network
from qtools.ptq.stages import Stages
from qtools.ptq.verify import on_htp

if TYPE_CHECKING:
    import onnx

TABLE = Path(__file__).resolve().parents[2] / "data/agreement.json"
ARCHES = ("v68", "v73", "v75", "v79")
SIDES = ("integer", "fixed", "kernels", *ARCHES)
"""Integers with float multipliers, with fixed-point ones (gemmlowp), ONNX Runtime's kernels, the backend."""
WIDTHS = {"w8a8": (8, 8), "w8a16": (8, 16), "w4a8": (4, 8), "w4a16": (4, 16)}
Sample = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """One tensor's codes on one side, against the simulation's.

    Parameters
    ----------
    equal_percent : float
    worst : int
        Largest distance, in codes.
    """

    equal_percent: float
    worst: int

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Agreement:
        """Compare two arrays of codes."""
        difference = np.abs(ours.astype(np.int64) - theirs)
        return cls(round(100 * float(np.mean(difference == 0)), 2), int(difference.max(initial=0)))


# -- one network -----------------------------------------------------------------------------------------------------


def codes_of(network: onnx.ModelProto) -> list[str]:
    """The code tensors of a QDQ network, in order."""
    return [node.output[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]


def on_side(
    network: onnx.ModelProto, side: str, names: Sequence[str], samples: Sequence[Sample]
) -> list[list[np.ndarray]]:
    """Some tensors of a QDQ network on one side of `SIDES`, or 'simulated', for each sample.

    Raises
    ------
    ValueError
        If the side does not take the network.
    htp.HTPUnavailable, htp.HTPRefused
        If there is no backend, or it does not take the network.
    """
    if side in ARCHES:
        return on_htp(network, names, samples, side)
    if side in ("integer", "fixed"):
        engine = integer.IntegerNetwork(network, requantize="float" if side == "integer" else "fixed")
        return [engine(sample, names=names) for sample in samples]
    run = Runner(network, names, optimized=side == "kernels")
    return [run(sample) for sample in samples]


def through(network: onnx.ModelProto, side: str, samples: Sequence[Sample]) -> dict[str, Agreement]:
    """Every code tensor of a QDQ network against the simulation, each side on its own from the input on."""
    names = codes_of(network)
    ours, theirs = (on_side(network, one, names, samples) for one in ("simulated", side))
    return {name: _joined([run[i] for run in ours], [run[i] for run in theirs]) for i, name in enumerate(names)}


def alone(network: onnx.ModelProto, side: str, samples: Sequence[Sample]) -> dict[str, Agreement]:
    """The same, but each operator by itself, given the codes that the simulation has before it.

    What differs here was born in that operator; what differs in `through` may have been handed down to it.  The codes
    of inputs, which no operator makes, are left out.
    """
    names = codes_of(network)
    stages, found = Stages(network, names), {}
    states = [dict(sample) for sample in samples]
    for index, name in enumerate(names):
        piece, given, _ = stages.model(index, index + 1)
        feeds = [{key: state[key] for key in given} for state in states]
        states = [stages.run(index, state) for state in states]
        if all(node.op_type == "QuantizeLinear" for node in piece.graph.node):
            continue  # of an input: no operator, and the backend leaves it to the CPU
        found[name] = _joined([state[name] for state in states], [r[0] for r in on_side(piece, side, [name], feeds)])
    return found


def _joined(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Agreement:
    return Agreement.of(np.concatenate([np.ravel(one) for one in ours]), np.concatenate([np.ravel(t) for t in theirs]))


# -- operators -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An operator to be compared.

    Parameters
    ----------
    name : str
    op : str
        Of ONNX.
    inputs : tuple of shapes
        Of the activations.
    weight : tuple of int
        Its shape; empty for an operator without.
    attributes : dict
    """

    name: str
    op: str
    inputs: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()

    def network(self) -> onnx.ModelProto:
        """The operator as a float network, with random weights and, where it takes one, a bias."""
        from onnx import TensorProto, helper, numpy_helper

        rng, names = np.random.default_rng(0), [f"x{i}" for i in range(len(self.inputs))]
        constants = []
        if self.op == "LayerNormalization":
            ends = rng.uniform(0.5, 1.5, self.inputs[0][-1]), rng.normal(0, 0.3, self.inputs[0][-1])
            constants = [("scale", ends[0]), ("bias", ends[1])]
        elif self.weight:
            loud = rng.uniform(0.3, 1.5, (self.weight[0], *[1] * (len(self.weight) - 1)))
            constants.append(("w", rng.normal(0, 0.5, self.weight) * loud))
            constants += [("b", rng.normal(0, 0.5, self.weight[0]))] if self.op != "MatMul" else []
        node = helper.make_node(
            self.op, [*names, *(name for name, _ in constants)], ["y"], self.op, **dict(self.attributes)
        )
        entries = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, self.inputs)]
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(self.inputs[0]))
        tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants]
        model = helper.make_graph([node], self.name, entries, [result], tensors)
        return graph.prepare(helper.make_model(model, opset_imports=[helper.make_opsetid("", graph.OPSET)]))

    def sample(self, bits: int) -> dict[str, np.ndarray]:
        """Inputs that lie on their grids, so that only the operator can make a difference."""
        rng, grid = np.random.default_rng(1), Grid(bits)
        found = {}
        for index, shape in enumerate(self.inputs):
            x = (2 * rng.standard_normal(shape)).astype(np.float32)
            found[f"x{index}"] = affine.fake_quantize(x, affine.choose_qparams(x, grid))
        return found

    def quantized(self, widths: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
        """The QDQ network of the operator, with its sample."""
        weight_bits, act_bits = WIDTHS[widths]
        sample, fine = self.sample(act_bits), weight_bits if self.weight else 8
        options = Options(act_bits, fine, use_per_channel_quantization=True, use_per_row_quantization=True)
        return quantize_network(self.network(), [sample], options).network, sample


def _case(name: str, op: str, *inputs: tuple[int, ...], weight: tuple[int, ...] = (), **attributes: Any) -> Case:
    return Case(name, op, inputs, weight, tuple(attributes.items()))


_IMAGE, _ROWS = (1, 32, 16, 16), (1, 32, 64)
CASES = (
    _case("Conv 3x3", "Conv", _IMAGE, weight=(32, 32, 3, 3), pads=[1, 1, 1, 1]),
    _case("Conv 1x1", "Conv", _IMAGE, weight=(64, 32, 1, 1)),
    _case("Conv 3x3, stride 2", "Conv", _IMAGE, weight=(32, 32, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2]),
    _case("Conv 3x3, depthwise", "Conv", _IMAGE, weight=(32, 1, 3, 3), pads=[1, 1, 1, 1], group=32),
    _case("Gemm", "Gemm", (64, 64), weight=(48, 64), transB=1),
    _case("MatMul, weights", "MatMul", _ROWS, weight=(64, 48)),
    _case("MatMul, activations", "MatMul", _ROWS, (1, 64, 32)),
    _case("Add", "Add", _IMAGE, _IMAGE),
    _case("Mul", "Mul", _IMAGE, _IMAGE),
    _case("Concat", "Concat", _IMAGE, _IMAGE, axis=1),
    _case("AveragePool 3x3", "AveragePool", _IMAGE, kernel_shape=[3, 3], strides=[2, 2]),
    _case("GlobalAveragePool", "GlobalAveragePool", (1, 256, 16, 16)),
    _case("Sigmoid", "Sigmoid", _IMAGE),
    _case("HardSigmoid", "HardSigmoid", _IMAGE, alpha=1 / 6),
    _case("HardSwish", "HardSwish", _IMAGE),
    _case("Softmax", "Softmax", _ROWS, axis=-1),
    _case("LayerNormalization", "LayerNormalization", _ROWS, axis=-1),
)


def rows() -> Iterator[tuple[Case, str]]:
    """Every operator with every pair of widths; without weights there are only two."""
    for case in CASES:
        for widths in WIDTHS:
            if case.weight or widths.startswith("w8"):
                yield case, widths


def operator(case: Case, widths: str, sides: Sequence[str] = SIDES) -> dict[str, dict[str, Any]]:
    """One operator on all sides: by side, the fields of `Agreement`, or why it was refused."""
    network, sample = case.quantized(widths)
    output, found = codes_of(network)[-1], {}
    for side in sides:
        try:
            found[side] = vars(through(network, side, [sample])[output])
        except htp.HTPRefused as refused:
            found[side] = {"refused_by": refused.by}
    return found


# -- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A quantized network with samples, and what tells how many of them it gets right (percent)."""

    network: onnx.ModelProto
    float_network: onnx.ModelProto
    samples: list[Sample]
    right: Callable[[np.ndarray], float]


FINE = {"use_per_channel_quantization": True, "use_per_row_quantization": True}
_CLIPPED = Options(act_quantizer_calibration="percentile", percentile_calibration_value=99.999, **FINE)


def digits(variant: str, options: Options) -> Task:
    """All test digits, ninety at a time."""
    train, _, images, labels = zoo.digits()
    network = fuse.fuse(graph.prepare(zoo.digits_cnn(variant), {"input": (90, 1, 8, 8)}))
    batches = [{"input": train[start : start + 90]} for start in range(0, 270, 90)]
    done = quantize_network(network, batches, options)
    samples = [{"input": part} for part in np.split(images, len(images) // 90)]
    return Task(done.network, network, samples, lambda out: 100 * float(np.mean(out.argmax(1) == labels[: len(out)])))


def classifier(lines: int) -> Task:
    """Lines of text, upright or upside down, ten at a time."""
    calibration, (inputs, labels) = zoo.classifier_lines(100, 999)[0], zoo.classifier_lines(lines, 1234)
    network = fuse.fuse(graph.prepare(zoo.direction_classifier(), {"x": (10, 3, 48, 192)}))
    done = quantize_network(network, ({"x": part} for part in np.split(calibration, 10)), _CLIPPED)
    samples = [{"x": part} for part in np.split(inputs, lines // 10)]
    return Task(done.network, network, samples, lambda out: 100 * float(np.mean(out.argmax(1) == labels[: len(out)])))


def recognizer(lines: int) -> Task:
    """Lines of text, letter by letter."""
    calibration, (inputs, texts) = zoo.recognizer_lines(50, 999)[0], zoo.recognizer_lines(lines, 1234)
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}))
    done = quantize_network(network, ({"x": line[None]} for line in calibration), _CLIPPED)
    alphabet = zoo.characters(zoo.text_recognizer())

    def right(out: np.ndarray) -> float:
        return zoo.exact_match(zoo.decode(out, alphabet), texts)

    return Task(done.network, network, [{"x": line[None]} for line in inputs], right)


TASKS: dict[str, Callable[[], Task]] = {
    "digits, w8a8": partial(digits, "mini", Options(**FINE)),
    "digits, w8a16": partial(digits, "mini", Options(act_bw=16, **FINE)),
    "digits, w4a8": partial(digits, "mini", Options(weight_bw=4, **FINE)),
    "skewed digits, w8a8": partial(digits, "skew", Options(**FINE)),
    "direction classifier, w8a8": partial(classifier, 20),
    "text recognizer, w8a8": partial(recognizer, 4),
}


def whole(task: Task, side: str) -> dict[str, Any]:
    """A network on one side: accuracy, how the output agrees with the simulation, and every tensor on the way."""
    names = codes_of(task.network)
    output = task.network.graph.output[0].name
    ours, theirs = (on_side(task.network, one, [output, *names], task.samples) for one in ("simulated", side))
    first, second = (np.concatenate([run[0] for run in runs]) for runs in (ours, theirs))
    depth = [_joined([run[i] for run in ours], [run[i] for run in theirs]) for i in range(1, len(names) + 1)]
    return {
        "samples": len(first),
        "right": round(task.right(second), 2),
        "simulated_right": round(task.right(first), 2),
        "same_argmax": round(100 * float(np.mean(first.argmax(-1) == second.argmax(-1))), 2),
        "depth": {name.removesuffix(".codes"): [a.equal_percent, a.worst] for name, a in zip(names, depth)},
    }


# -- the table -------------------------------------------------------------------------------------------------------


def table(progress: bool = False) -> dict[str, Any]:
    """Every operator and network on every side; some minutes.

    Returns
    -------
    dict
        ``with`` (versions), ``operators`` (name, widths, side) and ``networks`` (name, side).

    Raises
    ------
    htp.HTPUnavailable
        If there is no backend.
    """
    import onnxruntime
    from tqdm import tqdm

    if not htp.status().available:
        raise htp.HTPUnavailable(f"no HTP backend: {htp.status().reason}")
    found: dict[str, Any] = {"with": f"{htp.status().reason}, onnxruntime {onnxruntime.__version__}"}
    found |= {"operators": {}, "networks": {}}
    for case, widths in tqdm(list(rows()), "operators", disable=not progress):
        found["operators"].setdefault(case.name, {})[widths] = operator(case, widths)
    for name, make in tqdm(TASKS.items(), "networks", disable=not progress):
        task = make()
        found["networks"][name] = {side: whole(task, side) for side in SIDES}
    return found


def recorded() -> dict[str, Any]:
    """The committed table, as ``qtools agreement --write`` last made it."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def write(content: Mapping[str, Any]) -> None:
    """Renew the committed table."""
    replace_json(TABLE, content)


def show(content: Mapping[str, Any]) -> str:
    """The table in words: share of equal codes and, behind it, the largest distance."""
    lines = [f"{'operator':22}{'':7}" + "".join(f"{side:>12}" for side in SIDES)]
    for name, by_width in content["operators"].items():
        for widths, sides in by_width.items():
            lines.append(f"{name:22}{widths:7}" + "".join(f"{_cell(sides[side]):>12}" for side in SIDES))
    lines += ["", f"{'network':29}" + "".join(f"{side:>12}" for side in SIDES)]
    for name, sides in content["networks"].items():
        simulated = sides["integer"]["simulated_right"]
        for what, label in (("right", f"right (simulated {simulated:.1f})"), ("same_argmax", "same answer")):
            lines.append(f"{name + ':':29}" + "".join(f"{sides[side][what]:>12.1f}" for side in SIDES) + f"  {label}")
    return "\n".join([*lines, "", "equal codes (%) and the largest distance, against the simulation; -: refused"])


def _cell(fields: Mapping[str, Any]) -> str:
    return "-" if "refused_by" in fields else f"{fields['equal_percent']:.1f} {fields['worst']:>3}"
