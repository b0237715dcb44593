"""The quantizers beside their peers, in one run, on one large matrix, then the other parts: ``make bench``.

Every candidate of an operation takes its turn in every round, so that all see the same machine; what counts is the
ratio to a plain copy of the same float32 bytes.  ``--check`` makes the exit status say whether the aims are met;
``python -m tests.benchmarks calibration`` (or rounding, or integer) runs that part alone.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np

from qtools import affine
from qtools.affine import Grid
from tests.benchmarks import buffers, calibration, integer, llm_weights, mixed_precision, peers, rounding

SHAPE = (4096, 11008)  # a down projection of Llama 2 7B
CASES = {
    "s8 per channel": Grid(8, signed=True, symmetric=True, block_size=(1, -1)),
    "s4 group 128": Grid(4, signed=True, symmetric=True, block_size=(1, 128)),
    "u8 per tensor": Grid(8, block_size=(-1, -1)),
}
_SETTLE = 0.03  # seconds; the thread pools of torch and ONNX Runtime spin on for a while and would hold a core
OURS, NEW = "qtools", "qtools, into a new array"


def room(dtype: object) -> np.ndarray:
    """An array on a boundary of 64 bytes, as torch and ONNX Runtime lay out theirs; NumPy's own may straddle lines."""
    size = int(np.prod(SHAPE)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(SHAPE)


def candidates(case: str, x: np.ndarray) -> dict[str, dict[str, Callable[[], object]]]:
    """Operation -> name -> what to time."""
    grid = CASES[case]
    codes, qparams = affine.choose_and_quantize(x, grid, out=room(grid.dtype))
    calls = {
        "choose and quantize": (partial(affine.choose_and_quantize, x, grid), room(codes.dtype)),
        "quantize": (partial(affine.quantize, x, qparams), room(codes.dtype)),
        "dequantize": (partial(affine.dequantize, codes, qparams), room(np.float32)),
        "fake-quantize": (partial(affine.fake_quantize, x, qparams), room(np.float32)),
    }
    # The copy and ONNX Runtime write into memory they have; a new array costs its pages besides, so both are shown.
    operations = {name: {OURS: partial(call, out=out), NEW: call} for name, (call, out) in calls.items()}
    for name, peer in peers.make(case, grid, x, codes, qparams).items():
        for operation, function in peer.items():
            operations[operation][name] = function
    return operations


def time_rounds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every function in every round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(rounds + 1):
        # In another order every time: what ran before leaves the caches full of what is to be written back.
        for name, function in order.sample(list(functions.items()), len(functions)):
            time.sleep(_SETTLE)
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def report(case: str, operation: str, seconds: dict[str, list[float]]) -> tuple[float, float]:
    """Print a table; return our ratio to the copy and to the fastest peer."""
    copies = seconds.pop("copy")
    ratios = {n: statistics.median(s / c for s, c in zip(values, copies, strict=True)) for n, values in seconds.items()}
    print(f"\n{case}, {operation}   (copy {statistics.median(copies) * 1e3:.1f} ms)")
    for name in sorted(ratios, key=ratios.get):
        print(f"  {ratios[name]:7.2f} x copy  {statistics.median(seconds[name]) * 1e3:8.1f} ms  {name}")
    fastest = min(ratio for name, ratio in ratios.items() if name not in (OURS, NEW))
    return ratios[OURS], ratios[OURS] / fastest


def extra_memory(function: Callable[[], object], input_bytes: int) -> float:
    """Peak of what a call allocates beyond what it returns, as a share of the input."""
    tracemalloc.start()
    kept = function()
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    del kept
    return (peak - left) / input_bytes


def cold_seconds() -> dict[str, float]:
    """First call in a new process, with an empty compile cache and then with a warm one."""
    program = (
        "import time, numpy as np; from qtools.affine import *; x = np.ones((2048, 1024), np.float32);"
        "start = time.perf_counter(); choose_and_quantize(x, Grid(8, True, True, block_size=(1, -1)));"
        "print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"NUMBA_CACHE_DIR": cache}
        run = partial(subprocess.run, [sys.executable, "-c", program], env=env, capture_output=True, check=True)
        return {name: float(run().stdout) for name in ("compiling", "from the cache")}


def quantizers(rounds: int) -> list[str]:
    """Print all tables of the quantizers; return the aims missed."""
    x, target = room(np.float32), room(np.float32)
    np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32, out=x)
    missed = []
    for case in CASES:
        for operation, functions in candidates(case, x).items():
            functions = {"copy": partial(peers.copy, target, x)} | functions
            to_copy, to_peer = report(case, operation, time_rounds(functions, rounds))
            memory = extra_memory(functions[NEW], x.nbytes)
            print(f"  ours: {to_peer:.2f} x the fastest peer, {100 * memory:.1f} % of the input as extra memory")
            aims = {"1.5 x copy": to_copy <= 1.5 or operation != "choose and quantize", "the fastest": to_peer <= 1}
            aims["5 % extra memory"] = memory < 0.05
            missed += [f"{case}, {operation}: not {aim}" for aim, met in aims.items() if not met]
    print("\nfirst call: " + ", ".join(f"{seconds:.1f} s {name}" for name, seconds in cold_seconds().items()))
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parts = ("quantizers", "calibration", "rounding", "integer", "buffers", "mixed_precision", "llm_weights")
    parser.add_argument("part", nargs="?", choices=parts, help="by default all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--lines", type=int, default=100, help="to calibrate with; the aim is for 200")
    parser.add_argument("--check", action="store_true", help="exit 1 if an aim is missed")
    options = parser.parse_args()
    missed = quantizers(options.rounds) if options.part in (None, "quantizers") else []
    missed += calibration.bench(options.lines) if options.part in (None, "calibration") else []
    missed += rounding.bench(options.lines) if options.part in (None, "rounding") else []
    missed += integer.bench() if options.part in (None, "integer") else []
    missed += buffers.bench(options.rounds) if options.part in (None, "buffers") else []
    missed += mixed_precision.bench() if options.part in (None, "mixed_precision") else []
    missed += llm_weights.bench() if options.part in (None, "llm_weights") else []
    print("\n".join(["aims missed:", *missed] if missed else ["every aim met"]))
    return int(bool(missed) and options.check)


if __name__ == "__main__":
    sys.exit(main())
