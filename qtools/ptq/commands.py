"""``qtools convert``, ``verify`` and ``agreement``: their arguments, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from qtools.ptq.convert import Converted
    from qtools.ptq.verify import Verification

_CALIBRATIONS = ("min-max", "sqnr", "entropy", "mse", "percentile")
_SCHEMAS = ("asymmetric", "symmetric", "unsignedsymmetric")
_UNTOUCHED = "what was there before stays as it was"
_WORST, _PARTING, _NAMED = 5, 8, 4


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The arguments of Qualcomm's converter that have a meaning here, in both spellings, with its defaults."""
    about = "quantize a float ONNX network for the phone, with the arguments of qnn-onnx-converter"
    parser = commands.add_parser("convert", help=about, allow_abbrev=False)
    add = parser.add_argument
    add("--input_network", type=Path, required=True, metavar="FILE.onnx")
    add(
        "--output_path",
        "-o",
        type=Path,
        required=True,
        metavar="FILE",
        help="an ending .cpp, .onnx or .dlc is replaced by .onnx and .encodings",
    )
    add("--input_list", type=Path, metavar="FILE", help="a raw float32 file, or NAME:=FILE ..., for each sample")
    add("--input_dim", "-d", nargs=2, action="append", default=[], metavar=("NAME", "1,3,224,224"))
    add("--act_bw", "--act_bitwidth", type=int, default=8, choices=(8, 16), help="bits of activations (8)")
    add("--weight_bw", "--weights_bitwidth", type=int, default=8, choices=(4, 8, 16), help="bits of weights (8)")
    add("--bias_bw", "--bias_bitwidth", type=int, default=8, choices=(8, 32), help="accepted; biases are int32")
    about = "cle (equalize), hba (absorb high biases), bc (correct biases), seqmse (scales), adaround, gptq (rounding)"
    add("--algorithms", nargs="+", default=[], metavar="NAME", help=about)
    add("--use_per_channel_quantization", action="store_true", help="a scale per channel: convolutions")
    add("--use_per_row_quantization", action="store_true", help="a scale per row: MatMul and Gemm")
    add("--act_quantizer_calibration", default="min-max", choices=_CALIBRATIONS)
    add("--param_quantizer_calibration", default="min-max", choices=_CALIBRATIONS)
    add("--act_quantizer_schema", default="asymmetric", choices=_SCHEMAS)
    add("--param_quantizer_schema", default="asymmetric", choices=_SCHEMAS)
    add("--percentile_calibration_value", type=float, default=99.99, metavar="PERCENT")
    add("--quantization_overrides", type=Path, metavar="FILE", help="encodings, or types, of single tensors")
    add("--ignore_encodings", action="store_true", help="leave the overrides unread")
    add("--input_layout", "-l", nargs=2, action="append", default=[], metavar=("NAME", "NCHW"), help="accepted; kept")
    add("--pack_4_bit_weights", action="store_true", help="accepted; 4-bit codes always lie two to a byte")
    add("--soc", metavar="CHIP", help="such as sm8650: also write what that phone loads (HTP backend, emulated)")
    add("--encodings_version", default="1.0.0", choices=("0.6.1", "1.0.0", "2.0.0"))
    parser.set_defaults(command=_convert)


def add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Float, simulation and backend side by side."""
    about = "run a quantized network simulated and on the HTP backend, and say where they part"
    parser = commands.add_parser("verify", help=about)
    parser.add_argument("model", type=Path, metavar="MODEL.onnx", help="as qtools convert writes it")
    parser.add_argument("--soc", default="sm8650", metavar="CHIP", help="sm8650 by default")
    parser.add_argument("--input_list", type=Path, metavar="FILE", help="without it, random numbers")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="of the list, from its beginning (2)")
    parser.add_argument("--float_network", type=Path, metavar="FILE", help="by default the one MODEL was made of")
    parser.set_defaults(command=_verify)


def add_agreement(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Simulation, integers, kernels and backend, operator by operator."""
    about = "compare simulation, integer arithmetic, ONNX Runtime's kernels and the HTP backend, code by code"
    parser = commands.add_parser("agreement", help=about)
    parser.add_argument("--recorded", action="store_true", help="show the committed table, run nothing")
    parser.add_argument("--write", action="store_true", help="renew the committed table (some minutes)")
    parser.set_defaults(command=_agreement)


