"""From a float ONNX file to a network for the phone: what ``qnn-onnx-converter`` does, as far as a laptop can.

`quantize_network` is the whole of post-training quantization in one call; `convert` puts files before and behind it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from qtools import _signals, observers
from qtools import encodings as files
from qtools.affine import LPBQ, Grid, QParams, choose_qparams, fake_quantize
from qtools.encodings import Encoding, Encodings, Overrides, Rule
from qtools.metrics import sqnr_db
from qtools.npu import capabilities, htp
from qtools.ptq import equalize, fuse, graph, rounding
from qtools.ptq.calibrate import Calibration, calibrate
from qtools.ptq.inputs import read_input_list
from qtools.ptq.write import Tensors, fit_biases, quantized_tensors, write_qdq

if TYPE_CHECKING:
    import onnx

Method = Literal["min-max", "sqnr", "entropy", "mse", "percentile"]
Schema = Literal["asymmetric", "symmetric", "unsignedsymmetric"]
_OBSERVERS = {
    "min-max": observers.MinMaxObserver,
    "sqnr": observers.SQNRObserver,
    "entropy": observers.EntropyObserver,
    "mse": observers.MSEObserver,
    "percentile": observers.PercentileObserver,
}
ALGORITHMS = {
    "cle": "cross-layer equalization",
    "hba": "high-bias absorption",
    "bc": "bias correction",
    "seqmse": "scales of weights chosen by what their layers compute, and biases fitted",
    "adaround": "weights rounded by AdaRound, and biases fitted",
    "gptq": "weights rounded by GPTQ with coordinate descent, and biases fitted",
}
"""What repairs a network on the way; see `equalize` and `rounding`."""
_SOLVERS = {"adaround": rounding.AdaRound(), "gptq": rounding.Descent()}
_ROUNDING = {*_SOLVERS, "seqmse"}
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_COMPARED = 4  # samples on which the layers of the float and the quantized network are compared
_ENDINGS = (".cpp", ".onnx", ".dlc", ".encodings")
_NAMED = 8  # overrides that fit nothing, before the rest is only counted
SOURCE = "qtools.float_network"
"""Key of the metadata that names the float file a quantized network was made of."""


@dataclass(frozen=True)
class Options:
    """What the converter is told; names and defaults are those of Qualcomm's.

    Parameters
    ----------
    act_bw, weight_bw : int
        8 or 16, and 4, 8 or 16.
    act_quantizer_calibration, param_quantizer_calibration : str
        'min-max', 'sqnr', 'entropy', 'mse' or 'percentile'.
    act_quantizer_schema, param_quantizer_schema : str
        'asymmetric', 'symmetric', or 'unsignedsymmetric' (symmetric where there are negative data).  Weights per
        channel or per row, and those of 4 or 16 bits, are symmetric whatever is said here.
    percentile_calibration_value : float
        Share of the values that the range is to hold, in percent.
    use_per_channel_quantization : bool
        A scale per output channel for convolutions.
    use_per_row_quantization : bool
        The same for MatMul and Gemm.
    algorithms : tuple of str
        Of `ALGORITHMS`, in whatever order: equalization comes first, rounding last.

    Raises
    ------
    ValueError
        If a width, a calibration, a schema, the percentile or an algorithm is another one.
    """

    act_bw: int = 8
    weight_bw: int = 8
    act_quantizer_calibration: Method = "min-max"
    param_quantizer_calibration: Method = "min-max"
    act_quantizer_schema: Schema = "asymmetric"
    param_quantizer_schema: Schema = "asymmetric"
    percentile_calibration_value: float = 99.99
    use_per_channel_quantization: bool = False
    use_per_row_quantization: bool = False
    algorithms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.act_bw not in (8, 16) or self.weight_bw not in (4, 8, 16):
            raise ValueError(f"act_bw is 8 or 16 and weight_bw 4, 8 or 16, got {self.act_bw} and {self.weight_bw}")
        for name in self.algorithms:
            if name not in ALGORITHMS:
                raise ValueError(f"algorithms are {', '.join(ALGORITHMS)}; there is no {name!r}")
        if set(_SOLVERS) <= set(self.algorithms):
            raise ValueError(f"{' and '.join(_SOLVERS)} both round the weights: choose one")
        for side in ("act", "param"):
            for what, allowed in (("calibration", get_args(Method)), ("schema", get_args(Schema))):
                given = getattr(self, name := f"{side}_quantizer_{what}")
                if given not in allowed:
                    raise ValueError(f"{name} is one of {', '.join(allowed)}, got {given!r}")
        try:
            observers.PercentileObserver(self.percentile_calibration_value)
        except (ValueError, TypeError) as error:
            raise ValueError(f"percentile_calibration_value: {error}") from None


@dataclass
class Converted:
    """A quantized network and how it came about.

    Parameters
    ----------
    float_network, network : ModelProto
        Prepared and fused; and the same with QuantizeLinear and DequantizeLinear nodes.
    encodings : Encodings
    tensors : Tensors
        What could have an encoding.
    notes : list of str
        What a reader should know: flags that changed nothing, overrides that matched nothing, odd encodings.
    files : list of Path
        What was written.
    sqnr : dict of str to float
        By tensor, in the order of the network, against the float network (dB); see `layer_sqnr`.
    """

    float_network: onnx.ModelProto
    network: onnx.ModelProto
    encodings: Encodings
    tensors: Tensors
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    sqnr: dict[str, float] = field(default_factory=dict)


def convert(
    input_network: Path | str,
    output_path: Path | str,
    input_list: Path | str,
    options: Options = Options(),
    *,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    overrides: Path | str | None = None,
    soc: str | None = None,
    version: str = "1.0.0",
    progress: bool = False,
) -> Converted:
    """Quantize an ONNX file with the samples of an input list; all files are there at the end, or none is new.

    Writes ``STEM.onnx`` and ``STEM.encodings``, and with `soc` and the HTP backend what `htp.export` writes; STEM is
    `output_path` without an ending .cpp, .onnx, .dlc or .encodings.

    Raises
    ------
    ValueError
        In one sentence, for whatever is wrong with a file.
    OSError
        If one cannot be read or written.
    htp.HTPRefused
        If the backend does not take the quantized network.
    KeyboardInterrupt
        By Ctrl-C, SIGTERM and SIGHUP alike; what was there before stays as it was, unless the message says otherwise.
        Of a long rounding, what was done stays in ``.STEM.rounding``, and the same call goes on from there.
    """
    if soc is not None and (soc := soc.lower()) not in htp.SOCS:
        raise ValueError(f"soc must be one of {', '.join(htp.SOCS)}, got {soc!r}")
    stem = _stem(Path(output_path), [input_network, input_list, *([overrides] if overrides else [])])
    with _signals.collected() as caught, _scratch(stem) as scratch:
        _load_modules()
        with caught.at_once():
            kept = stem.with_name(f".{stem.name}.rounding")
            shapes = input_shapes or {}
            converted = _converted(input_network, input_list, options, shapes, overrides, soc, kept, progress)
            with _refused_by_disk(stem.parent):
                _write(converted, scratch / stem.name, soc, version)
        with _refused_by_disk(stem.parent):
            converted.files = _move(scratch, stem.parent)
            kept.unlink(missing_ok=True)
    if caught:
        raise KeyboardInterrupt("the new files are all there, and whole")
    converted.notes += _left(stem, converted.files)
    return converted


def _converted(
    source: Path | str,
    input_list: Path | str,
    options: Options,
    input_shapes: Mapping[str, Sequence[int]],
    overrides: Path | str | None,
    soc: str | None,
    state: Path,
    progress: bool,
) -> Converted:
    rules = files.read_overrides(overrides) if overrides else None
    network = prepared(source, input_shapes)
    samples = read_input_list(input_list, network)
    converted = quantize_network(network, samples, options, rules, state=state, progress=progress)
    converted.network.metadata_props.add(key=SOURCE, value=os.path.abspath(source))
    converted.notes += legality(converted, [htp.SOCS[soc][0]] if soc else list(htp.SOC_OF_ARCH))
    converted.sqnr = layer_sqnr(converted, [sample for sample, _ in zip(samples, range(_COMPARED))])
    return converted


def _load_modules() -> None:
    """Import what is native and large; no signal may be raised in the midst of that."""
    for name in ("onnx.inliner", "onnx.reference", "onnx.version_converter", "onnxruntime", "tqdm"):
        importlib.import_module(name)


# -- files -----------------------------------------------------------------------------------------------------------


def _stem(output: Path, sources: Iterable[Path | str]) -> Path:
    """Where files go, less their endings; none of them may replace what they are made of."""
    stem = output.with_suffix("") if output.suffix in _ENDINGS else output
    if output.is_dir() or not stem.name:
        raise ValueError(f"the output {output} is a folder: name a file in it, such as {output / 'model_qnn.cpp'}")
    for ending in (".onnx", ".encodings"):
        target = stem.with_name(stem.name + ending)
        if any(target.resolve() == Path(source).resolve() for source in sources):
            raise ValueError(f"{target} would be overwritten, and it is read here: choose another output")
    return stem


@contextlib.contextmanager
def _scratch(stem: Path) -> Iterator[Path]:
    """A folder beside the output, and the output's own; neither stays if nothing comes of it."""
    made = [folder for folder in (stem.parent, *stem.parent.parents) if not folder.exists()]
    with _refused_by_disk(stem.parent):
        stem.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=stem.parent, prefix=f".{stem.name[:99]}-"))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def _refused_by_disk(folder: Path) -> Iterator[None]:
    """Say of the output folder what the file system says of some file in it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full, and nothing was written"
        elif isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it is a file or lies in one, and should be a folder"
        elif isinstance(error, IsADirectoryError):
            reason = f"there is a folder {Path(error.filename).name}, where a file is to go"
        else:
            reason = f"cannot be written to ({error.strerror or error})"
        raise OSError(error.errno, reason, str(folder)) from None


def _write(converted: Converted, beside: Path, soc: str | None, version: str) -> None:
    _sibling(beside, ".onnx").write_bytes(converted.network.SerializeToString())
    converted.notes += _folded(files.write(converted.encodings, _sibling(beside, ".encodings"), version))
    if soc is None:
        return
    if not htp.status().available:
        converted.notes.append(f"no files for the phone: {htp.status().reason}")
        return
    try:
        htp.export(converted.network, soc, beside)
    except htp.HTPUnavailable as unavailable:  # installed, but it does not start
        converted.notes.append(f"no files for the phone: {unavailable}")


def _folded(notes: Iterable[str]) -> list[str]:
    """Notes of the form "tensor: what", one for each what."""
    by_what: dict[str, list[str]] = {}
    for name, _, what in (note.rpartition(": ") for note in notes):
        by_what.setdefault(what, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {what}"
        for what, names in by_what.items()
    ]


def _sibling(stem: Path, ending: str) -> Path:
    return stem.with_name(stem.name + ending)


def _move(scratch: Path, folder: Path) -> list[Path]:
    """Move all files of `scratch` to `folder`; if one cannot be, all old ones come back."""
    placed = {path: folder / path.name for path in sorted(scratch.iterdir())}
    (old := scratch / ".old").mkdir()
    try:
        for path, target in placed.items():
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            path.chmod(0o644)
            if os.path.lexists(target):
                os.replace(target, old / path.name)
            os.replace(path, target)
    except OSError:
        for path, target in placed.items():
            if os.path.lexists(old / path.name):
                os.replace(old / path.name, target)
            elif not path.exists():
                target.unlink()
        raise
    return list(placed.values())


def _left(stem: Path, written: Sequence[Path]) -> list[str]:
    """What an earlier run with --soc left beside the new files."""
    endings = ["_net.json", ".dlc", *(f"_{soc}{kind}" for soc in htp.SOCS for kind in (".onnx", "_qnn.bin"))]
    there = [_sibling(stem, ending) for ending in endings]
    old = sorted(path.name for path in there if path.is_file() and path not in written)
    return [f"of an earlier run, and not of this network: {', '.join(old)}"] if old else []


# -- networks --------------------------------------------------------------------------------------------------------


def prepared(path: Path | str, input_shapes: Mapping[str, Sequence[int]] | None = None) -> onnx.ModelProto:
    """An ONNX file prepared and fused (see `graph.prepare` and `fuse.fuse`).

    Raises
    ------
    FileNotFoundError, ValueError
        In one sentence, however the file is damaged.
    """
    model = load(path)
    try:
        with np.errstate(all="ignore"):  # what is not finite is found by calibration
            return fuse.fuse(graph.prepare(model, input_shapes))
    except ValueError:
        raise
    except Exception as error:  # what a damaged file makes of onnx and NumPy cannot be listed
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is damaged, or not a network that can be prepared ({what})") from None


def load(path: Path | str) -> onnx.ModelProto:
    """An ONNX file, with its external data.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or it is not one.
    """
    import onnx

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such network: {path}")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and the external data raise a dozen types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not an ONNX network: {reason}") from None
    if not model.graph.node:
        raise ValueError(f"{path} is not an ONNX network: it holds no operators")
    return model


def quantize_network(
    network: onnx.ModelProto,
    samples: Iterable[Any] = (),
    options: Options = Options(),
    overrides: Overrides | Encodings | Iterable[Rule] | None = None,
    *,
    calibration: Calibration | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> Converted:
    """Calibrate and quantize a prepared and fused network.

    Parameters
    ----------
    network : ModelProto
        As `graph.prepare` and `fuse.fuse` leave it.
    samples : iterable
        As `calibrate` takes them; not read where `calibration` is given, unless an algorithm wants them.
    options : Options
    overrides : Overrides, Encodings or Rules, optional
        Types or whole encodings for single tensors; they win over `options`.
    calibration : Calibration, optional
        An earlier one of the same network, with the method that `options` ask for.
    state : path, optional
        See `rounding.round_network`.
    progress : bool
        Show bars on stderr.

    Raises
    ------
    ValueError
        If an override does not fit its tensor, or the samples do not fit the network.
    """
    tensors, notes = quantized_tensors(network), []
    if options.algorithms:
        samples = list(samples)
        if not samples:
            raise ValueError(f"the algorithms {', '.join(options.algorithms)} need samples")
    if (changed := _equalized(network, samples, options.algorithms, notes)) is not network:
        if calibration is not None:
            raise ValueError("cle and hba change the ranges: give samples, not an earlier calibration")
        network, tensors = changed, quantized_tensors(changed)
    chosen, more = _chosen(overrides, tensors)
    notes += more
    if calibration is None:
        methods = {"min_max", options.act_quantizer_calibration.replace("-", "_")}
        roots = list(dict.fromkeys(tensors.activations.values()))
        settings = {"percentile": options.percentile_calibration_value}
        calibration = calibrate(network, samples, roots, methods=sorted(methods), progress=progress, **settings)
    activations = _activations(calibration, tensors, options, chosen["activation"])
    params = _params(network, tensors, options, chosen["param"], notes)
    params = fit_biases(network, activations, params, tensors)  # the encodings are to be those that are written
    written = network
    if asked := _ROUNDING & set(options.algorithms):
        solver = next((_SOLVERS[name] for name in asked if name in _SOLVERS), rounding.Nearest())
        rounded = rounding.round_network(
            network,
            activations,
            params,
            samples,
            solver,
            tensors=tensors,
            clips=rounding.CLIPS if "seqmse" in asked else (),
            state=state,
            progress=progress,
        )
        written, params = graph.replace_weights(network, rounded.values), rounded.params
    if "bc" in options.algorithms and written is network:
        written = _corrected(network, params, tensors, samples, notes, progress)
        params = fit_biases(written, activations, params, tensors)
    elif "bc" in options.algorithms:
        notes.append("bc changed nothing: where weights are rounded anew, biases are fitted too")
    notes += _idle(options, tensors, chosen)
    found = Encodings(_encodings(activations), _encodings(params))
    notes += files.suspicious(found)
    return Converted(network, write_qdq(written, activations, params, tensors), found, tensors, notes)


def _equalized(
    network: onnx.ModelProto, samples: Iterable[Any], algorithms: Sequence[str], notes: list[str]
) -> onnx.ModelProto:
    """The network with its channels brought to like ranges, as far as the function stays what it is."""
    if "cle" in algorithms:
        equalized = equalize.equalize(network, relu6="unreached", samples=samples)
        notes.append(f"cle: {len(equalized.pairs)} pairs of layers equalized")
        notes += _counted("cle", equalized.skipped)
        network = equalized.network
    if "hba" in algorithms:
        absorbed = equalize.absorb_high_biases(network, samples)
        moved = sum(bool(np.any(shift < 0)) for shift in absorbed.shifts.values())
        notes.append(f"hba: {moved} layers gave part of their bias to the next")
        network = absorbed.network
    return network


def _corrected(
    network: onnx.ModelProto,
    params: Mapping[str, QParams | LPBQ],
    tensors: Tensors,
    samples: Iterable[Any],
    notes: list[str],
    progress: bool,
) -> onnx.ModelProto:
    view = fuse.View(network)
    codes = {name: params[name] for name in tensors.weights if name in params}
    rounded = {
        name: fake_quantize(view.value(name), one.qparams if isinstance(one, LPBQ) else one)
        for name, one in codes.items()
    }
    corrected = equalize.correct_biases(network, rounded, samples, progress=progress)
    notes += _counted("bc", corrected.skipped)
    return corrected.network


def _counted(algorithm: str, skipped: Mapping[str, str]) -> list[str]:
    """One line for all layers that an algorithm left as they are."""
    reasons = list(skipped.values())
    more = f"; and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return [f"{algorithm} left alone {reasons[0]}{more}"] if reasons else []


def _encodings(chosen: Mapping[str, QParams | LPBQ]) -> dict[str, Encoding]:
    found = {}
    for name, qparams in chosen.items():
        with _fitting(name):
            found[name] = Encoding.from_qparams(qparams)
    return found


def _chosen(overrides: Any, tensors: Tensors) -> tuple[dict[str, dict[str, Rule]], list[str]]:
    if overrides is None:
        return {"activation": {}, "param": {}}, []
    if isinstance(overrides, Encodings):
        overrides = files.rules_of(overrides)
    params = {*tensors.weights, *tensors.constants}
    rules = [_of_its_kind(rule, tensors, params) for rule in getattr(overrides, "rules", overrides)]
    chosen, report = files.apply_rules(rules, tensors.activations, params)
    notes = [_unmatched(rule, tensors) for rule in report.unmatched]
    if len(notes) > _NAMED:
        notes[_NAMED - 1 :] = [f"{len(notes) - _NAMED + 1} more overrides match nothing"]
    grouped = [rule for rule, _ in report.matched if rule.kind == "activation" and rule.block_size]
    return chosen, notes + [f"override {rule.pattern!r}: an activation has no groups" for rule in grouped]


def _of_its_kind(rule: Rule, tensors: Tensors, params: set[str]) -> Rule:
    """A rule under the kind that its tensor has here: files of 2.0.0 do not tell weights from activations."""
    kind = "param" if rule.pattern in params else "activation" if rule.pattern in tensors.activations else rule.kind
    return rule if kind == rule.kind else replace(rule, kind=kind)


def _unmatched(rule: Rule, tensors: Tensors) -> str:
    if any(map(rule.matches, tensors.biases)):
        return f"override {rule.pattern!r} changes nothing: a bias is an int32 at the scale of its accumulator"
    return f"override {rule.pattern!r} matches no {rule.kind} of the network"


def _idle(options: Options, tensors: Tensors, chosen: Mapping[str, Mapping[str, Rule]]) -> list[str]:
    """A line for what was asked for and changes nothing."""
    notes, methods = [], (options.act_quantizer_calibration, options.param_quantizer_calibration)
    default = Options.percentile_calibration_value
    if options.percentile_calibration_value != default and "percentile" not in methods:
        notes.append("--percentile_calibration_value changed nothing: no calibration is 'percentile'")
    left = [name for name in tensors.weights if name not in chosen["param"]]
    for flag, default in (("weight_bw", 8), ("param_quantizer_calibration", "min-max")):
        if getattr(options, flag) != default and not left:
            notes.append(f"--{flag} changed nothing: the network has no constant weights that overrides leave to it")
    return notes


def _activations(
    calibration: Calibration, tensors: Tensors, options: Options, rules: Mapping[str, Rule]
) -> dict[str, QParams]:
    method = options.act_quantizer_calibration.replace("-", "_")
    found: dict[str, QParams] = {}
    for name, root in tensors.activations.items():
        rule = rules.get(name)
        if name != root and rule is None:  # moved, not computed: it keeps what it had
            if root in found:
                found[name] = found[root]
            continue
        if rule and rule.encoding is not None:
            if rule.encoding.granularity != "float":
                found[name] = _placed(name, _unsigned(rule.encoding), ())
            continue
        bits = rule.bits if rule else options.act_bw
        symmetric = options.act_quantizer_schema != "asymmetric"
        if options.act_quantizer_schema == "unsignedsymmetric":
            symmetric = bool(calibration.range(root, "min_max")[0] < 0)
        if rule and rule.symmetric is not None:
            symmetric = rule.symmetric
        with _fitting(name):
            found[name] = calibration.qparams(root, Grid(bits, symmetric=symmetric), method)
    return found


def _unsigned(encoding: Encoding) -> Encoding:
    """The same numbers in unsigned codes, as activations have them; 1.0.0 reads symmetric ones as signed."""
    if not encoding.signed or encoding.block_size:
        return encoding
    return replace(encoding, signed=False, zero_point=encoding.zero_point + (1 << encoding.bits - 1))


def _params(
    network: onnx.ModelProto, tensors: Tensors, options: Options, rules: Mapping[str, Rule], notes: list[str]
) -> dict[str, QParams | LPBQ]:
    view, used, params = fuse.View(network), set(), {}
    for name, axis in tensors.weights.items():
        convolution = view.readers[name][0].op_type in _CONVOLUTIONS
        flag = "use_per_channel_quantization" if convolution else "use_per_row_quantization"
        fine = getattr(options, flag)
        used |= {flag} if fine else set()
        found = _weight(name, view.value(name), axis, fine, options, rules.get(name))
        if found is not None:
            params[name] = found
    for name in tensors.constants:
        rule = rules.get(name)
        if rule is None or rule.encoding is None:
            with _fitting(name):
                params[name] = choose_qparams(view.value(name), Grid(rule.bits if rule else options.act_bw))
        elif rule.encoding.granularity != "float":
            params[name] = _placed(name, rule.encoding, view.value(name).shape)
    for flag, kind in (("use_per_channel_quantization", "convolution"), ("use_per_row_quantization", "MatMul or Gemm")):
        if getattr(options, flag) and flag not in used:
            notes.append(f"--{flag} changed nothing: the network has no {kind} with constant weights")
    return params


def _weight(
    name: str, values: np.ndarray, axis: int, fine: bool, options: Options, rule: Rule | None
) -> QParams | LPBQ | None:
    """A weight's encoding; None to leave it float."""
    if rule and rule.encoding is not None:
        return None if rule.encoding.granularity == "float" else _placed(name, rule.encoding, values.shape, axis)
    bits = rule.bits if rule else options.weight_bw
    symmetric = fine or bits != 8 or options.param_quantizer_schema != "asymmetric"
    if rule and rule.symmetric is not None:
        symmetric = rule.symmetric
    blocks = tuple(1 if fine and i == axis else -1 for i in range(values.ndim))
    if rule and rule.block_size:
        inner = 1 if axis == 0 else values.ndim - 2 if axis == values.ndim - 1 else 0  # Conv, MatMul, ConvTranspose
        blocks = tuple({inner: rule.block_size, axis: 1}.get(i, -1) for i in range(values.ndim))
    make = _OBSERVERS[options.param_quantizer_calibration]
    more = (options.percentile_calibration_value,) if make is observers.PercentileObserver else ()
    with _fitting(name):
        observer = make(*more, block_size=blocks).update(values)
        return observer.qparams(Grid(bits, signed=symmetric, symmetric=symmetric, block_size=blocks))


