"""A checkpoint with the shapes of Llama 2 7B, quantized to 4 bits beside a plain copy of it, and killed three times.

The weights are random numbers: only their bytes count here.  Needs 32 GB of disk and some minutes:

    python data/recipes/llama7b.py FOLDER_FOR_33_GB data/results/measured/09_llama7b.json
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from record import record

from qtools.llm._shards import layout

LLAMA_2_7B = {"layers": 32, "hidden": 4096, "inner": 11008, "vocab": 32000}
ROUNDS, KILLS, SHARDS = 3, 3, 3
SETTLE = 1.0  # seconds


def shapes(layers: int, hidden: int, inner: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors."""
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield from ((f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)) for name in "qkvo")
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from ((f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up"))
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def checkpoint(folder: Path, sizes: dict[str, int], shards: int = SHARDS, seed: int = 0) -> int:
    """Write random float16 weights of 0.008 to 0.125 in magnitude, as Hugging Face lays them out; returns the bytes."""
    folder.mkdir(parents=True)
    generator, tensors = np.random.default_rng(seed), list(shapes(**sizes))
    total = sum(2 * int(np.prod(shape)) for _, shape in tensors)
    files: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    for name, shape in tensors:
        if sum(size for *_, size in files[-1].values()) > total / shards:
            files.append({})
        files[-1][name] = "F16", shape, 2 * int(np.prod(shape))
    where = {}
    for number, part in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header, places = layout(part)
        with open(path, "wb") as file:
            file.write(header)
            for _, size in sorted(places.values()):
                for first in range(0, size, 1 << 24):
                    bits = generator.integers(0, 1 << 16, min(size - first, 1 << 24) // 2, np.uint16)
                    file.write((bits & 0x8FFF) | 0x2000)
        where |= dict.fromkeys(part, path.name)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    return total


def forget(folder: Path) -> None:
    """Have the disk hold all that was written, and the memory no page of these files."""
    os.sync()
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    time.sleep(SETTLE)


def command(source: Path, output: Path) -> list[str]:
    """The call that is measured."""
    return [sys.executable, "-m", "qtools.cli", "llm", "quantize", str(source), str(output)]


def run(source: Path, output: Path, stop: float = 1.0) -> int:
    """The command, killed at `stop` of the way; returns its peak of anonymous memory."""
    peak, doomed = 0, stop < 1
    with subprocess.Popen(command(source, output), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            if doomed and progress(source, output) > stop:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.01)
    if process.returncode != (-signal.SIGKILL if doomed else 0):
        raise RuntimeError(f"qtools ended with {process.returncode}")
    return peak


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call with a sync behind it, and what it returns."""
    start = time.perf_counter()
    found = call()
    os.sync()
    return time.perf_counter() - start, found


def progress(source: Path, output: Path) -> float:
    """Which part of the tensors lies in its place."""
    index = json.loads((source / "model.safetensors.index.json").read_text(encoding="utf-8"))
    journal = output.parent / f".{output.name}.partial/journal"
    return (journal.read_bytes().count(b"\n") - 1) / len(index["weight_map"]) if journal.exists() else 0.0


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))
    except OSError:
        found = None
    return 1024 * int(found[1]) if found else 0


def copy(source: Path, output: Path) -> None:
    """A plain copy."""
    subprocess.run(["cp", "-r", "--reflink=never", source, output], check=True)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def killed(source: Path, output: Path, kills: int = KILLS, seed: int = 0) -> list[float]:
    """Let the command be killed anywhere, time and again, then let it finish; which part was done each time."""
    parts, draw = [0.0], random.Random(seed)
    for _ in range(kills):
        run(source, output, parts[-1] + (1 - parts[-1]) * draw.uniform(0, 0.6))
        parts.append(progress(source, output))
    run(source, output)
    return parts[1:]


def measure(folder: Path, sizes: dict[str, int], rounds: int = ROUNDS) -> dict[str, float]:
    """Copy and quantize in turns, with nothing in the page cache; then kill, go on, and compare all bytes."""
    source, copied, output = folder / "checkpoint", folder / "copied", folder / "packed"
    values = {"bytes": checkpoint(source, sizes)}
    for i in range(rounds):
        forget(source)
        values[f"copy_seconds_{i}"], _ = timed(partial(copy, source, copied))
        shutil.rmtree(copied)
        shutil.rmtree(output, ignore_errors=True)
        forget(source)
        values[f"quantize_seconds_{i}"], values[f"anonymous_bytes_{i}"] = timed(partial(run, source, output))
        print({key: round(value, 2) for key, value in values.items() if key.endswith(str(i))}, flush=True)
    for what in ("copy", "quantize"):
        values[f"{what}_seconds"] = statistics.median(values[f"{what}_seconds_{i}"] for i in range(rounds))
    values["anonymous_bytes"] = max(values[f"anonymous_bytes_{i}"] for i in range(rounds))
    values["gigabytes_per_second"] = values["bytes"] / values["quantize_seconds"] / 1e9
    values["ratio"] = values["quantize_seconds"] / values["copy_seconds"]
    values["packed_bytes"] = sum(path.stat().st_size for path in output.iterdir())
    before = digests(output)
    shutil.rmtree(output)
    parts = killed(source, output)
    values |= {f"done_when_killed_{i}": part for i, part in enumerate(parts)}
    return values | {"identical": float(digests(output) == before)}


def main() -> None:
    """Write the table where the chapter looks for it."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1]) as folder:
        record(sys.argv[2], measure(Path(folder), LLAMA_2_7B), "shared with other work")


if __name__ == "__main__":
    main()