def _agreement(args: argparse.Namespace) -> int:
    from qtools.npu import htp
    from qtools.ptq import agreement

    if args.write and args.recorded:
        print("qtools agreement: --write runs all anew, so it does not go with --recorded", file=sys.stderr)
        return 2
    try:
        content = agreement.recorded() if args.recorded else agreement.table(progress=True)
    except htp.HTPUnavailable as error:
        print(f"qtools agreement: {error}; --recorded shows what it said when last asked", file=sys.stderr)
        return 1
    if args.write:
        agreement.write(content)
    print(f"HTP backend (emulated), {content['with']}\n\n{agreement.show(content)}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from qtools._signals import collected

    # SIGTERM ends this as Ctrl-C does; `convert` raises what comes, but not while modules are loaded and files moved.
    with collected() as caught:
        try:
            from qtools.npu import htp
            from qtools.ptq import convert

            done = convert.convert(args.input_network, args.output_path, args.input_list, **_arguments(args))
        except (Exception, KeyboardInterrupt) as error:
            # Native code may make an error of its own of an interruption.
            if caught or isinstance(error, KeyboardInterrupt):
                said = str(error) if isinstance(error, KeyboardInterrupt) else ""
                print(f"qtools convert: interrupted: {said or _UNTOUCHED}", file=sys.stderr)
                return 130
            if not isinstance(error, ValueError | OSError | htp.HTPUnavailable):
                raise
            print(f"qtools convert: {_one_line(error)}", file=sys.stderr)
            return 1
        done.notes += _remarks(args, done)
        print(summary(done, args.input_network), flush=True)  # a signal that comes now is too late to matter
    return 0


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `convert.convert` is told besides its files."""
    from qtools.ptq import convert

    if args.input_list is None:
        raise ValueError("--input_list is missing: without samples there is nothing to take ranges from")
    _check_soc(args.soc)
    fields = {name: getattr(args, name) for name in convert.Options.__dataclass_fields__}
    names = [name for name, _ in args.input_dim]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--input_dim {twice[0]} is given twice")
    return {
        "options": convert.Options(**fields | {"algorithms": tuple(args.algorithms)}),
        "input_shapes": {name: _dims(name, text) for name, text in args.input_dim},
        "overrides": None if args.ignore_encodings else args.quantization_overrides,
        "soc": args.soc.lower() if args.soc else None,
        "version": args.encodings_version,
        "progress": sys.stderr.isatty(),
    }


def _check_soc(soc: str | None) -> None:
    from qtools.npu import htp

    if soc is not None and soc.lower() not in htp.SOCS:
        raise ValueError(f"--soc must be one of {', '.join(htp.SOCS)}, got {soc!r}")


def _remarks(args: argparse.Namespace, done: Converted) -> list[str]:
    """What became of arguments that are accepted for the sake of Qualcomm's command lines."""
    notes, inputs = [], [entry.name for entry in done.float_network.graph.input]
    if args.bias_bw == 8 and done.tensors.biases:
        notes.append("biases are written as int32, at the scale of their accumulator: 8 bits would not hold them")
    for name, layout in args.input_layout:
        known = "inputs keep the axes of the ONNX file" if name in inputs else "the network has no such input"
        notes.append(f"--input_layout {name} {layout} changed nothing: {known}")
    if args.pack_4_bit_weights:
        some = any(encoding.bits == 4 for encoding in done.encodings.params.values())
        how = "4-bit codes always lie two to a byte" if some else "no weights have 4 bits"
        notes.append(f"--pack_4_bit_weights changed nothing: {how}")
    if args.ignore_encodings:
        left = f"{args.quantization_overrides} was not read" if args.quantization_overrides else "there are none"
        notes.append(f"--ignore_encodings: {left}")
    return notes


def _dims(name: str, text: str) -> list[int]:
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--input_dim {name} {text}: expected whole numbers with commas, such as 1,3,224,224")
    return [int(part) for part in parts]


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def summary(done: Converted, source: Path) -> str:
    """What a run of the converter has to say, in a dozen lines."""
    from qtools.ptq.convert import layers, outputs

    tensors, encodings, network = done.tensors, done.encodings, done.float_network
    bare = [name for name in tensors.activations if name not in encodings.activations]
    bare += [name for name in (*tensors.weights, *tensors.constants) if name not in encodings.params]
    worst = sorted((name for name in layers(done) if name in done.sqnr), key=lambda name: done.sqnr[name])[:_WORST]
    lines = [
        f"{source.name}: {len(network.graph.node)} operators after fusion",
        f"encodings: {len(encodings.activations)} activations, {len(encodings.params)} weights and constants"
        + (f"; none, so float, for {len(bare)}: {_listed(bare)}" if bare else ""),
        f"size: {network.ByteSize():,} bytes in floats, {done.network.ByteSize():,} quantized",
        "SQNR of the outputs (dB): " + _decibels(done, [name for name in outputs(network) if name in done.sqnr]),
        "and after the operators with weights, the worst: " + _decibels(done, worst),
    ]
    lines = lines if done.sqnr else lines[:3]
    lines += [f"note: {note}" for note in done.notes]
    return "\n".join(lines + [f"wrote {path}" for path in done.files])


def _decibels(done: Converted, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {done.sqnr[name]:.1f}" for name in names) or "none"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _verify(args: argparse.Namespace) -> int:
    from qtools.npu import htp
    from qtools.ptq import graph, verify
    from qtools.ptq.convert import load

    try:
        _check_soc(args.soc)
        network = load(args.model)
        if not any(node.op_type == "QuantizeLinear" for node in network.graph.node):
            raise ValueError(f"{args.model} is a float network: qtools convert makes a quantized one of it")
        samples = _samples(network, args.input_list, args.samples)
        original = _original(network, args.float_network)
        shapes = {e.name: [d.dim_value for d in e.type.tensor_type.shape.dim] for e in network.graph.input}
        real = graph.prepare(load(original), shapes) if original else None
        arch = htp.SOCS[args.soc.lower()][0]
        others = [other for other in htp.SOC_OF_ARCH if other != arch]
        found = verify.verify(network, samples, real, arch=arch, others=others)
    except (ValueError, OSError, htp.HTPUnavailable) as error:
        print(f"qtools verify: {_one_line(error)}", file=sys.stderr)
        return 1
    print(report(found, arch, args.input_list is None))
    return 0


def _samples(network: onnx.ModelProto, input_list: Path | None, count: int) -> list[dict[str, np.ndarray]]:
    import numpy as np

    from qtools.ptq.inputs import input_shapes, read_input_list

    if count < 1:
        raise ValueError(f"--samples must be at least 1, got {count}")
    if input_list is not None:
        return [*read_input_list(input_list, network)[:count]]
    rng, shapes = np.random.default_rng(0), input_shapes(network)
    return [
        {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}
        for _ in range(count)
    ]


def _original(network: onnx.ModelProto, named: Path | None) -> Path | None:
    from qtools.ptq.convert import SOURCE

    if named:
        return named
    kept = {entry.key: entry.value for entry in network.metadata_props}
    path = Path(kept[SOURCE]) if SOURCE in kept else None
    return path if path and path.is_file() else None


def report(found: Verification, arch: str, random: bool) -> str:
    """What a verification has to say."""
    source = "random numbers (give --input_list for real ones)" if random else "from the list"
    lines = [f"{found.samples} samples, {source}"]
    for reason in dict.fromkeys(found.refused.values()):
        refusing = ", ".join(arch for arch, other in found.refused.items() if other == reason)
        lines.append(f"HTP {refusing} (emulated): {reason}")
    if found.reason:
        lines.append(f"HTP backend: {found.reason}; nothing below is verified on it")
    if all(output["simulated_db"] is None for output in found.outputs):
        lines.append("no float network to compare with: --float_network names one")
    if found.integer_reason:
        lines.append(f"not computed in integers: {found.integer_reason}")
    for output in found.outputs:
        cells = [
            _cell("simulated", output["simulated_db"], output["simulated_agreement"]),
            _cell("in integers", output["integer_db"], output["integer_agreement"]),
            _cell(f"HTP {arch} (emulated)", output["htp_db"], output["htp_agreement"]),
            _cell(
                "integers against simulated",
                output["integer_to_simulated_db"],
                output["integer_to_simulated_agreement"],
            ),
            _cell("HTP against simulated", output["htp_to_simulated_db"], output["htp_to_simulated_agreement"]),
        ]
        lines += [f"output {output['name']}", *(f"  {cell}" for cell in cells if cell)]
    if found.integers:
        off = max(found.integers, key=lambda layer: layer.worst)
        lines.append(
            f"integers and simulation: {mean(layer.equal_percent for layer in found.integers):.2f} % of the codes "
            f"equal, at most {off.worst} apart ({off.name})"
        )
    if found.layers:
        first = found.parts_at
        lines.append(
            f"all {len(found.layers)} tensors within one code"
            if first is None
            else f"simulation and backend part at {first.name}: up to {first.worst} codes"
        )
        off = sorted(found.layers, key=lambda layer: layer.equal_percent)[:_PARTING]
        lines += [f"  {layer.name}: {layer.equal_percent:.1f} % equal, worst {layer.worst}" for layer in off]
    return "\n".join(lines)


def _cell(name: str, db: float | None, agreement: float | None) -> str:
    return "" if db is None else f"{name}: {db:.1f} dB, same argmax {agreement:.1f} %"
