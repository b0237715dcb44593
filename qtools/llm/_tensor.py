"""One tensor of a checkpoint: how its scales and codes are chosen, and how they get to their place in a file."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qtools.affine import LPBQ, QParams, choose_lpbq, fake_quantize, qparams_from_range
from qtools.llm._shards import FLOATS, Stored
from qtools.llm.formats import SCALES, Format

DAMP = 0.01  # of the mean power of an input; see `rounding.Problem.damped`

Parts = Iterator[tuple[str, np.ndarray]]  # what a tensor becomes, part by part; the codes in many pieces


class Task(NamedTuple):
    """A tensor, what it becomes, and where the parts of that go: start and size in a file."""

    name: str
    source: Stored
    form: Format | None
    gram: Stored | None
    target: Path
    places: dict[str, tuple[int, int]]


def run(task: Task) -> tuple[Task, int]:
    """Put a tensor in its place, anywhere and as often as one likes; returns the checksum of all its parts."""
    found, filled = 0, dict.fromkeys(task.places, 0)
    with open(task.target, "r+b") as file:
        for part, array in _parts(task):
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            file.seek(task.places[part][0] + filled[part])
            file.write(content)
            filled[part] += content.size
            found = zlib.crc32(content, found)
    return task, found


def checksum(task: Task) -> int:
    """Of what lies in its places now."""
    found = 0
    for start, size in task.places.values():
        for chunk in Stored(task.target, "U8", (size,), start, size).chunks():
            found = zlib.crc32(chunk, found)
    return found


def _parts(task: Task) -> Parts:
    if task.form is None:
        yield from (("", chunk) for chunk in task.source.chunks())
        return
    try:
        yield from _solved(task) if task.gram else _nearest(task)
    except ValueError as error:
        raise ValueError(f"{task.name} cannot become {task.form}: {error}") from None


def _nearest(task: Task) -> Parts:
    from qtools.llm._pack import ranges

    form, found, whole = task.form, [], None
    if form.group == 0:
        ends = [(low.min(), high.max()) for low, high in (ranges(x, x.shape[1]) for x in _matrices(task.source))]
        low, high = np.array(ends).T
        whole = _qparams(low.min(keepdims=True)[:, None], high.max(keepdims=True)[:, None], form)
    for x in _matrices(task.source):
        found.append(whole or _choose(x, form))
        yield "codes", _codes(x, found[-1], form)
    yield from _others([whole] if whole else found, form)


def _matrices(source: Stored) -> Iterator[np.ndarray]:
    """Rows of a matrix, some at a time; an even number, so that packed codes fill whole bytes."""
    kind, columns = FLOATS[source.dtype], source.shape[1]
    return (chunk.view(kind).reshape(-1, columns) for chunk in source.chunks(columns * kind.itemsize))


def _choose(x: np.ndarray, form: Format) -> QParams | LPBQ:
    """Scales for some rows, by their ranges."""
    from qtools.llm._pack import ranges

    if not form.lpbq:
        return _qparams(*ranges(x, x.shape[1] if form.group < 1 else form.group), form)
    found = choose_lpbq(x.astype(np.float32), form.grid)
    channel = _as_stored(found.channel_scale, form.scale)
    return LPBQ(QParams(form.grid, found.block_scale * channel, found.qparams.zero_point), found.block_scale, channel)


def _qparams(low: np.ndarray, high: np.ndarray, form: Format) -> QParams:
    found = qparams_from_range(low, high, form.grid)
    return QParams(form.grid, _as_stored(found.scale, form.scale), found.zero_point)


def _as_stored(scale: np.ndarray, kind: str) -> np.ndarray:
    """Scales rounded to what is stored, in float32; one too small for it becomes the smallest there is."""
    dtype = FLOATS[SCALES[kind]]
    with np.errstate(over="ignore"):
        stored = np.maximum(scale.astype(dtype), ml_dtypes.finfo(dtype).smallest_subnormal).astype(np.float32)
    if not np.isfinite(stored).all():
        raise ValueError(f"a scale of {scale.max():.4g} is beyond {kind}")
    return stored


def _codes(x: np.ndarray, encoding: QParams | LPBQ, form: Format) -> np.ndarray:
    from qtools.llm._pack import codes, pack

    qparams = encoding.qparams if isinstance(encoding, LPBQ) else encoding
    width = form.group if form.group > 0 else x.shape[1]
    scale, zero_point = (np.broadcast_to(part, (len(x), part.shape[1])) for part in (qparams.scale, qparams.zero_point))
    found = codes(x, scale, zero_point, width, form.grid.qmin, form.grid.qmax)
    return pack(found) if form.bits == 4 else found


def _others(found: list[QParams | LPBQ], form: Format) -> Parts:
    """All parts of a tensor but the codes."""
    from qtools.llm._pack import pack

    small = pack if form.bits == 4 else np.ascontiguousarray
    scale = np.concatenate([part.channel_scale if form.lpbq else part.scale for part in found])
    yield "scale", scale.astype(FLOATS[SCALES[form.scale]])
    if form.lpbq:
        yield "block_scale", small(np.concatenate([part.block_scale for part in found]) - np.uint8(1))
    if not form.symmetric:
        yield "zero_point", small(np.concatenate([part.zero_point for part in found]).astype(np.uint8))


def _solved(task: Task) -> Parts:
    """Scales and codes by what they do to the outputs of the layer."""
    from qtools.llm._pack import pack
    from qtools.ptq.rounding import GPTQ, Descent, Nearest, Problem

    form = task.form
    x, gram = (np.concatenate([part.astype(np.float64) for part in _matrices(one)]) for one in (task.source, task.gram))
    if not np.isfinite(gram).all() or (np.diagonal(gram) < 0).any() or not np.allclose(gram, gram.T):
        raise ValueError("its moments are no mean products of its inputs with each other")
    found = _choose(_clipped(x, gram, form).astype(np.float32), form)
    qparams = found.qparams if isinstance(found, LPBQ) else found
    width = form.group if form.group > 0 else x.shape[1]
    of_each = np.minimum(np.arange(x.shape[1]) // width, qparams.scale.shape[1] - 1)
    scale, zero_point = (part[:, of_each] + np.zeros((len(x), 1)) for part in (qparams.scale, qparams.zero_point))
    cross = x @ gram
    problem = Problem(*(part[None] for part in (x, scale, zero_point)), form.grid, gram[None], cross[None],
                      (cross * x).sum(1)[None])  # fmt: skip
    solver = {"clip": Nearest(), "gptq": GPTQ(), "descent": Descent()}[form.method]
    codes = solver(problem.damped(DAMP))[0].astype(form.grid.dtype)
    yield "codes", pack(codes.view(np.uint8)) if form.bits == 4 else codes
    yield from _others([found], form)


def _clipped(x: np.ndarray, gram: np.ndarray, form: Format) -> np.ndarray:
    """Weights (rows, columns) cut off where that makes the outputs better, for each group of a row by itself."""
    from qtools.ptq.rounding import CLIPS

    plain, clipped = replace(form, lpbq=False), x.copy()
    width = form.group if form.group > 0 else x.shape[1]
    for first in range(0, x.shape[1], width) if form.group else ():
        part, power = x[:, first : first + width], gram[first : first + width, first : first + width]
        low, high = part.min(1, keepdims=True), part.max(1, keepdims=True)
        least = np.full(len(x), np.inf)
        for clip in (clip for clip in CLIPS if clip <= 1):
            limited = np.clip(part, clip * low, clip * high)
            qparams = _qparams(*(end.astype(np.float32) * np.float32(clip) for end in (low, high)), plain)
            missed = fake_quantize(part, replace(qparams, grid=replace(form.grid, block_size=(1, -1)))) - part
            cost = ((missed @ power) * missed).sum(1)
            better = cost < least
            clipped[better, first : first + width], least[better] = limited[better], cost[better]
    return clipped