def _placed(name: str, encoding: Encoding, shape: tuple[int, ...], axis: int | None = None) -> QParams | LPBQ:
    with _fitting(name):
        return encoding.qparams(shape, axis)


@contextlib.contextmanager
def _fitting(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"what is asked for {name!r} does not fit: {error}") from None


# -- judging ---------------------------------------------------------------------------------------------------------


def legality(converted: Converted, arches: Sequence[str]) -> list[str]:
    """What the table of `capabilities` says against a quantized network, in one line for each kind of operator."""
    table = capabilities.recorded()
    against: dict[capabilities.Probe, list[str]] = {}
    for node, probe in kinds(converted.network).items():
        if any(not table[probe][arch].accepted for arch in arches):
            against.setdefault(probe, []).append(node)
    return [
        f"{', '.join(arch for arch in arches if not table[probe][arch].accepted)} refuse {in_words(probe)}: "
        f"{len(nodes)} nodes, {nodes[0]} the first"
        for probe, nodes in against.items()
    ]


def in_words(probe: capabilities.Probe) -> str:
    """A question of the table of `capabilities` as one would say it."""
    shared = {"tensor": "a scale per tensor", "channel": "a scale per channel"}
    grain = shared.get(probe.granularity, probe.granularity.replace("block", "blocks of").replace("LPBQ", "LPBQ of"))
    return f"{probe.op} of {probe.activation} with int{probe.weight_bits} weights ({grain})"


