"""Which quantized operators each Hexagon architecture takes: the HTP backend itself is asked, one small graph a time.

Every graph runs in ONNX Runtime on the CPU first, so a refusal is the backend's and never a malformed graph; and where
one encoding can be written in several ways, all are tried before it counts as refused.  A graph that is taken is run
too, and its codes compared with ONNX Runtime's: "accepted" and "right" are two questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qtools._files import replace_json
from qtools.affine import Grid, QParams, choose_and_quantize, choose_lpbq, choose_qparams, quantize
from qtools.metrics import sqnr_db
from qtools.npu import htp
from qtools.qdq import operator_model

if TYPE_CHECKING:
    import onnx

TABLE = Path(__file__).resolve().parents[2] / "data/htp_capabilities.json"
OPS = ("Conv", "MatMul", "Gemm")
WEIGHT_BITS = (4, 8, 16)
ACTIVATIONS = ("uint8", "uint16", "float32")
GRANULARITIES = ("tensor", "channel", "block 128", "block 32", "LPBQ 32")

_ROWS, _DEPTH, _CHANNELS = 16, 256, 32  # of the probe: (16, 256) times (256, 32)


@dataclass(frozen=True)
class Probe:
    """One question: does the backend take this operator, with these weights and activations?

    Parameters
    ----------
    op : {'Conv', 'MatMul', 'Gemm'}
        A Conv has a 1x1 kernel.
    weight_bits : {4, 8, 16}
        Signed, symmetric.
    activation : {'uint8', 'uint16', 'float32'}
        Type of the input and the output.
    granularity : str
        One of `GRANULARITIES`; numbers are the block size along the input channels.
    """

    op: str
    weight_bits: int
    activation: str
    granularity: str

    def __str__(self) -> str:
        return f"{self.op} int{self.weight_bits} {self.activation} {self.granularity}"


@dataclass(frozen=True)
class Answer:
    """What one architecture said.

    Parameters
    ----------
    accepted : bool
    worst : int, optional
        Largest distance of an output code from that of ONNX Runtime on the CPU; None for float outputs.
    equal_percent : float, optional
        Output codes equal to ONNX Runtime's.
    sqnr_db : float, optional
        Of float outputs against ONNX Runtime's.
    refused_by : {'library', 'provider'}, optional
        Qualcomm's library, or the open-source execution provider that translates ONNX for it.
    float_bias : bool
        Taken only with a float bias beside the quantized weights.  Such a graph was seen to give other codes in other
        sessions (one on v75: within 1 of ONNX Runtime's in 22 sessions of 25, far off in two), so no distance is
        recorded.
    """

    accepted: bool
    worst: int | None = None
    equal_percent: float | None = None
    sqnr_db: float | None = None
    refused_by: Literal["library", "provider"] | None = None
    float_bias: bool = False


def probes() -> Iterator[Probe]:
    """All questions of the table; LPBQ is an encoding of 4-bit weights only."""
    for op in OPS:
        for bits in WEIGHT_BITS:
            for activation in ACTIVATIONS:
                for granularity in GRANULARITIES:
                    if bits == 4 or not granularity.startswith("LPBQ"):
                        yield Probe(op, bits, activation, granularity)


def ask(probe: Probe, arch: str) -> Answer:
    """Put one question to one architecture of the HTP backend (emulated).

    Raises
    ------
    htp.HTPUnavailable
        If there is no backend.
    Exception
        ONNX Runtime's own, if it cannot run the graph either: then the question is wrong, not the answer.
    """
    refusals, inputs = [], _inputs(probe)
    for model, options, float_bias in writings(probe):
        expected = _on_cpu(model, inputs)
        try:
            given = htp.run(model, inputs, arch, options)["y"]
        except htp.HTPRefused as refused:
            refusals.append(refused.by)
            continue
        if float_bias:
            return Answer(True, float_bias=True)
        if probe.activation == "float32":
            return Answer(True, sqnr_db=round(sqnr_db(expected, given), 1))
        difference = np.abs(given.astype(int) - expected.astype(int))
        return Answer(True, int(difference.max()), round(100 * float(np.mean(difference == 0)), 1))
    return Answer(False, refused_by="library" if "library" in refusals else "provider")


def writings(probe: Probe) -> Iterator[tuple[onnx.ModelProto, dict[str, str], bool]]:
    """The ways to write a question as ONNX, with the provider options that belong to each.

    Only LPBQ has more than one: its block scales as integers times floats (two DequantizeLinear in a chain); the same
    beside a float bias, without which the provider does not recognize it in a Gemm; and plain blocks of which the
    provider makes LPBQ itself when told to.

    Yields
    ------
    model : ModelProto
    options : dict
        Of the execution provider.
    float_bias : bool
        See `Answer`.
    """
    yield _model(probe), {}, False
    if probe.granularity.startswith("LPBQ"):
        if probe.op == "Gemm":
            yield _model(probe, bias=True), {}, True
        yield _model(probe, chained=False), {"enable_block_quant_weight_optimization": "1"}, False


def table(arches: Iterable[str] = htp.SOC_OF_ARCH, progress: bool = False) -> dict[str, Any]:
    """Put every question to every architecture.

    Returns
    -------
    dict
        ``with`` (the version of the backend) and ``answers``: probe, then architecture, then the fields of `Answer`
        that are not their defaults.

    Raises
    ------
    htp.HTPUnavailable
        If there is no backend.
    """
    from tqdm import tqdm

    arches = list(arches)
    if not arches:
        raise ValueError("name at least one architecture to ask")
    if not htp.status().available:
        raise htp.HTPUnavailable(f"no HTP backend: {htp.status().reason}")
    answers: dict[str, dict[str, Any]] = {str(probe): {} for probe in probes()}
    # A process for each architecture: they share the cores, and a crash in native code ends a pool, not the program.
    with ProcessPoolExecutor(min(len(arches), os.cpu_count() or 1), get_context("spawn")) as pool:
        asked = [(arch, probe) for arch in arches for probe in probes()]
        chunk = len(asked) // len(arches)
        said = pool.map(ask, [probe for _, probe in asked], [arch for arch, _ in asked], chunksize=chunk)
        for (arch, probe), answer in tqdm(zip(asked, said), total=len(asked), unit="graph", disable=not progress):
            fields = vars(answer).items()
            answers[str(probe)][arch] = {key: value for key, value in fields if value != getattr(Answer, key, None)}
    return {"with": htp.status().reason, "answers": answers}


def recorded_file() -> dict[str, Any]:
    """The committed table as `table` returned it when ``qtools capabilities --write`` was last run."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def recorded() -> dict[Probe, dict[str, Answer]]:
    """The committed table, by probe and architecture."""
    return read(recorded_file())


def read(content: Mapping[str, Any], arches: Iterable[str] = htp.SOC_OF_ARCH) -> dict[Probe, dict[str, Answer]]:
    """What `table` returns, as objects."""
    answers, arches = content["answers"], list(arches)
    return {probe: {arch: Answer(**answers[str(probe)][arch]) for arch in arches} for probe in probes()}


def write(content: Mapping[str, Any]) -> None:
    """Renew the committed table."""
    replace_json(TABLE, content)


def show(answers: Mapping[Probe, Mapping[str, Answer]]) -> str:
    """The table in words: one row a question, one column an architecture."""
    lines = []
    for op in OPS:
        asked = {probe: said for probe, said in answers.items() if probe.op == op}
        arches = list(next(iter(asked.values())))
        lines += [op, f"{'weights':8}{'activations':13}{'scale per':12}" + "".join(f"{arch:>7}" for arch in arches)]
        for probe, said in asked.items():
            row = f"{f'int{probe.weight_bits}':8}{probe.activation:13}{probe.granularity:12}"
            lines.append(row + "".join(f"{sign(said[arch]):>7}" for arch in arches))
        lines.append("")
    lines.append("a number: taken; the largest distance of an output code from ONNX Runtime's")
    lines.append("a number with dB: taken; SQNR of the float output against ONNX Runtime's")
    lines.append("~: taken only beside a float bias; the codes were seen to change from session to session")
    lines.append("--: refused by Qualcomm's library; -: refused by the execution provider that translates for it")
    return "\n".join(lines)


def sign(answer: Answer) -> str:
    """An answer as `show` writes it."""
    if not answer.accepted:
        return "--" if answer.refused_by == "library" else "-"
    if answer.float_bias:
        return "~"
    return f"{answer.sqnr_db:.0f}dB" if answer.worst is None else str(answer.worst)


def _model(probe: Probe, *, bias: bool = False, chained: bool = True) -> onnx.ModelProto:
    weights, encoding = _weights(probe)
    return operator_model(
        probe.op,
        weights,
        encoding if chained else encoding.qparams,
        _input_shape(probe.op),
        activations=None if probe.activation == "float32" else _activation_qparams(probe),
        bias=np.zeros(_CHANNELS, np.float32) if bias else None,
    )


def _input_shape(op: str) -> tuple[int, ...]:
    if op == "Conv":
        side = int(_ROWS**0.5)
        return 1, _DEPTH, side, side
    return (1, _ROWS, _DEPTH) if op == "MatMul" else (_ROWS, _DEPTH)


def _floats() -> tuple[np.ndarray, np.ndarray]:
    """Input (rows, depth) and weights (channels, depth) of every probe; the channels differ in size."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((_ROWS, _DEPTH), dtype=np.float32)
    w = rng.standard_normal((_CHANNELS, _DEPTH), dtype=np.float32)
    return x, w * np.linspace(0.01, 0.05, _CHANNELS, dtype=np.float32)[:, None]


def _weights(probe: Probe) -> tuple[np.ndarray, Any]:
    """Codes and encoding, in the layout of the operator's weights."""
    kind, _, size = probe.granularity.partition(" ")
    blocks = {"tensor": (-1, -1), "channel": (1, -1)}.get(kind) or (1, int(size))
    w, spare = _floats()[1], ()
    if probe.op == "MatMul":  # stored (depth, channels)
        w, blocks = np.ascontiguousarray(w.T), blocks[::-1]
    elif probe.op == "Conv":
        w, spare = w[:, :, None, None], (1, 1) if size else (-1, -1)
    grid = Grid(probe.weight_bits, signed=True, symmetric=True, block_size=blocks + spare)
    if kind == "LPBQ":
        encoding = choose_lpbq(w, grid)
        return quantize(w, encoding.qparams), encoding
    return choose_and_quantize(w, grid)


def _activation_qparams(probe: Probe) -> tuple[QParams, QParams]:
    x, w = _floats()
    grid = Grid(8 if probe.activation == "uint8" else 16)
    return choose_qparams(x, grid), choose_qparams(x @ w.T, grid)


def _inputs(probe: Probe) -> dict[str, np.ndarray]:
    x = _floats()[0]
    if probe.activation != "float32":
        x = quantize(x, _activation_qparams(probe)[0])
    return {"x": np.ascontiguousarray(x.T if probe.op == "Conv" else x).reshape(_input_shape(probe.op))}


def _on_cpu(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What ONNX Runtime gives with its optimizations off, so that no kernel of its own steps in."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]
