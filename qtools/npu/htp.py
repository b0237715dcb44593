"""Networks on Qualcomm's own HTP backend, emulated on this computer, with CPU fallback switched off.

The optional package ``onnxruntime-qnn`` is an execution provider for ONNX Runtime.  On x86-64 Linux its HTP backend
emulates the Hexagon NPU: Qualcomm's graph compiler and kernels, run on the host.  What it computes is therefore called
'HTP backend (emulated)' throughout; how long it takes says nothing about a phone.

The wrapper is MIT; Qualcomm's libraries inside it come under Qualcomm's own licence (a PDF in the package), which
grants running and benchmarking one's networks on them and forbids reverse engineering.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnxruntime

SOCS = {
    "sm8350": ("v68", "30"), "sm8450": ("v69", "36"), "sm8475": ("v69", "42"), "sm8550": ("v73", "43"),
    "sc8380xp": ("v73", "60"), "sm8650": ("v75", "57"), "sm8750": ("v79", "69"), "sm8850": ("v81", "87"),
    "sa8295": ("v68", "39"), "sa8255": ("v73", "52"), "qcm6490": ("v68", "93"), "qcs9100": ("v73", "77"),
}  # fmt: skip
"""Chip to its Hexagon architecture and SoC id.

Source: the SoC table of ExecuTorch's Qualcomm backend (``serialization/qc_schema.py``).
"""

SOC_OF_ARCH = {SOCS[soc][0]: SOCS[soc][1] for soc in ("sm8350", "sm8450", "sm8550", "sm8650", "sm8750", "sm8850")}
"""Hexagon architecture to the SoC id of one phone chip that has it."""

_PROVIDER = "QNNExecutionProvider"


class HTPUnavailable(RuntimeError):
    """The backend is not installed here, is switched off, or does not start."""


class HTPRefused(ValueError):
    """The backend does not take a graph; the message names the nodes and carries the backend's own words.

    `by` says who refused: ``"library"``, Qualcomm's HTP library when asked to validate a node, or ``"provider"``, the
    open-source ONNX Runtime execution provider that translates the graph for it.
    """

    def __init__(self, message: str, by: Literal["library", "provider"]) -> None:
        super().__init__(message)
        self.by = by


@dataclass(frozen=True)
class Status:
    """Whether the HTP backend can be used here, why not, and which version it is."""

    available: bool
    reason: str
    version: str | None = None


def status() -> Status:
    """Whether the HTP backend is installed and switched on; looks only, starts nothing.

    The environment variable ``QTOOLS_HTP=0`` switches it off.
    """
    if os.environ.get("QTOOLS_HTP") == "0":
        return Status(False, "switched off by QTOOLS_HTP=0")
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return Status(
            False, "the package onnxruntime-qnn is not installed (pip install onnxruntime-qnn, on x86-64 Linux)"
        )
    version = importlib.metadata.version("onnxruntime-qnn")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return Status(False, f"onnxruntime-qnn {version} emulates the NPU on x86-64 Linux only", version)
    return Status(True, f"onnxruntime-qnn {version}", version)


def session(
    model: onnx.ModelProto | bytes | os.PathLike | str, arch: str = "v75", options: Mapping[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session whose every node runs on the HTP backend.

    Parameters
    ----------
    model : ModelProto, serialized bytes, or path of an ONNX file
    arch : str
        Hexagon architecture, a key of `SOC_OF_ARCH`.
    options : mapping of str to str, optional
        Further options of the execution provider.

    Raises
    ------
    HTPUnavailable
        If the backend cannot be used here.
    HTPRefused
        If it leaves a node of the model to the CPU.
    FileNotFoundError, ValueError
        If there is no such file, or it holds no ONNX model.
    """
    if arch not in SOC_OF_ARCH:
        raise ValueError(f"arch must be one of {', '.join(SOC_OF_ARCH)}, got {arch!r}")
    return _open(model, arch, SOC_OF_ARCH[arch], options or {}, {})


def export(model: onnx.ModelProto | bytes | os.PathLike | str, soc: str, stem: os.PathLike | str) -> list[Path]:
    """What a phone needs of a network, written by the backend (emulated): ``STEM_net.json``, ``.dlc``, ``_SOC.bin``.

    The first is the graph as the backend sees it, the second Qualcomm's container of it, the third the compiled
    context binary for one chip, with the small ONNX file that loads it (``STEM_SOC.onnx``).

    Parameters
    ----------
    model : ModelProto, serialized bytes, or path of an ONNX file
        With quantized inputs and outputs or float ones; fixed shapes.
    soc : str
        A key of `SOCS`.
    stem : path
        Where the files go; those of earlier runs are replaced once all are made.

    Returns
    -------
    list of Path
        The files, in the order above.

    Raises
    ------
    HTPUnavailable, HTPRefused
        As `session`.
    ValueError
        If there is no such chip.
    """
    if soc.lower() not in SOCS:
        raise ValueError(f"soc must be one of {', '.join(SOCS)}, got {soc!r}")
    (arch, model_id), stem = SOCS[soc.lower()], Path(stem)
    with tempfile.TemporaryDirectory(dir=stem.parent, prefix=".qtools-export-") as scratch:
        folder = Path(scratch)
        for part in ("json", "dlc", "context"):
            (folder / part).mkdir()
        _open(model, arch, model_id, {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(folder / "json")}, {})
        library = Path(_htp_path()).with_name("libQnnIr.so")
        dlc = {"dump_qnn_ir_dlc": "1", "dump_qnn_ir_dlc_dir": str(folder / "dlc"), "qnn_ir_backend_path": str(library)}
        _open(model, arch, model_id, dlc, {})
        loader = folder / "context" / f"{stem.name}_{soc.lower()}.onnx"
        entries = {"ep.context_enable": "1", "ep.context_file_path": str(loader), "ep.context_embed_mode": "0"}
        _open(model, arch, model_id, {}, entries)
        made = {
            stem.with_name(f"{stem.name}_net.json"): _only(folder / "json", "*_0.json"),
            stem.with_name(f"{stem.name}.dlc"): _only(folder / "dlc", "*.dlc"),
            loader.name: loader,
        } | {path.name: path for path in (folder / "context").glob("*.bin")}
        placed = {stem.with_name(Path(target).name): source for target, source in made.items()}
        for target, source in placed.items():
            os.replace(source, target)
    return list(placed)


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise HTPRefused(f"the backend made {len(found)} graphs of this network instead of one", "provider")
    return found[0]


