"""Checkpoints larger than the memory, quantized tensor by tensor: safetensors in, packed safetensors and encodings out.

A packed weight ``w`` of shape (rows, columns) lies in the output as

* ``w.codes``: 4-bit codes two a byte, the first in the low half, row after row (what ONNX keeps as raw data), of shape
  (ceil(rows * columns / 2),); 8-bit codes one a byte, (rows, columns);
* ``w.scale``: (rows, blocks), or (rows, 1) per channel and for LPBQ, or (1, 1) per tensor;
* ``w.zero_point`` of unsigned codes, and ``w.block_scale``, LPBQ's integers minus 1: packed as the codes are.

A real number is ``(code - zero_point) * scale``; the last block of a row may be shorter.  quantization.json says which
tensors are packed in which format, with the CRC-32 of their bytes.  All sizes follow from shapes and formats, so that
every tensor has its place before the first is read; a journal beside the output names those that are in place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qtools import encodings
from qtools._files import replace_file, replace_json
from qtools.affine import LPBQ, QParams, blocks_of, dequantize, unpack_int4
from qtools.llm._shards import INDEX, Stored, layout, read_checkpoint
from qtools.llm._tensor import Task, checksum, run
from qtools.llm.formats import Format, assign

if TYPE_CHECKING:
    from torch import Tensor

    from qtools.llm.llama import Llama

_MANIFEST, _ENCODINGS = "quantization.json", "encodings.json"
_COPIED = (".json", ".txt", ".model", ".jinja", ".md", "")  # configuration and tokenizer, beside the weights
_MOST_SCALES = 1 << 24  # what an encodings file of 512 MB has room for
_FRESH = 1 << 30  # bytes that are read before what became of them is written to the disk


class Summary(NamedTuple):
    """What became of a checkpoint.

    `tensors` that were quantized, in `bits` per weight with all that belongs to them; bytes of all tensors `read` and
    `written`; whether there is an encodings file, which is left out where it would exceed 512 MB.
    """

    tensors: int
    bits: float
    read: int
    written: int
    encodings: bool


def quantize(
    source: Path | str,
    output: Path | str,
    scheme: Mapping[str, str],
    *,
    moments: Path | str | None = None,
    progress: bool = False,
) -> Summary:
    """Quantize the weights of a checkpoint into a folder that is there whole, or not at all.

    Tensors are joblib tasks: ``joblib.parallel_config`` says where they run (threads here, by default one).  Each holds
    some 30 MB, but with moments its whole matrix and theirs.  After a kill at any point the same call goes on where it
    was, to the same bytes.

    Parameters
    ----------
    source : path
        A safetensors file, or a folder as Hugging Face lays it out; float16, bfloat16 or float32.
    output : path
        A new folder: a file of packed tensors for each of the source's, quantization.json, encodings.json (2.0.0),
        and what lies beside the weights of the source.
    scheme : mapping of str to str
        Patterns with ``*`` to formats as `Format.parse` reads them, or 'keep'.  A tensor goes by a pattern that is its
        very name, else by the last one that matches; one without any is kept.  `SCHEMES` has some.
    moments : path, optional
        Safetensors with mean products of the inputs of a layer with each other, as `write_moments` writes them.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    ValueError
        If there is something wrong with the source, a format, a name without ``*`` in the scheme, the moments, or the
        output; if a weight is NaN or infinite.  Nothing is written then.

    References
    ----------
    J. Lin et al., AWQ, MLSys 2024 (its clipping); E. Frantar et al., GPTQ, ICLR 2023.
    """
    from tqdm import tqdm

    source, output = Path(source), Path(output).resolve()
    files, tensors = read_checkpoint(source)
    forms = assign(scheme, tensors)
    extra, grams = read_checkpoint(moments) if moments else ([], {})
    tasks, headers = _plan(tensors, forms, grams)
    summary = _summary(tasks)
    stamp = [[path.name, path.stat().st_size] for path in files + extra]
    job = hashlib.sha256(json.dumps([1, stamp, {name: str(form) for name, form in forms.items()}]).encode()).hexdigest()
    work = output.parent / f".{output.name}.partial"
    if _finished(output, job, files + extra):
        shutil.rmtree(work, ignore_errors=True)
        return summary
    _check_place(source, output, summary.written)
    tasks = [task._replace(target=work / "model" / task.target) for task in tasks]
    done = _begun(work, [job, *(path.stat().st_mtime_ns for path in files + extra)], headers, tasks)
    bar = partial(tqdm, desc="quantizing", unit="B", unit_scale=True, file=sys.stderr, disable=not progress)
    try:
        with bar(total=summary.read) as shown, open(work / "journal", "a", encoding="utf-8") as journal:
            shown.update(sum(task.source.size for task in tasks if task.name in done))
            for task, found in _worked([task for task in tasks if task.name not in done]):
                print(json.dumps([task.name, found]), file=journal, flush=True)
                done[task.name] = found
                shown.update(task.source.size)
    except ValueError:
        shutil.rmtree(work)
        raise
    for path in {task.target for task in tasks}:
        _sync(path)
    _finish(work / "model", source, tasks, done, job, summary.encodings)
    os.replace(work / "model", output)
    shutil.rmtree(work)
    return summary


def write_moments(model: Llama, windows: Tensor, path: Path | str, *, progress: bool = False) -> None:
    """Mean products of the inputs of every linear layer with each other, as `quantize` takes them.

    Parameters
    ----------
    model : Llama
    windows : Tensor of int64 (count, length + 1)
        Of a text that the model will not be judged by.
    path : path
        Of the safetensors file to write: float32 (inputs, inputs) by the name of a weight.
    progress : bool
        Show a bar on stderr.
    """
    from safetensors.torch import save

    from qtools.llm.evaluate import perplexity
    from qtools.llm.llama import Taps

    sums: dict[str, Tensor] = {}
    last: list[Tensor] = []  # an input and its products, for the layers that read the same

    def look(name: str, x: Tensor) -> Tensor:
        if not (last and last[0] is x):
            rows = x.flatten(0, -2)
            last[:] = x, rows.T @ rows / windows[:, 1:].numel()
        sums[name] = sums[name] + last[1] if name in sums else last[1].clone()
        return x

    perplexity(model, windows, Taps(input=look), progress=progress)
    replace_file(Path(path), save(sums))


def load_packed(folder: Path | str) -> Packed:
    """The weights of a folder that `quantize` wrote, each dequantized when it is asked for; see `Packed`."""
    return Packed(folder)


class Packed(Mapping[str, np.ndarray]):
    """Names to weights: float32 where they are packed, else as they were; each read when asked for, and not kept.

    Parameters
    ----------
    folder : path
        As `quantize` writes it.

    Raises
    ------
    ValueError
        If it is no such folder, or is damaged; on reading, if the bytes of a weight are not those that were written.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            content = json.loads((self.folder / _MANIFEST).read_bytes())
            self.formats = {name: Format.parse(one["format"]) for name, one in content["tensors"].items()}
            self.shapes = {name: tuple(one["shape"]) for name, one in content["tensors"].items()}
            self._checksums: dict[str, int] = content["checksums"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder} is no folder of packed weights: {error}") from None
        self._stored = read_checkpoint(self.folder)[1]
        if lost := [name for name in self._checksums if not self._stored.keys() >= {*self._parts(name).values()}]:
            raise ValueError(f"{self.folder} lacks the tensor {lost[0]!r}")

    def __getitem__(self, name: str) -> np.ndarray:
        parts = self._parts(name)
        arrays = {part: self._array(stored) for part, stored in parts.items()}
        checksum = 0
        for array in arrays.values():
            checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8), checksum)
        if checksum != self._checksums[name]:
            raise ValueError(f"{self.folder}: the bytes of {name} are not those that were written")
        if name not in self.formats:
            return arrays[""]
        encoding = self.qparams(name)
        return dequantize(self.codes(name), encoding.qparams if isinstance(encoding, LPBQ) else encoding)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checksums)

    def __len__(self) -> int:
        return len(self._checksums)

    def codes(self, name: str) -> np.ndarray:
        """The codes of a packed weight, in its shape."""
        form = self.formats[name]
        return _unpacked(self._array(f"{name}.codes"), self.shapes[name], form.bits, form.symmetric)

    def qparams(self, name: str) -> QParams | LPBQ:
        """What its codes mean."""
        form, scale = self.formats[name], self._array(f"{name}.scale").astype(np.float32)
        counts = tuple(count for count, _ in blocks_of(self.shapes[name], form.grid.block_size))
        if form.lpbq:
            integers = _unpacked(self._array(f"{name}.block_scale"), counts, form.bits, False) + np.uint8(1)
            return LPBQ(QParams(form.grid, integers * scale, np.zeros(counts, np.int32)), integers, scale)
        if form.symmetric:
            return QParams(form.grid, scale, np.zeros(counts, np.int32))
        zero_point = _unpacked(self._array(f"{name}.zero_point"), counts, form.bits, False)
        return QParams(form.grid, scale, zero_point.astype(np.int32))

    def _parts(self, name: str) -> dict[str, str]:
        form = self.formats.get(name)
        return {part: f"{name}.{part}" for part in form.parts(*self.shapes[name])} if form else {"": name}

    def _array(self, stored: str) -> np.ndarray:
        from safetensors import safe_open

        with safe_open(self._stored[stored].path, "np") as file:
            return file.get_tensor(stored)