def kinds(network: onnx.ModelProto) -> dict[str, capabilities.Probe]:
    """The questions of `capabilities` that a quantized network puts: by node, for those whose weights are integers."""
    view, table, found = fuse.View(network), capabilities.recorded(), {}
    for node in view.nodes:
        op = "Conv" if node.op_type in _CONVOLUTIONS else node.op_type
        weight = view.makers.get(node.input[1]) if op in capabilities.OPS else None
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in view.constants:
            continue
        source = view.makers.get(node.input[0])
        codes = source.input[2] if source is not None and source.op_type == "DequantizeLinear" else ""
        kind = f"uint{view.value(codes).dtype.itemsize * 8}" if codes in view.constants else "float32"
        probe = capabilities.Probe(op, _bits(view, weight.input[0]), kind, _grain(view, weight))
        if probe in table:
            found[node.name] = probe
    return found


def _bits(view: fuse.View, name: str) -> int:
    from onnx import TensorProto

    small = {TensorProto.INT4: 4, TensorProto.UINT4: 4}
    return small.get(view.constants[name].data_type) or view.value(name).dtype.itemsize * 8


def _grain(view: fuse.View, weight: onnx.NodeProto) -> str:
    """Who shares a scale, in the words of the table; of blocks it has two sizes, and the nearer one answers."""
    block = graph.attribute(weight, "block_size", 0)
    if block:
        return "LPBQ 32" if weight.input[1] in view.makers else f"block {128 if block >= 128 else 32}"
    return "tensor" if view.value(weight.input[1]).size == 1 else "channel"


