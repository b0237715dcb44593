"""What quantization costs a language model: perplexity with weights, activations and the cache on coarser grids.

A `Case` is a model with some of it replaced by fake quantizers; `ladder` measures one after the other and writes each
result down at once, so that a run that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qtools._files import replace_json
from qtools.affine import Grid, QParams, choose_qparams, fake_quantize
from qtools.llm.llama import Llama, Taps
from qtools.observers import MinMaxObserver, Observer

if TYPE_CHECKING:
    from torch import Tensor


def windows(ids: Tensor, count: int, length: int) -> Tensor:
    """Pieces of a text, spread evenly over it.

    Parameters
    ----------
    ids : Tensor of int64 (tokens,)
    count : int
        Windows; the first begins with the text, the last ends one token before it does.
    length : int
        Targets of a window.

    Returns
    -------
    Tensor of int64 (count, length + 1)

    Raises
    ------
    ValueError
        If the text is shorter than one window.
    """
    import torch

    room = len(ids) - length - 1
    if room < 0 or count < 1 or length < 1:
        raise ValueError(f"{count} windows of {length} targets need more than {len(ids)} tokens")
    starts = [i * room // max(count - 1, 1) for i in range(count)]
    return torch.stack([ids[start : start + length + 1] for start in starts])


def perplexity(
    model: Llama, windows: Tensor, taps: Taps | None = None, *, batch: int = 1, progress: bool = False
) -> float:
    """Exponential of the mean cross-entropy, in nats, of each token but the first of every window.

    Parameters
    ----------
    model : Llama
    windows : Tensor of int64 (count, length + 1)
    taps : Taps, optional
    batch : int
        Windows that are computed together; what a tap shares among all it sees, it shares among those.
    progress : bool
        Show a bar on stderr.
    """
    import torch
    from torch.nn.functional import cross_entropy

    total = 0.0
    with torch.no_grad():
        for part in tqdm(windows.split(batch), desc="windows", disable=not progress, leave=False):
            logits = model(part[:, :-1], taps).flatten(0, 1)
            total += float(cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def quantized(model: Llama, grid: Grid, names: Iterable[str] | None = None) -> Llama:
    """A model whose weights lie on a grid, each rounded to nearest on its own.

    Parameters
    ----------
    model : Llama
    grid : Grid
        With the block size of (outputs, inputs): (-1, -1) per tensor, (1, -1) per channel, (1, 128) in groups.
    names : iterable of str, optional
        Of weights; by default those of all linear layers but the head.
    """
    names = model.linears() if names is None else names
    weights = {name: model.weights[name].float() for name in names}
    return model.with_weights({name: fake_quantize(w, choose_qparams(w, grid)) for name, w in weights.items()})


def weight_error(model: Llama, other: Llama) -> dict[str, float]:
    """How far the weights of the linear layers of another model are from a model's.

    Returns
    -------
    dict
        Mean square error, SQNR in dB over all weights, and SQNR of the worst layer.
    """
    errors, powers, count = [], [], 0
    for name in model.linears():
        weight = model.weights[name].double()
        errors.append(float((other.weights[name] - weight).square().sum()))
        powers.append(float(weight.square().sum()))
        count += weight.numel()
    sqnr = [10 * math.log10(power / error) if error else math.inf for power, error in zip(powers, errors)]
    total = 10 * math.log10(sum(powers) / sum(errors)) if sum(errors) else math.inf
    return {"mse": sum(errors) / count, "sqnr_db": total, "worst_layer_db": min(sqnr)}


def observe(
    model: Llama, windows: Tensor, make: Callable[[], Observer] = MinMaxObserver, *, progress: bool = False
) -> dict[str, Observer]:
    """Show the inputs of every linear layer to an observer, with windows that are not those to be evaluated."""
    seen = {name: make() for name in model.linears()}

    def look(name: str, x: Tensor) -> Tensor:
        seen[name].update(x)
        return x

    perplexity(model, windows, Taps(input=look), progress=progress)
    return seen


def static_inputs(observers: Mapping[str, Observer], grid: Grid) -> Taps:
    """Inputs of the linear layers on a grid fixed beforehand; layers without an observer keep their floats."""
    qparams = {name: observer.qparams(grid) for name, observer in observers.items()}
    return Taps(input=lambda name, x: fake_quantize(x, qparams[name]) if name in qparams else x)


def dynamic_inputs(bits: int) -> Taps:
    """Inputs of the linear layers on a grid (asymmetric) that covers just what a token has there."""
    grid = Grid(bits, block_size=(1, 1, -1))
    return Taps(input=lambda name, x: fake_quantize(x, choose_qparams(x, grid)))


def softmax(bits: int) -> Taps:
    """Attention weights on the grid from 0 to 1."""
    import torch

    grid = Grid(bits)
    qparams = QParams(grid, torch.tensor(1 / grid.qmax), torch.tensor(0, dtype=torch.int32))
    return Taps(softmax=lambda layer, x: fake_quantize(x, qparams))


def together(*parts: Taps) -> Taps:
    """Taps of several places as one.

    Raises
    ------
    ValueError
        If two of them tap the same place.
    """
    found: dict[str, Any] = {}
    for part in parts:
        new = {field.name: tap for field in fields(part) if (tap := getattr(part, field.name)) is not None}
        if found.keys() & new.keys():
            raise ValueError(f"two taps on the same place: {', '.join(found.keys() & new.keys())}")
        found |= new
    return Taps(**found)


@dataclass(frozen=True)
class Case:
    """One step of a ladder.

    Parameters
    ----------
    name : str
    make : callable
        Takes the float model; returns the model to evaluate and its taps.  It runs when the case is measured.
    """

    name: str
    make: Callable[[Llama], tuple[Llama, Taps | None]]


def ladder(
    model: Llama, windows: Tensor, cases: Iterable[Case], path: str | Path, *, batch: int = 1, progress: bool = False
) -> dict[str, dict[str, float]]:
    """Perplexity of every case that a file does not hold yet; each is written there as soon as it is known.

    Parameters
    ----------
    model : Llama
        The float one.
    windows : Tensor of int64 (count, length + 1)
    cases : iterable of Case
        Of different names.
    path : str or Path
        JSON: by the name of each case its perplexity, and the seconds that it took.
    batch, progress
        As for `perplexity`.

    Raises
    ------
    ValueError
        If the file is not such a file.
    """
    path, cases = Path(path), list(cases)
    try:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = [case.name for case in cases if "perplexity" in rows.get(case.name, ())]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of a ladder") from error
    left = [case for case in cases if case.name not in known]
    bar = tqdm(left, disable=not progress)
    for case in bar:
        bar.set_description(case.name)
        start = time.perf_counter()
        changed, taps = case.make(model)
        found = perplexity(changed, windows, taps, batch=batch, progress=progress)
        rows[case.name] = {"perplexity": found, "seconds": time.perf_counter() - start}
        replace_json(path, rows)
    return {case.name: rows[case.name] for case in cases}