def _unpacked(array: np.ndarray, shape: tuple[int, ...], bits: int, signed: bool) -> np.ndarray:
    return unpack_int4(array, shape, signed=signed) if bits == 4 else array


# -- the job ---------------------------------------------------------------------------------------------------------


def _gram(name: str, form: Format | None, inputs: int, moments: Mapping[str, Stored]) -> Stored | None:
    if form is None or form.method == "nearest":
        return None
    if name not in moments:
        raise ValueError(f"{name} can become {form} only with moments of its inputs, and there are none")
    if (found := moments[name]).shape != (inputs, inputs) or found.dtype != "F32":
        raise ValueError(f"{name} has {inputs} inputs, and its moments are {found.dtype} of shape {found.shape}")
    return found


def _plan(
    tensors: Mapping[str, Stored], forms: Mapping[str, Format], moments: Mapping[str, Stored]
) -> tuple[list[Task], dict[str, bytes]]:
    """What is to be done, and the headers of the files; sizes follow from shapes and formats."""
    tasks, headers = [], {}
    new = {f"{name}.{part}" for name, form in forms.items() for part in form.parts(*tensors[name].shape)}
    if taken := new & tensors.keys():
        raise ValueError(f"there is a tensor {min(taken)!r} already, as a part of a packed one would be named")
    for path in dict.fromkeys(one.path for one in tensors.values()):
        parts: dict[str, dict[str, Any]] = {}
        for name, one in tensors.items():
            if one.path == path:
                form = forms.get(name)
                made = form.parts(*one.shape) if form else {"": (one.dtype, one.shape)}
                parts[name] = {part: (*what, _bytes(*what) if form else one.size) for part, what in made.items()}
        flat = {_joined(name, part): what for name, made in parts.items() for part, what in made.items()}
        headers[path.name], places = layout(flat)
        for name, made in parts.items():
            form, one = forms.get(name), tensors[name]
            at = {part: places[_joined(name, part)] for part in made}
            tasks.append(Task(name, one, form, _gram(name, form, one.shape[-1], moments), Path(path.name), at))
    return tasks, headers


