"""Break the code on purpose, one fault at a time, and show which test goes red: ``python -m tests.mutations``.

Every fault is planted in a copy of the package; the exit status is 1 if any of them passes the tests unnoticed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
AFFINE, FUSED, QDQ, GRAPH = "qtools/affine.py", "qtools/_fused.py", "qtools/qdq.py", "qtools/ptq/graph.py"
CONVERT = "qtools/ptq/convert.py"
FAULTS = [
    ("rounding: half up instead of half to even", AFFINE, "return xp.round(x / scale) + zero_point",
     "return xp.floor(x / scale + 0.5) + zero_point"),
    ("rounding: towards zero", AFFINE, "return xp.round(x / scale) + zero_point", "return xp.trunc(x / scale) + zero_point"),
    ("zero point inside the rounding", AFFINE, "return xp.round(x / scale) + zero_point",
     "return xp.round(x / scale + zero_point)"),
    ("zero point subtracted in quantize", AFFINE, "return xp.round(x / scale) + zero_point",
     "return xp.round(x / scale) - zero_point"),
    ("zero point added in dequantize", AFFINE, "scale.dtype) - xp.astype(zero_point", "scale.dtype) + xp.astype(zero_point"),
    ("zero point of the wrong sign", AFFINE, "grid.qmin - xp.round(low / scale)", "grid.qmin + xp.round(low / scale)"),
    ("qmax one too small", AFFINE, "(1 << self.bits - self.signed) - 1", "(1 << self.bits - self.signed) - 2"),
    ("qmin one too high", AFFINE, "if self.signed else 0) + self.narrow_range", "if self.signed else 0) + 1"),
    ("scale over one step too many", AFFINE, "(grid.qmax - grid.qmin) * 2", "(grid.qmax - grid.qmin + 1) * 2"),
    ("range not widened to zero", AFFINE, "low, high = xp.minimum(low, zero), xp.maximum(high, zero)", "pass"),
    ("reduction over the wrong axis", AFFINE, "low = xp.min(_split(xp, low, axis, count, size), axis=axis + 1)",
     "low = xp.min(_split(xp, low, axis, count, size), axis=axis)"),
    ("scales spread along the wrong axis", AFFINE, "xp.take(scale, index, axis=axis)", "xp.take(scale, index, axis=0)"),
    ("groups one element too long", AFFINE, "min(b, max(n, 1)) for n, b", "min(b + 1, max(n, 1)) for n, b"),
    ("high nibble first", AFFINE, "return nibbles[0::2] | nibbles[1::2] << 4", "return nibbles[1::2] | nibbles[0::2] << 4"),
    ("compiled: rounding half up", FUSED, "np.rint(x / s) + z", "np.floor(x / s + np.float32(0.5)) + z"),
    ("compiled: zero point inside the rounding", FUSED, "np.rint(x / s) + z", "np.rint(x / s + z)"),
    ("compiled: last block forgotten", FUSED, "for k in range(scale.shape[1])", "for k in range(scale.shape[1] - 1)"),
    ("compiled: scale from the wrong row", FUSED, "t = row[r]", "t = row[0]"),
    ("compiled: NaN unseen", FUSED, "bad |= np.int32(x[r, j] != x[r, j])", "bad |= np.int32(0)"),
    ("SQNR of amplitudes", "qtools/metrics.py", "10 * math.log10", "20 * math.log10"),
    ("percentile: tails of the other definition", "qtools/observers.py", 'cut /= 1 if self.tails == "each" else 2',
     'cut /= 2 if self.tails == "each" else 1'),
    ("SQNR: clipping noise not weighted", "qtools/observers.py", "priced, self.gamma)", "priced, 1.0)"),
    ("axis swapped: rows share what columns should", AFFINE, "for n, b in zip(shape, block_size)]\n",
     "for n, b in zip(shape, block_size[::-1])]\n"),
    ("short last block dropped", AFFINE, "-(-n // size), size)", "max(n // size, 1), size)"),
    ("scales transposed", AFFINE, "low, high = block_ranges(x, grid.block_size)\n",
     "low, high = (p.T.reshape(p.shape) for p in block_ranges(x, grid.block_size))\n"),
    ("LPBQ: channel scale over the wrong axis", AFFINE, "xp.max(scale, axis=axis, keepdims=True)",
     "xp.max(scale, axis=1 - axis, keepdims=True)"),
    ("LPBQ: integers rounded down", AFFINE, "xp.round(scale / channel), 1,", "xp.floor(scale / channel), 1,"),
    ("storage: zero points forgotten", AFFINE, "(scale_bits + zero_point) +", "scale_bits +"),
    ("ONNX: scales of another axis", QDQ, 'attributes = {"axis": single[0]}', 'attributes = {"axis": 0}'),
    ("ONNX: blocks along the other axis", QDQ, '{"axis": axis, "block_size"', '{"axis": 1 - axis, "block_size"'),
    ("BatchNorm: epsilon forgotten", GRAPH, "np.sqrt(variance + attribute(node, \"epsilon\", 1e-5))", "np.sqrt(variance)"),
    ("BatchNorm: folded into the wrong axis", GRAPH, "spread[channel_axis(before, weight.ndim)] = -1", "spread[1] = -1"),
    ("BatchNorm: folded though another reads it", GRAPH, "or uses[node.input[0]] != 1", ""),
    ("rows: channel axis not moved", GRAPH, "np.moveaxis(self.values, self.channel_axis, 0).reshape(self",
     "self.values.reshape(self"),
    ("CTC: repeats kept", "qtools/zoo/text_lines.py", "new & (best != 0)", "best != 0"),
    ("fetch: hash not looked at", "qtools/zoo/fetch.py", "digest == expected.sha256", "True"),
    ("encodings: offset of signed tensors not shifted", "qtools/encodings.py",
     "return -self.zero_point - ((1 << self.bits - 1) if self.signed else 0)", "return -self.zero_point"),
    ("fuse: a shift folded through padding", "qtools/ptq/fuse.py",
     'if after.op_type not in ("Conv", "Gemm") or pads(after):', 'if after.op_type not in ("Conv", "Gemm"):'),
    ("write: moved tensors calibrated anew", "qtools/ptq/write.py",
     "source = node.input[0] if node.op_type in _MOVES else name", "source = name"),
    ("convert: 4-bit weights asymmetric", "qtools/ptq/convert.py",
     'symmetric = fine or bits != 8 or options.param_quantizer_schema != "asymmetric"',
     'symmetric = fine or options.param_quantizer_schema != "asymmetric"'),
    ("table: backend's codes not compared", "qtools/npu/capabilities.py", "given.astype(int) - expected.astype(int)",
     "expected.astype(int) - expected.astype(int)"),
    ("backend's codes not looked at", "qtools/npu/htp.py", '{"session.disable_cpu_ep_fallback": "1"',
     '{"session.disable_cpu_ep_fallback": "0"'),
    ("integers: rounding half up", "qtools/npu/integer.py",
     "scaled = np.rint(np.asarray(acc).astype(np.float32) * np.asarray(multiplier, np.float32))",
     "scaled = np.floor(np.asarray(acc).astype(np.float32) * np.asarray(multiplier, np.float32) + 0.5)"),
    ("integers: zero-point correction of x forgotten", "qtools/npu/integer.py", "-x_zero * w.sum(0)", "0 * w.sum(0)"),
    ("pieces: what is still needed dropped", "qtools/ptq/stages.py", "for name in self.needed(to) if name in state",
     "for name in self.needed(to) if name in self.fed"),
    ("agreement: distances wrap around", "qtools/ptq/agreement.py", "ours.astype(np.int64) - theirs", "ours - theirs"),
    ("equalization: factors upside down", "qtools/ptq/equalize.py", "apart = logs - logs.mean(axis=0)",
     "apart = logs.mean(axis=0) - logs"),
    ("rounding: error not fed forward", "qtools/ptq/rounding.py", "slope[moved] += (step * scale)",
     "slope[moved] += 0 * (step * scale)"),
    ("converter: equalization left out", CONVERT, 'if "cle" in algorithms:', "if False:"),
    ("converter: repaired weights not written", CONVERT, "write_qdq(written, activations", "write_qdq(network, activations"),
    ("QAT: no slope where the step learns", "qtools/qat.py", "torch.where(inside, codes - ratio, codes)",
     "torch.where(inside, codes - codes, codes)"),
    ("QAT: slope beyond the grid", "qtools/qat.py", "return grad * inside, grad_scale", "return grad, grad_scale"),
    ("search: what is not whole allowed", "qtools/mixed_precision.py", "integrality=whole", "integrality=0 * whole"),
    ("sensitivity: what is still needed dropped", "qtools/ptq/sensitivity.py",
     "for name, x in state.items() if name in needed", "for name, x in state.items() if name not in needed"),
    ("tiling: halo forgotten", "qtools/npu/tiling.py", "new[::step] = (high - low)[::step]", "pass"),
    ("roofline: operations counted as MACs", "qtools/npu/roofline.py", "return 2 * self.macs or", "return self.macs or"),
    ("decoder: scales for nothing", "qtools/llm/decode.py", "2 * size // bits.group if bits.group else 0", "0"),
    ("decoder: keys without values", "qtools/llm/decode.py", "kv * side * bits.cache // 8", "kv * side * bits.cache // 16"),
    ("cache: codes of a byte in another order", "qtools/llm/kv_cache.py", "parts[..., i] << bits * i", "parts[..., i] << bits * (8 // bits - 1 - i)"),
    ("cache: zero points forgotten", "qtools/llm/kv_cache.py", "if not self._grid.symmetric:", "if False:"),
    ("Llama: positions turned backwards", "qtools/llm/llama.py", "first * cos - second * sin", "first * cos + second * sin"),
    ("Llama as ONNX: positions turned backwards", "qtools/llm/export.py", "np.hstack([-sin, sin])",
     "np.hstack([sin, -sin])"),
    ("smoothing: readers not multiplied", "qtools/llm/smooth.py", "name: weight(name) * spread for",
     "name: weight(name) for"),
    ("perplexity: of windows instead of tokens", "qtools/llm/evaluate.py", "total / windows[:, 1:].numel()",
     "total / len(windows)"),
    ("checkpoint: what was done not looked at", "qtools/llm/weights.py",
     "task.name in claimed and claimed[task.name] == checksum(task)", "task.name in claimed"),
    ("checkpoint: scales of the largest only", "qtools/llm/_tensor.py", "x.shape[1] if form.group < 1 else form.group",
     "x.shape[1]"),
    ("ledger: stale verdicts taken", "qtools/suite/ledger.py", "if verdict != stored", "if False and verdict != stored"),
]  # fmt: skip
TESTS = {AFFINE: ["test_affine.py", "test_granularity.py"], FUSED: ["test_affine.py"], QDQ: ["test_capabilities.py"]}
TESTS[CONVERT] = ["test_convert.py", "test_algorithms.py"]
TESTS |= {f"qtools/llm/{name}.py": [f"test_llm_{name}.py"] for name in ("evaluate", "export", "weights")}
TESTS |= {"qtools/llm/smooth.py": ["test_llm_evaluate.py"], "qtools/llm/_tensor.py": ["test_llm_weights.py"]}
TESTS["qtools/ptq/sensitivity.py"] = ["test_mixed_precision.py"]


def main() -> int:
    for _, file, old, _ in FAULTS:
        if old not in (ROOT / file).read_text():
            raise SystemExit(f"{file} does not hold {old!r}: the list of faults is out of date")
    unnoticed = 0
    for name, file, old, new in FAULTS:
        test = noticed_by(file, old, new)
        unnoticed += test is None
        print(f"{'red' if test else 'UNNOTICED':>9}  {name:<48} {test or ''}", flush=True)
    return int(unnoticed > 0)


def noticed_by(file: str, old: str, new: str) -> str | None:
    """The first test that fails with `old` replaced by `new` in `file`; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("qtools", "tests", "data", "figures", "notebooks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "conftest.py"):
            shutil.copy(ROOT / part, copy)
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace(old, new))
        tests = [str(copy / "tests" / name) for name in TESTS.get(file, [f"test_{Path(file).stem}.py"])]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:nbval",
            "-o",
            "addopts=",
        ]
        env = os.environ | {"PYTHONPATH": folder, "NUMBA_CACHE_DIR": f"{folder}/numba"}
        done = subprocess.run([*command, *tests], cwd=copy, env=env, capture_output=True, text=True)
        if done.returncode == 0:
            return None
        failed = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py(?:::\S+)?)", done.stdout, re.M)
        return failed.group(1) if failed else "could not even be imported"


if __name__ == "__main__":
    sys.exit(main())
