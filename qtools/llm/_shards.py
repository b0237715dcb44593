"""Safetensors files as places for bytes: where each tensor of a checkpoint lies, and where each of a new one will."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOATS = {"F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype(np.float32)}
"""The types of weights that can be quantized, by their names in safetensors."""

INDEX = "model.safetensors.index.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK = 8 << 20  # bytes of a tensor that are in memory at a time


class Stored(NamedTuple):
    """Where a tensor lies in a safetensors file, and of what type and shape it is."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def chunks(self, unit: int = 1) -> Iterator[np.ndarray]:
        """Its bytes in order, in pieces of whole pairs of `unit`, all in one buffer that is used again."""
        step = max(1, _CHUNK // (2 * unit)) * 2 * unit
        buffer = np.empty(min(step, self.size), np.uint8)
        with open(self.path, "rb") as file:
            file.seek(self.start)
            for first in range(0, self.size, step):
                part = buffer[: self.size - first]
                if file.readinto(part) != part.size:
                    raise ValueError(f"{self.path} has become shorter while it was read")
                yield part
                if hasattr(os, "posix_fadvise"):  # a file larger than the memory must not push out all else
                    os.posix_fadvise(file.fileno(), self.start + first, part.size, os.POSIX_FADV_DONTNEED)


def read_checkpoint(source: Path | str) -> tuple[list[Path], dict[str, Stored]]:
    """The files of a checkpoint (a safetensors file or a folder of one or of shards) and where its tensors lie.

    Raises
    ------
    ValueError
        If files are missing, damaged, or not safetensors, or do not hold what the index says.
    """
    source = Path(source)
    if source.is_file() and source.suffix == ".safetensors":
        return [source], _stored(source)
    if source.is_file() or not source.is_dir():
        pickle = source.is_file() and source.suffix in _PICKLES
        raise ValueError(f"{source} is {_PICKLED if pickle else 'neither a folder nor a safetensors file'}")
    if (config := source / "config.json").is_file() and not isinstance(_json(config), dict):
        raise ValueError(f"{config} is no object in JSON")
    if (source / INDEX).is_file():
        files, wanted = _indexed(source)
    else:
        files, wanted = sorted(source.glob("*.safetensors")), None
        if not files:
            pickled = sorted(path.name for path in source.iterdir() if path.suffix in _PICKLES)
            raise ValueError(f"{source / pickled[0]} is {_PICKLED}" if pickled else f"{source} has no safetensors file")
        if len(files) > 1:
            raise ValueError(f"{source} has {len(files)} safetensors files, and no {INDEX} to say what they are")
    tensors: dict[str, Stored] = {}
    for path in files:
        found = _stored(path)
        if wanted is not None and (odd := found.keys() ^ {n for n, file in wanted.items() if file == path.name}):
            raise ValueError(f"{path} and {INDEX} do not agree about the tensor {min(odd)!r}")
        tensors |= found
    return files, tensors


_PICKLED = "a pickle, which may run code when it is read: convert it to safetensors"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _indexed(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that an index names, and in which of them each tensor is."""
    content = _json(folder / INDEX)
    wanted = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(wanted, dict) or not wanted or not all(isinstance(file, str) for file in wanted.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map of tensors and files")
    files = sorted(set(wanted.values()))
    for file in files:
        if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            why = _PICKLED if file.endswith(_PICKLES) else "no safetensors file beside it"
            raise ValueError(f"{folder / INDEX} names {file!r}, which is {why}")
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, which {INDEX} names")
    return [folder / file for file in files], wanted


def _stored(path: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks that the header is sound, and the file as long as it says
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, one["dtype"], tuple(one["shape"]), 8 + length + first, last - first)
        for name, one in header.items()
        for first, last in [one["data_offsets"]]
    }


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a safetensors file for tensors of a type, shape and size, and start and size of each in the file.

    Large elements come first, and the header fills whole eights of bytes, so that all lie where processors like it.
    """
    offset, header, places = 0, {"__metadata__": {"format": "pt"}}, {}
    for name in sorted(tensors, key=lambda n: (-_element(*tensors[n][1:]), n)):
        dtype, shape, size = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
        places[name] = offset, size
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: (start + at, size) for name, (at, size) in places.items()}


def _element(shape: tuple[int, ...], size: int) -> int:
    return size // max(math.prod(shape), 1)