def _joined(name: str, part: str) -> str:
    return f"{name}.{part}" if part else name


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * {"F32": 4, "F16": 2, "BF16": 2}.get(kind, 1)


def _summary(tasks: list[Task]) -> Summary:
    packed = [task for task in tasks if task.form]
    weights = sum(math.prod(task.source.shape) for task in packed)
    sizes = [sum(size for _, size in task.places.values()) for task in tasks]
    bits = 8 * sum(size for task, size in zip(tasks, sizes) if task.form) / max(weights, 1)
    scales = sum(math.prod(n for n, _ in blocks_of(task.source.shape, task.form.grid.block_size)) for task in packed)
    return Summary(len(packed), bits, sum(task.source.size for task in tasks), sum(sizes), scales <= _MOST_SCALES)


def _finished(output: Path, job: str, files: list[Path]) -> bool:
    """Whether the output is there already, made of these very files."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        same = json.loads((output / _MANIFEST).read_bytes())["job"] == job
        made = (output / _MANIFEST).stat().st_mtime_ns
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same or any(path.stat().st_mtime_ns > made for path in files):
        raise ValueError(f"{output} exists already: delete it, or name another output")
    return True


def _check_place(source: Path, output: Path, size: int) -> None:
    folder = source.resolve()
    if source.is_dir() and (output.is_relative_to(folder) or folder.is_relative_to(output)):
        raise ValueError(f"the output {output} and the source {source} must not lie in each other")
    parent = next(path for path in output.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{parent} is no folder that can be written to")
    if (free := shutil.disk_usage(parent).free) < size:
        raise ValueError(f"{output} needs {size / 1e9:.2f} GB, and there are {free / 1e9:.2f} GB free")


def _begun(work: Path, job: list[Any], headers: Mapping[str, bytes], tasks: list[Task]) -> dict[str, int]:
    """Checksums of what an interrupted run of the same job has left in place; else all files, still empty."""
    journal, ends = work / "journal", {}
    lines = _lines(journal.read_bytes()) if journal.exists() else []
    if lines and lines[0] != job:
        raise ValueError(f"{work} is what another run has left, of other files or with another scheme: delete it")
    for task in tasks:
        ends[task.target] = max([ends.get(task.target, 0), *(start + size for start, size in task.places.values())])
    (work / "model").mkdir(parents=True, exist_ok=True)
    for path in {*(work / "model").iterdir()} - ends.keys():
        path.unlink()  # half of what is made anew in the end
    for path, end in ends.items():
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.write(headers[path.name])
            file.truncate(max(end, len(headers[path.name])))
    claimed = dict(lines[1:])
    kept = [task for task in tasks if task.name in claimed and claimed[task.name] == checksum(task)]
    done = {task.name: claimed[task.name] for task in kept}
    replace_file(journal, b"".join(json.dumps(line).encode() + b"\n" for line in [job, *done.items()]))
    return done


def _worked(tasks: list[Task]) -> Iterator[tuple[Task, int]]:
    """Tasks as they are done; what they write goes to the disk while the next ones are worked on."""
    import joblib

    fresh = 0
    with ThreadPoolExecutor(1) as flusher:
        each = joblib.Parallel(prefer="threads", return_as="generator_unordered")
        for task, found in each(joblib.delayed(run)(task) for task in tasks):
            yield task, found
            fresh += task.source.size
            if fresh > _FRESH:
                flusher.submit(_sync, task.target)
                fresh = 0


def _lines(journal: bytes) -> list[Any]:
    """What a journal says, up to where it is torn."""
    found = []
    for line in journal.splitlines(keepends=True):
        try:
            found.append(json.loads(line) if line.endswith(b"\n") else None)
        except ValueError:
            found.append(None)
    return found[: found.index(None)] if None in found else found


def _sync(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def _finish(folder: Path, source: Path, tasks: list[Task], done: Mapping[str, int], job: str, wanted: bool) -> None:
    """What belongs to the weights: the index, the manifest, the encodings, and all that lay beside the source."""
    files = {_joined(task.name, part): task.target.name for task in tasks for part in task.places}
    packed = {task.name: {"format": str(task.form), "shape": task.source.shape} for task in tasks if task.form}
    checksums = {task.name: done[task.name] for task in tasks}
    replace_json(folder / _MANIFEST, {"job": job, "tensors": packed, "checksums": checksums})
    if (source / INDEX).is_file():
        size = sum(size for task in tasks for _, size in task.places.values())
        replace_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": files})
    ours = {INDEX, _MANIFEST, _ENCODINGS}
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_file() and path.suffix in _COPIED and path.name not in ours:
            shutil.copyfile(path, folder / path.name)
    if wanted:
        _write_encodings(folder, list(packed))


def _write_encodings(folder: Path, names: list[str]) -> None:
    """A file of 2.0.0, one tensor after the other."""
    weights, opening = Packed(folder), '{"version": "2.0.0", "encodings": ['
    with open(folder / _ENCODINGS, "w", encoding="utf-8") as file:
        for name in names:
            encoding = encodings.Encoding.from_qparams(weights.qparams(name))
            file.write(opening + json.dumps(encodings._write_2(name, encoding, "2.0.0")))
            opening = ",\n"
        file.write("]}\n")
