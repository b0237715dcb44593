"""Input lists: text files that name the raw tensors of each calibration sample, as Qualcomm's tools read them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    import onnx

_MOST_BYTES = 64 << 20
Shapes = dict[str, tuple[tuple[int, ...], np.dtype]]


class InputList(Sequence):
    """The samples of an input list; each is read from disk when it is asked for.

    Parameters
    ----------
    samples : list of dict
        Input name to file.
    shapes : dict
        Input name to shape and dtype.
    """

    def __init__(self, samples: list[dict[str, Path]], shapes: Shapes) -> None:
        self._samples, self._shapes = samples, shapes

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    @overload
    def __getitem__(self, index: slice) -> InputList: ...

    def __getitem__(self, index: int | slice) -> dict[str, np.ndarray] | InputList:
        if isinstance(index, slice):
            return InputList(self._samples[index], self._shapes)
        return {name: self._read(name, path) for name, path in self._samples[index].items()}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))

    def _read(self, name: str, path: Path) -> np.ndarray:
        shape, dtype = self._shapes[name]
        size, expected = path.stat().st_size, 4 * math.prod(shape)
        if size != expected:
            raise ValueError(
                f"{path} has {size} bytes; the input {name!r} of shape {shape} takes {expected} as raw float32"
            )
        values = np.fromfile(path, "<f4").reshape(shape)
        if not np.isfinite(values).all():
            raise ValueError(f"{path} holds NaN or infinity")
        with np.errstate(over="ignore", invalid="ignore"):
            cast = values.astype(dtype)
        if dtype.kind != "f" and not np.array_equal(cast.astype(np.float32), values):
            raise ValueError(f"{path} holds numbers that are none of the {dtype} that the input {name!r} takes")
        return cast


def read_input_list(path: Path | str, network: onnx.ModelProto) -> InputList:
    """Read an input list: a sample a line, ``file`` or ``name:=file name2:=file2``; raw little-endian float32.

    Lines that begin with ``#`` or ``%`` name output layers for other tools and are skipped.  Files are looked for from
    the current folder, then from that of the list; blanks separate, so no path can hold one.

    Raises
    ------
    ValueError
        In one sentence: the line that is wrong, a file that is missing, an input that the network does not have or
        whose shape is not fixed.
    OSError
        If the list cannot be read.
    """
    path, shapes = Path(path), input_shapes(network)
    samples = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip() and not line.lstrip().startswith(("#", "%")):
            samples.append(_sample(f"{path}, line {number}", line.split(), list(shapes), path.parent))
    if not samples:
        raise ValueError(f"{path} names no sample")
    return InputList(samples, shapes)


def input_shapes(network: onnx.ModelProto) -> Shapes:
    """Shape and dtype of every input.

    Raises
    ------
    ValueError
        If a shape is not fixed, or an input holds no numbers.
    """
    return {entry.name: _shape(entry) for entry in network.graph.input}


def _text(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)  # a device or a pipe may never end
    try:
        if len(content) <= _MOST_BYTES and b"\0" not in content:
            return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    raise ValueError(f"{path} is not a text file: an input list names one sample a line")


def _sample(place: str, words: list[str], inputs: list[str], folder: Path) -> dict[str, Path]:
    if not any(":=" in word for word in words):
        if len(words) > 1:
            raise ValueError(f"{place}: paths in an input list hold no blanks, and several inputs need NAME:=FILE each")
        if len(inputs) != 1:
            raise ValueError(
                f"{place}: the network has {len(inputs)} inputs, so each needs its name: {inputs[0]}:=file"
            )
        return {inputs[0]: _found(place, words[0], folder)}
    sample = {}
    for word in words:
        name, _, file = word.partition(":=")
        if not file or name not in inputs:
            raise ValueError(f"{place}: {word!r} is not NAME:=FILE with one of the inputs {', '.join(inputs)}")
        if name in sample:
            raise ValueError(f"{place}: the input {name!r} is given twice")
        sample[name] = _found(place, file, folder)
    if missing := [name for name in inputs if name not in sample]:
        raise ValueError(f"{place}: no file for the input {missing[0]!r}")
    return sample


def _found(place: str, file: str, folder: Path) -> Path:
    places = (Path(file), folder / file)
    for path in places:
        if path.is_file():
            return path
    what = "a folder, not a file" if any(path.is_dir() for path in places) else "no such file"
    raise ValueError(f"{place}: {what}: {file!r}")


def _shape(entry: onnx.ValueInfoProto) -> tuple[tuple[int, ...], np.dtype]:
    name, tensor = entry.name, entry.type.tensor_type
    dims = tuple(dim.dim_value for dim in tensor.shape.dim)
    if not tensor.HasField("shape") or any(size < 1 for size in dims):
        raise ValueError(f"the input {name!r} has no fixed shape: give one with --input_dim {name} 1,3,224,224")
    return dims, _dtype(name, tensor.elem_type)


def _dtype(name: str, number: int) -> np.dtype:
    from onnx import helper

    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(number))
    except (KeyError, ValueError):
        dtype = np.dtype(object)
    if dtype.kind not in "biuf":
        raise ValueError(f"the input {name!r} takes no numbers that raw float32 files could hold")
    return dtype
