"""Train the small Llama from scratch on the documentation of Python that every Python carries.

    python data/recipes/small_llama.py data/small_llama

Five and a half minutes of one core.  The text is that of Python 3.11.7; one that carries another text is refused.
Paragraphs that stand in several topics are kept once: of a split by topics, two thirds of the validation text would
stand in the training text too.  The order of additions differs from computer to computer, and so do the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy, dropout

from qtools.llm.checkpoint import Config
from qtools.llm.llama import Llama, Taps

CHUNK, EVERY = 3000, 10  # characters of a chunk; of so many chunks one validates
STEPS, WARM_UP, BATCH, LENGTH = 900, 50, 12, 128
PEAK_RATE, DECAY, DROPOUT, SEED = 2e-3, 0.1, 0.1, 0
TEXT = "4dcfc73dae6ad9cef73aa3cafb431bfb93ec80f89ed1e745d1c1666148ea1853"  # SHA-256 of what is trained on
CALIBRATION = 60_000  # characters of the training text that are stored for calibration
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": LENGTH,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}


def split() -> tuple[str, str]:
    """Training and validation text: every tenth chunk of some 3,000 characters validates."""
    paragraphs, seen = [], set()
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
    chunks, size = [[]], 0
    for paragraph in paragraphs:
        if size >= CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(paragraph)
        size += len(paragraph)
    texts = ["\n\n".join(chunk) for chunk in chunks]
    kept = [[text for i, text in enumerate(texts) if (i % EVERY == EVERY // 2) == last] for last in (False, True)]
    return "\n\n".join(kept[0]), "\n\n".join(kept[1])


def tokenizer_of(text: str) -> Tokenizer:
    """Byte-level BPE of as many tokens as the embedding has rows, learned from a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=CONFIG["vocab_size"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def untrained(config: Config) -> Llama:
    """Weights drawn anew: normal with deviation 0.02, those that write into the residual smaller; norms are ones."""
    torch.manual_seed(SEED)
    weights = {}
    for name, shape in config.shapes().items():
        deviation = 0.02 / math.sqrt(
            2 * config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
        )
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * deviation
        weights[name] = weight.requires_grad_()
    return Llama(config, weights)


@torch.no_grad()
def perplexity(model: Llama, ids: torch.Tensor) -> float:
    """Of all the windows of `LENGTH` tokens, one behind the other."""
    windows = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    losses = [
        cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()) * len(part)
        for part in windows.split(10)
    ]
    return math.exp(float(sum(losses)) / len(windows))


def train(model: Llama, ids: torch.Tensor, held_out: torch.Tensor) -> None:
    """AdamW with warm-up and a cosine to a twentieth of the rate; dropout behind what is added to the residual."""

    def drop(name: str, y: torch.Tensor) -> torch.Tensor:
        return dropout(y, DROPOUT) if name.endswith(("o_proj.weight", "down_proj.weight")) else y

    weights = list(model.weights.values())
    groups = [
        {"params": [w for w in weights if w.ndim == 2]},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, PEAK_RATE, (0.9, 0.95), weight_decay=DECAY)
    generator, start = torch.Generator().manual_seed(SEED), time.process_time()
    for step in range(STEPS):
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min((step + 1) / WARM_UP, cosine)
        places = torch.randint(len(ids) - LENGTH, (BATCH, 1), generator=generator)
        batch = ids[places + torch.arange(LENGTH + 1)]
        loss = cross_entropy(model(batch[:, :-1], Taps(output=drop)).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            seconds = time.process_time() - start
            held = perplexity(model, held_out)
            print(f"step {step + 1}: loss {loss.item():.3f}, held-out {held:.3f}, {seconds:.0f} s", flush=True)


def main() -> None:
    """Train, and write the checkpoint with its texts."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    texts = dict(zip(("training", "validation"), split()))
    if hashlib.sha256(texts["training"].encode()).hexdigest() != TEXT:
        raise SystemExit("this Python carries another text than Python 3.11.7, on which the small Llama was trained")
    tokenizer = tokenizer_of(texts["training"])
    ids, held_out = (torch.tensor(tokenizer.encode(text).ids) for text in texts.values())
    print(len(ids), len(held_out), "tokens")
    model = untrained(Config.model_validate(CONFIG))
    train(model, ids, held_out)
    stored = {name: weight.detach().half() for name, weight in model.weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (folder / "validation.txt").write_bytes(texts["validation"].encode())
    (folder / "calibration.txt").write_bytes(texts["training"][:CALIBRATION].encode())
    print(f"perplexity of the stored weights: {perplexity(model.with_weights(stored), held_out):.4f}")


if __name__ == "__main__":
    main()
