"""The small Llama at 2 bits a weight: rounded to nearest, and trained on with the rounding in place.

    python data/recipes/small_llama_qat.py data/results/measured/09_qat.json

Some five minutes on one core.  Symmetric, one scale for each output, chosen anew from the weights at every step; the
gradient passes the rounding as if it were not there.  The float network is trained on in the same way, to tell what is
the rounding's and what the training's.  Perplexity on the whole validation text.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import small_llama
import torch
from record import record
from torch.nn.functional import cross_entropy, dropout

from qtools.affine import Grid, choose_qparams, fake_quantize
from qtools.llm.llama import Llama, Taps, load

STEPS, RATE, SEED, BITS = 250, 1e-3, 1, 2
MODEL = Path(__file__).resolve().parents[1] / "small_llama"


def rounded(model: Llama, bits: int | None) -> Llama:
    """The weights of all linear layers on their grids; gradients reach the floats behind them."""
    if bits is None:
        return model
    grid, changed = Grid(bits, signed=True, symmetric=True, block_size=(1, -1)), {}
    for name in model.linears():
        weight = model.weights[name]
        with torch.no_grad():
            moved = fake_quantize(weight, choose_qparams(weight, grid)) - weight
        changed[name] = weight + moved
    return model.with_weights(changed)


def trained(model: Llama, bits: int | None, ids: torch.Tensor) -> Llama:
    """Trained on for `STEPS` batches, as in the beginning but at half the rate."""

    def drop(name: str, y: torch.Tensor) -> torch.Tensor:
        return dropout(y, small_llama.DROPOUT) if name.endswith(("o_proj.weight", "down_proj.weight")) else y

    torch.manual_seed(SEED)
    weights = {name: weight.clone().requires_grad_() for name, weight in model.weights.items()}
    model, length = Llama(model.config, weights), small_llama.LENGTH
    optimizer = torch.optim.AdamW(weights.values(), RATE, (0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 20, 0.525 + 0.475 * math.cos(math.pi * step / STEPS))
        places = torch.randint(len(ids) - length, (small_llama.BATCH, 1), generator=generator)
        batch = ids[places + torch.arange(length + 1)]
        logits = rounded(model, bits)(batch[:, :-1], Taps(output=drop))
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            print(bits, step, f"{loss.item():.3f}", flush=True)
    return Llama(model.config, {name: weight.detach() for name, weight in weights.items()})


def main() -> None:
    """Train both, and write down the perplexities of all four."""
    torch.set_num_threads(1)
    model = load(MODEL)
    ids, held_out = (torch.tensor(model.tokenizer.encode(text).ids) for text in small_llama.split())
    values = {"qat_steps": STEPS, "qat_float_before": small_llama.perplexity(model, held_out)}
    values[f"qat_w{BITS}_before"] = small_llama.perplexity(rounded(model, BITS), held_out)
    after = rounded(trained(model, BITS, ids), BITS)
    values[f"qat_w{BITS}_after"] = small_llama.perplexity(after, held_out)
    print(values, flush=True)
    values["qat_float_after"] = small_llama.perplexity(trained(model, None, ids), held_out)
    record(sys.argv[1], values)


if __name__ == "__main__":
    main()
