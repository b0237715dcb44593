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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnxruntime

SOC_OF_ARCH = {"v68": "30", "v69": "36", "v73": "43", "v75": "57", "v79": "69", "v81": "87"}
"""Hexagon architecture to the SoC id of one phone chip that has it: SM8350, SM8450, SM8550, SM8650, SM8750, SM8850.

Source: the SoC table of ExecuTorch's Qualcomm backend (``serialization/qc_schema.py``).
"""

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
    device = _device()
    import onnxruntime
    import onnxruntime_qnn

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 2  # warnings tell who refused a node
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
    target = {"htp_arch": arch[1:], "soc_model": SOC_OF_ARCH[arch]}
    settings.add_provider_for_devices([device], {**backend, **target, **(options or {})})
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
    with _silence():
        return dict(zip(names, opened.run(names, dict(inputs)), strict=True))


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
