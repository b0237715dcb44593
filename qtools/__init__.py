"""Quantization of neural networks for Qualcomm's Hexagon NPU: from the equations to the chip's own backend.

The modules stand in the order of the course. Importing ``qtools`` loads none of them: each is loaded when it is first
used, and torch, onnx and onnxruntime when a function first needs them.

Examples
--------
>>> import qtools
>>> qtools.affine.__name__
'qtools.affine'
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_SUBMODULES = (
    "affine",
    "metrics",
    "observers",
    "qdq",
    "encodings",
    "zoo",
    "npu",
    "ptq",
    "mixed_precision",
    "qat",
    "suite",
    "cli",
)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'qtools' has no attribute '{name}': its modules are {', '.join(_SUBMODULES)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
