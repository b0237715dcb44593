"""A quarter of a gigabyte handed to another process and to ONNX Runtime, by descriptor and as a copy."""

import importlib.util
import sys

from qtools.npu import soc

SIZE = 2**28
FASTER, MEBIBYTES = 10, 1  # the aims: against the copy, and what a hand-over may add to the receiver's memory
WAYS = {"process": ("zero", "kept", "copy"), "runtime": ("zero", "copy")}


def measured(rounds: int) -> dict[str, float]:
    """The numbers of ``data/recipes/zero_copy.py``."""
    path = soc.TABLE.parent / "recipes/zero_copy.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    recipe = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.measure((SIZE,), rounds)


def bench(rounds: int) -> list[str]:
    """Print milliseconds and memory; return the aims missed."""
    values, missed = measured(rounds), []
    for target, ways in WAYS.items():
        print(f"\n256 MB to {'another process' if target == 'process' else 'ONNX Runtime'}, best of {rounds}")
        for way in ways:
            took, read = (values[f"{target}_{way}_{what}_{SIZE}"] / 1e3 for what in ("us", "reading_us"))
            memory = values[f"{target}_{way}_memory_{SIZE}"] / 2**20
            print(f"  {took:9.3f} ms to have, {read:7.1f} ms to read it all once, {memory:6.1f} MiB more memory  {way}")
        times = values[f"{target}_copy_us_{SIZE}"] / values[f"{target}_zero_us_{SIZE}"]
        memory = max(values[f"{target}_{way}_memory_{SIZE}"] for way in ways if way != "copy") / 2**20
        print(f"  {times:.0f} times as fast as the copy")
        missed += [] if times >= FASTER else [f"buffers, {target}: not {FASTER} times as fast as a copy"]
        missed += [] if memory < MEBIBYTES else [f"buffers, {target}: not below {MEBIBYTES} MiB"]
    return missed