def _htp_path() -> str:
    import onnxruntime_qnn

    return onnxruntime_qnn.get_qnn_htp_path()


def _open(
    model: onnx.ModelProto | bytes | os.PathLike | str,
    arch: str,
    soc_model: str,
    options: Mapping[str, str],
    entries: Mapping[str, str],
) -> onnxruntime.InferenceSession:
    device = _device()
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 2  # warnings tell who refused a node
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        settings.add_session_config_entry(key, value)
    backend = {"backend_path": _htp_path(), "htp_arch": arch[1:], "soc_model": soc_model}
    settings.add_provider_for_devices([device], {**backend, **options})
    source = model if isinstance(model, bytes) else os.fspath(model) if _is_path(model) else model.SerializeToString()
    if _is_path(model) and not os.path.isfile(source):
        raise FileNotFoundError(f"no such ONNX file: {source}")
    with _silence() as said:
        try:
            return onnxruntime.InferenceSession(source, settings)
        except Exception as error:
            if "INVALID_PROTOBUF" in str(error) or "INVALID_GRAPH" in str(error):
                raise ValueError(f"not a valid ONNX model: {error}".replace("\n", " ")) from None
            raise _refusal(arch, str(error), said()) from None


def run(
    model: onnx.ModelProto | bytes | os.PathLike | str,
    inputs: Mapping[str, np.ndarray],
    arch: str = "v75",
    options: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Run a model once on the HTP backend (emulated); its outputs by name.

    Raises
    ------
    HTPUnavailable, HTPRefused
        As `session`.
    """
    opened = session(model, arch, options)
    names = [output.name for output in opened.get_outputs()]
    return dict(zip(names, quietly(opened.run, names, dict(inputs)), strict=True))


def quietly(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function of native code with its chatter kept out of the terminal and of notebooks."""
    with _silence():
        return call(*args)


@functools.cache
def _device() -> Any:
    """The NPU as ONNX Runtime lists it, after its library has been registered once in this process."""
    found = status()
    if not found.available:
        raise HTPUnavailable(f"no HTP backend: {found.reason}")
    import onnxruntime
    import onnxruntime_qnn

    def listed() -> list[Any]:
        return [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]

    with _silence():
        try:
            if not listed():
                onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
        except Exception as error:
            raise HTPUnavailable(f"the HTP backend does not start: {error}") from None
        devices = listed()
    if not devices:
        raise HTPUnavailable("the HTP backend lists no device on this computer")
    return devices[0]


def _is_path(model: Any) -> bool:
    return isinstance(model, str | os.PathLike)


def _refusal(arch: str, error: str, said: str) -> HTPRefused:
    """One sentence out of an error message and what the library printed."""
    nodes = re.findall(r"Unsupported nodes in QNN EP: (.*)", said)
    named = f": {nodes[-1].strip(' ,')}" if nodes and nodes[-1].strip() else ""
    reason = error.replace("\n", " ").split(" : ")[-1].strip()
    # Transposes that the provider put around a node it could not translate are refused with it, and tell nothing.
    failed = re.findall(r"of type `(\w+)` with error code (\d+)", said)
    by_library = [f"{op} with error {code}" for op, code in failed if op != "Transpose"]
    who = f"its library refuses {by_library[-1]}" if by_library else "its execution provider cannot translate it"
    message = f"the HTP backend ({arch}) does not take this graph{named}: {who} ({reason})"
    return HTPRefused(message, "library" if by_library else "provider")


@contextlib.contextmanager
def _silence() -> Iterator[Any]:
    """Keep what native code prints out of the terminal and of notebooks; yields a function that returns it."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        kept = [(fd, os.dup(fd)) for fd in (1, 2)]

        def said() -> str:
            libc.fflush(None)
            sink.seek(0)
            return re.sub(r"\x1b\[[\d;]*m", "", sink.read().decode(errors="replace"))

        try:
            for fd, _ in kept:
                os.dup2(sink.fileno(), fd)
            yield said
        finally:
            libc.fflush(None)
            for fd, copy in kept:
                os.dup2(copy, fd)
                os.close(copy)