def layer_sqnr(converted: Converted, samples: Sequence[Any]) -> dict[str, float]:
    """How well each tensor of the quantized network keeps that of the float one (dB, over all samples).

    All noise that has gathered on the way to a tensor is in its number, not only that of its own rounding.
    """
    computed = _computed(converted.float_network)
    names = [name for name in converted.encodings.activations if name in computed]
    names += [name for name in outputs(converted.float_network) if name not in names and name in computed]
    power, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    runs = [Runner(model, names) for model in (converted.float_network, converted.network)]
    for sample in samples:
        for name, real, rounded in zip(names, *(run(sample) for run in runs)):
            power[name] += float(np.sum(np.square(real, dtype=np.float64)))
            noise[name] += float(np.sum(np.square(real.astype(np.float64) - rounded)))
    return {name: _ratio_db(power[name], noise[name]) for name in names}


def _ratio_db(power: float, noise: float) -> float:
    return sqnr_db(np.array([power**0.5, 0.0]), np.array([power**0.5, noise**0.5]))


def outputs(network: onnx.ModelProto) -> list[str]:
    """The names of a network's outputs of float32."""
    from onnx import TensorProto

    return [entry.name for entry in network.graph.output if entry.type.tensor_type.elem_type == TensorProto.FLOAT]


