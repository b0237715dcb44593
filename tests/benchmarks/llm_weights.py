"""Weights of float16 into packed integers: in memory, as the others do it, and from a cold file into a folder.

python -m tests.benchmarks.llm_weights
"""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import torch
from safetensors.numpy import save_file

from qtools.affine import Grid
from qtools.llm import _shards, _tensor
from qtools.llm.formats import Format
from qtools.llm.weights import quantize

SHAPE, COUNT = (4096, 11008), 2  # down projections of Llama 2 7B: 180 MB
OURS = "qtools: "


def ours(folder: Path, form: str) -> None:
    """From file to folder, on two threads."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    with joblib.parallel_config("threading", n_jobs=2):
        quantize(folder / "x.safetensors", folder / "out", {"*": form})


def in_memory(x: np.ndarray, form: Format) -> list[np.ndarray]:
    """What `quantize` does between reading and writing, on two threads."""
    rows = 2 * max(1, _shards._CHUNK // (2 * x[0].nbytes))
    pieces = [x[first : first + rows] for first in range(0, len(x), rows)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda piece: _tensor._codes(piece, _tensor._choose(piece, form), form), pieces))


def torch_packed(x: np.ndarray, width: int = 128) -> torch.Tensor:
    """Symmetric codes of 4 bits in groups, two a byte, in torch's own operators."""
    groups = torch.from_numpy(x).float().reshape(-1, width)
    scale = (groups.abs().amax(1, keepdim=True) / 7).half()
    codes = (groups / scale).round_().clamp_(-8, 7).to(torch.uint8)
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)


def torchao_codes(x: np.ndarray, grid: Grid) -> torch.Tensor:
    """torchao's primitives: scales of groups, then codes, one a byte."""
    from torchao.quantization import quant_primitives as torchao

    tensor, block = torch.from_numpy(x).float(), (1, 128)
    kind, limits = torch.int8, (grid.qmin, grid.qmax)
    scale, zero = torchao.choose_qparams_affine(tensor, torchao.MappingType.SYMMETRIC, block, kind, *limits)
    return torchao.quantize_affine(tensor, block, scale, zero, kind, *limits)


def gguf_blocks(x: np.ndarray, name: str) -> np.ndarray:
    """llama.cpp's formats, in groups of 32, as the gguf package writes them."""
    import gguf

    return gguf.quants.quantize(x.astype(np.float32), gguf.GGMLQuantizationType[name])


def candidates(folder: Path, weights: list[np.ndarray]) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the others' results are dropped one by one."""

    def each(function: Callable[[np.ndarray], object]) -> Callable[[], object]:
        return lambda: [function(x) is None for x in weights]

    forms = ("int4 g128", "uint4 g32", "int4 g128 lpbq", "int8 channel")
    found = {f"{OURS}{form}, file to folder": partial(ours, folder, form) for form in forms}
    found |= {OURS + form: each(partial(in_memory, form=Format.parse(form))) for form in forms}
    found["torch, int4 g128 packed"] = each(torch_packed)
    found["torchao, int4 g128, a byte a code"] = each(partial(torchao_codes, grid=Grid(4, signed=True)))
    for name in ("Q4_0", "Q8_0"):
        found[f"gguf {name}"] = each(partial(gguf_blocks, name=name))
    return found


def bench(rounds: int = 3) -> list[str]:
    """Print gigabytes of float16 a second, the best of all rounds; return the aims missed."""
    draw = np.random.default_rng(0)
    weights = [draw.normal(0, 0.02, SHAPE).astype(np.float16) for _ in range(COUNT)]
    with tempfile.TemporaryDirectory() as place:
        save_file({f"{i}.weight": x for i, x in enumerate(weights)}, Path(place) / "x.safetensors")
        calls, seconds = candidates(Path(place), weights), {}
        for _ in range(rounds + 1):
            for name, call in random.sample(list(calls.items()), len(calls)):
                start = time.perf_counter()
                call()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    size = sum(x.nbytes for x in weights) / 1e9
    speeds = {name: size / min(each[1:]) for name, each in seconds.items()}
    print(f"\nfloat16 to packed integers, {size:.2f} GB; a file of ours is read from the disk, encodings written")
    for name, speed in sorted(speeds.items(), key=lambda item: -item[1]):
        print(f"  {speed:6.2f} GB/s  {name}")
    fastest = max(speed for name, speed in speeds.items() if not name.startswith(OURS))
    own = speeds[f"{OURS}int4 g128"]
    print(f"  ours: {own / fastest:.1f} times as fast as the fastest of the others")
    return [] if own >= fastest else [f"llm_weights: {own:.2f} GB/s, and another has {fastest:.2f}"]


if __name__ == "__main__":
    found = bench()
    print("\n".join(["aims missed:", *found] if found else ["every aim met"]))
    sys.exit(bool(found))
