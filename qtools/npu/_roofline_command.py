"""``qtools roofline``: how long a network would take on a phone, where the time goes, and what would save most."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtools.npu.roofline import Network, Prediction
    from qtools.npu.soc import Rates

_TOP = 12
_NARROWER = {"float": ("w8a16", "w8a8"), "w8a16": ("w8a8", "w4a16"), "w8a8": ("w4a8",), "w4a16": ("w4a8",), "w4a8": ()}
_COLORS = {"compute": "blue", "memory": "orange", "overhead": "green"}
_COLUMNS = ("layer", "operator", "operations", "operations_a_byte", "bound", "ms")


def add_roofline(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Predicted times of an ONNX network."""
    about = "predict how long a network takes on a phone's NPU, layer by layer, and what would save most"
    parser = commands.add_parser("roofline", help=about)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="float, or as qtools convert writes it")
    parser.add_argument("--soc", default="sm8650", metavar="CHIP", help="sm8650 by default")
    parser.add_argument("--precision", default="w8a8", choices=tuple(_NARROWER), help="w8a8 by default; float is fp16")
    parser.add_argument("--input_dim", "-d", nargs=2, action="append", default=[], metavar=("NAME", "1,3,224,224"))
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write FILE.png and FILE.csv, with all layers")
    parser.set_defaults(command=_roofline)


def _roofline(args: argparse.Namespace) -> int:
    from qtools.npu import roofline, soc
    from qtools.ptq.commands import _dims, _one_line

    try:
        rates, precision = soc.rates(args.soc, args.precision), roofline.PRECISIONS[args.precision]
        network = _read(args.model, {name: _dims(name, text) for name, text in args.input_dim})
        found = roofline.predict(network, precision, rates)
        rows = [
            (layer.name, layer.op, layer.operations, roofline.intensity(layer, precision), bound, 1e3 * took)
            for layer, took, bound in found.layers
        ]
        print(f"{args.model.name}, {args.precision}, {soc.chip(args.soc).name}")
        print(_report(network, rates, found, rows))
        for words, saved in savings(network, args.precision, args.soc)[:3]:
            print(f"  saves {1e3 * saved:.3f} ms ({100 * saved / found.seconds:.0f} %): {words}")
        if args.output:
            _write(args.output, rows, rates, found.seconds)
            print(f"wrote {args.output.with_suffix('.png')}, {args.output.with_suffix('.csv')}")
    except (ValueError, OSError) as error:
        print(f"qtools roofline: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _read(path: Path, shapes: dict[str, list[int]]) -> Network:
    """The layers of a file, after the folding that a converter does."""
    from qtools.npu import roofline
    from qtools.ptq import convert, fuse, graph

    model = convert.load(path)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    model = model if quantized and not shapes else graph.prepare(model, shapes)
    constants = {tensor.name for tensor in model.graph.initializer}
    for entry in model.graph.input:
        if entry.name not in constants and any(dim.dim_value < 1 for dim in entry.type.tensor_type.shape.dim):
            raise ValueError(
                f"the input {entry.name!r} has no fixed size: give it with --input_dim {entry.name} 1,3,224,224"
            )
    return roofline.from_onnx(model if quantized else fuse.fuse(model))


def savings(network: Network, precision: str, chip: str) -> list[tuple[str, float]]:
    """Changes of a network and the seconds that each alone would save, the largest first."""
    from qtools.npu import roofline, soc

    rates, bits, layers = soc.rates(chip, precision), roofline.PRECISIONS[precision], network.layers
    now = roofline.predict(layers, bits, rates)
    slowest = max(now.layers, key=lambda one: one.seconds).layer
    changes = {
        "channels in multiples of 32": ([replace(layer, depth=0, channels=0) for layer in layers], bits, rates),
        "activations that fit into the VTCM": (layers, bits, replace(rates, vtcm=math.inf)),
        f"no {slowest.name}, the slowest layer": ([layer for layer in layers if layer is not slowest], bits, rates),
    }
    for other in _NARROWER[precision]:
        changes[f"{other} instead of {precision}"] = layers, roofline.PRECISIONS[other], soc.rates(chip, other)
    for op, count in Counter(layer.op for layer in layers if not layer.macs).items():
        changes[f"no {op} ({count} of them)"] = [layer for layer in layers if layer.op != op], bits, rates
    saved = {words: now.seconds - roofline.predict(*run).seconds for words, run in changes.items() if run[0]}
    return sorted(((words, gain) for words, gain in saved.items() if gain > 0), key=lambda one: -one[1])


def _report(network: Network, rates: Rates, found: Prediction, rows: list[tuple]) -> str:
    from qtools.npu import roofline

    text = [f"{'layer':28} {'operator':18} {'Mop':>9} {'ops/byte':>9} {'bound':>9} {'ms':>8} {'share':>6}"]
    for name, op, operations, dense, bound, took in sorted(rows, key=lambda row: -row[5])[:_TOP]:
        numbers = f"{operations / 1e6:9.2f} {dense:9.1f} {bound:>9} {took:8.4f} {took / found.seconds / 1e3:6.1%}"
        text.append(f"{name[-28:]:28} {op:18} {numbers}")
    text.append(f"{len(rows)} layers, {network.macs / 1e6:,.1f} MMAC; ridge at {roofline.ridge(rates):.0f} ops/byte")
    if network.unknown:
        text.append(f"not known here, counted as element-wise work: {', '.join(network.unknown)}")
    parts = f"work {1e3 * found.busy:.3f} and memory {1e3 * found.memory:.3f} overlapped, {1e3 * rates.fixed:.3f} fixed"
    return "\n".join([*text, f"predicted {1e3 * found.seconds:.3f} ms ({parts})"])


def _write(path: Path, rows: list[tuple], rates: Rates, seconds: float) -> None:
    """All layers as a table; as points under the roof, and the slowest as bars."""
    from matplotlib.figure import Figure

    with path.with_suffix(".csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_COLUMNS, *rows])
    figure = Figure((11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ends = [0.1, 2 * rates.matrix / rates.bandwidth, 1e4]
    left.loglog(ends, [min(2 * rates.matrix, end * rates.bandwidth) for end in ends], color="black")
    for _, _, operations, dense, bound, took in rows:
        left.loglog(dense, operations / took * 1e3, "o", color=_COLORS[bound], ms=4 + took / seconds / 25, alpha=0.6)
    left.set(xlabel="operations a byte", ylabel="operations a second", title=f"predicted: {1e3 * seconds:.3f} ms")
    for name, *_, bound, took in sorted(rows, key=lambda row: row[5])[-_TOP:]:
        right.barh(name[-28:], took, color=_COLORS[bound])
    right.set(xlabel="ms: " + ", ".join(f"{color} {bound}" for bound, color in _COLORS.items()))
    figure.savefig(path.with_suffix(".png"), dpi=110)
