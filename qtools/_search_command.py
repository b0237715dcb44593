"""``qtools search``: which tensors of a network get more bits, for a budget."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

    from qtools.mixed_precision import Search

_COSTS = ("bytes", "bitops", "wide")
_FIELDS = (
    *("act_quantizer_calibration", "percentile_calibration_value"),
    *("use_per_channel_quantization", "use_per_row_quantization"),
)
_WORST, _POINTS = 8, 8


def add_search(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """A search over types under a budget; its overrides are for ``qtools convert``."""
    about = "find the types that lose least for a budget, and write them as overrides for qtools convert"
    parser = commands.add_parser("search", help=about, allow_abbrev=False)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.onnx", help="a float network")
    add("--input_list", type=Path, required=True, metavar="FILE", help="samples, as qtools convert takes them")
    add("--input_dim", "-d", nargs=2, action="append", default=[], metavar=("NAME", "1,3,224,224"))
    add("--budget", required=True, metavar="N", help="in the unit of the cost, or such as 30%% of the dearest types")
    what = "bytes moved, bit operations, activations of more than 8 bits, or a JSON file: tensor to bits to cost"
    add("--cost", default="wide", metavar="|".join((*_COSTS, "FILE")), help=f"{what} (wide)")
    add("--candidates", default="8,16", metavar="8,16", help="bits of activations to choose from")
    add("--weight_candidates", default="8", metavar="4,8", help="bits of weights to choose from (8)")
    add("--soc", metavar="CHIP", help="such as sm8650: only types that its architecture takes")
    add("--output", "-o", type=Path, required=True, metavar="overrides.json")
    add("--converted", type=Path, metavar="FILE", help="also write the network of these types, as qtools convert does")
    add("--algorithms", nargs="+", default=[], metavar="NAME", help="as for qtools convert; for --converted")
    add("--rounds", type=int, default=3, metavar="N", help="measure so often, each time around what was chosen (3)")
    add("--hardest", type=int, metavar="N", help="measure on the N samples that suffer most; by default on all")
    add("--resume", type=Path, metavar="FILE", help="keep what is measured there, and go on from it")
    add("--act_quantizer_calibration", default="min-max", metavar="METHOD", help="as for qtools convert")
    add("--percentile_calibration_value", type=float, default=99.99, metavar="PERCENT")
    add("--use_per_channel_quantization", action="store_true")
    add("--use_per_row_quantization", action="store_true")
    parser.set_defaults(command=_search)


def _search(args: argparse.Namespace) -> int:
    from qtools import mixed_precision
    from qtools.ptq import commands, convert

    try:
        commands._check_soc(args.soc)
        options = convert.Options(**{name: getattr(args, name) for name in _FIELDS})
        rounded = replace(options, algorithms=tuple(args.algorithms))
        _check_files(args)
        shapes = {name: commands._dims(name, text) for name, text in args.input_dim}
        network = convert.prepared(args.model, shapes)
        found = _found(args, network, options)
        mixed_precision.write_overrides(mixed_precision.overrides(network, found.plan.types, options), args.output)
        print(report(args, found))
        if args.converted:
            more = {"input_shapes": shapes, "overrides": args.output, "progress": sys.stderr.isatty()}
            done = convert.convert(args.model, args.converted, args.input_list, rounded, **more)
            print(commands.summary(done, args.model))
    except (ValueError, OSError) as error:
        print(f"qtools search: {commands._one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Say before the long work what could not be written after it."""
    if args.algorithms and not args.converted:
        raise ValueError("--algorithms are for the network that --converted names, and it names none")
    for path in filter(None, (args.output, args.resume, args.converted)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {path.parent} for {path.name}")


def _found(args: argparse.Namespace, network: onnx.ModelProto, options: Any) -> Search:
    from qtools import mixed_precision
    from qtools.npu import htp
    from qtools.ptq import calibrate, inputs

    cost = args.cost if args.cost in _COSTS else _table(Path(args.cost))
    bits, weight_bits = (_widths(text) for text in (args.candidates, args.weight_candidates))
    samples, shown = inputs.read_input_list(args.input_list, network), sys.stderr.isatty()
    methods = sorted({"min_max", args.act_quantizer_calibration.replace("-", "_")})
    percentile = args.percentile_calibration_value
    calibration = calibrate.calibrate(network, samples, methods=methods, percentile=percentile, progress=shown)
    return mixed_precision.search(
        network, samples, calibration, args.budget, cost=cost, bits=bits, weight_bits=weight_bits, options=options,
        arch=htp.SOCS[args.soc.lower()][0] if args.soc else None, rounds=args.rounds, hardest=args.hardest,
        subsets=min(4, len(samples), args.hardest or len(samples)), resume=args.resume, progress=shown,
    )  # fmt: skip


def _widths(text: str) -> list[int]:
    found = [{"4": 4, "8": 8, "16": 16}.get(part.strip()) for part in text.split(",")]
    if None in found:
        raise ValueError(f"candidates are 4, 8 and 16, with commas, got {text!r}")
    return found


def _table(path: Path) -> dict[str, dict[int, float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8")).items()
        return {name: {int(bits): float(cost) for bits, cost in row.items()} for name, row in content}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{path} is no table of costs: tensor to bits to a number, in JSON") from None


def report(args: argparse.Namespace, found: Search) -> str:
    """What a search has to say."""
    import numpy as np

    from qtools import mixed_precision

    task, table = found.problem, found.table
    lines = [f"{args.model.name}: {len(task.units)} units of {sum(map(len, task.units))} tensors choose their type"]
    lines += [f"excluded: {reason}" for reason in task.excluded]
    lines += [f"most sensitive around the last choice: {'loss':>10} +- spread"]
    for name in table.ranking()[:_WORST]:
        i = table.names.index(name)
        k = int(np.nanargmax(np.abs(table.mean[i])))
        lines.append(f"  {name[:40]:40} {table.mean[i, k]:10.3g} +- {table.spread[i, k]:.2g}  at {table.bits[k]} bits")
    lines.append(f"{'':12}{args.cost[:12]:>14}{'loss':>12}  tensors")
    rows = [("chosen", found.plan), ("greedy", mixed_precision.greedy(task, found.plan.cost))]
    rows += [(f"front {i}", plan) for i, plan in enumerate(mixed_precision.pareto(task, _POINTS), 1)]
    for name, plan in rows:
        counts = sorted(Counter(plan.types.values()).items())
        types = ", ".join(f"{count} of {bits} bits" for bits, count in counts)
        lines.append(f"{name:12}{plan.cost:14,.6g}{plan.loss:12.4g}  {types}")
    return "\n".join([*lines, f"wrote {args.output}, for qtools convert --quantization_overrides"])