def layers(converted: Converted) -> list[str]:
    """The tensors that operators with weights give out, after the activation that is one with them."""
    view, known, found = fuse.View(converted.float_network), converted.encodings.activations, []
    for node in view.nodes:
        if len(node.input) > 1 and node.input[1] in converted.tensors.weights:
            name = node.output[0]
            after = view.only_reader(name) if name not in known else None
            found.append(after.output[0] if after is not None else name)
    return found


def _computed(network: onnx.ModelProto) -> set[str]:
    return {name for node in network.graph.node for name in node.output}


class Runner:
    """A network in ONNX Runtime with some inner tensors made outputs; call it with a sample.

    Parameters
    ----------
    network : ModelProto
    names : sequence of str
        The tensors that a call returns.
    optimized : bool
        Let ONNX Runtime rewrite the network and take its integer kernels; without, a QDQ network is computed as it is
        written, in floats between its codes.

    Raises
    ------
    ValueError
        In one sentence, if ONNX Runtime does not take the network, or, when called, the sample.
    """

    def __init__(self, network: onnx.ModelProto, names: Sequence[str], optimized: bool = False) -> None:
        import onnxruntime as ort
        from onnx import helper

        network, self.names = graph.copy_of(network), list(names)
        there = {output.name for output in network.graph.output}
        network.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in there)
        options = ort.SessionOptions()
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        content, providers = network.SerializeToString(), ["CPUExecutionProvider"]
        self._session = _in_a_sentence(ort.InferenceSession, content, options, providers=providers)

    def __call__(self, sample: Mapping[str, np.ndarray] | np.ndarray) -> list[np.ndarray]:
        if not isinstance(sample, Mapping):
            sample = {self._session.get_inputs()[0].name: sample}
        return _in_a_sentence(self._session.run, self.names, dict(sample))


def _in_a_sentence(call: Callable[..., Any], *args: Any, **more: Any) -> Any:
    try:
        return call(*args, **more)
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"ONNX Runtime does not take this: {said}") from None
