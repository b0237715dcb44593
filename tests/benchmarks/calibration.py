"""Calibration of the text recognizer beside ONNX Runtime's, each in a process of its own, and the writing of files."""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from qtools import zoo
from qtools.affine import Grid
from qtools.ptq import calibrate, convert, fuse, graph

STRIDE = 20  # lines that ONNX Runtime keeps the activations of, as in the reference's CalibStridedMinMax
OURS, SAME, PEER = "qtools, six observers, fused network", "qtools, six observers", "ONNX Runtime, entropy"
FASTER, GIBIBYTES = 5, 2.0  # the aims


def ours(fused: bool, lines: np.ndarray) -> tuple[float, int]:
    """Seconds for every observer at once, the choice of all ranges included, and the number of tensors."""
    model = _network()
    model = fuse.fuse(model) if fused else model
    start = time.perf_counter()
    found = calibrate.calibrate(model, (line[None] for line in lines))
    for method in found.methods:
        for name in found.tensors:
            found.qparams(name, Grid(bits=8), method)
    return time.perf_counter() - start, len(found.tensors)


def onnx_runtime(lines: np.ndarray) -> tuple[float, int]:
    """Seconds for ONNX Runtime's entropy calibration, called as `quantize_static` calls it."""
    import onnx
    from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

    class Reader(CalibrationDataReader):
        def __init__(self, part: np.ndarray) -> None:
            self.rest = iter(part)

        def get_next(self) -> dict[str, np.ndarray] | None:
            line = next(self.rest, None)
            return None if line is None else {"x": line[None]}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path, augmented = f"{folder}/network.onnx", f"{folder}/augmented.onnx"
        onnx.save(_network(), path)
        start = time.perf_counter()
        calibrator = create_calibrator(
            Path(path),
            None,
            augmented_model_path=augmented,
            calibrate_method=CalibrationMethod.Entropy,
            extra_options={"symmetric": False},
        )
        for begin in range(0, len(lines), STRIDE):
            calibrator.collect_data(Reader(lines[begin : begin + STRIDE]))
        tensors = len(calibrator.compute_data().data)
        return time.perf_counter() - start, tensors


def our_writing(lines: np.ndarray) -> tuple[float, int]:
    """Seconds from calibrated ranges (min-max) to the bytes of the QDQ network, and its nodes."""
    model = fuse.fuse(_network())
    found = calibrate.calibrate(model, (line[None] for line in lines), methods=("min_max",))
    start = time.perf_counter()
    done = convert.quantize_network(model, (), convert.Options(use_per_channel_quantization=True), calibration=found)
    done.network.SerializeToString()
    return time.perf_counter() - start, len(done.network.graph.node)


def their_writing(lines: np.ndarray) -> tuple[float, int]:
    """The same for ONNX Runtime: the part of `quantize_static` behind its calibration."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    class Reader(CalibrationDataReader):
        rest = iter(lines)

        def get_next(self) -> dict[str, np.ndarray] | None:
            line = next(self.rest, None)
            return None if line is None else {"x": line[None]}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = f"{folder}/network.onnx"
        onnx.save(_network(), path)
        calibrator = create_calibrator(
            Path(path), None, augmented_model_path=f"{folder}/a.onnx", calibrate_method=CalibrationMethod.MinMax
        )
        calibrator.collect_data(Reader())
        ranges, model = calibrator.compute_data(), onnx.load(path)
    ops = sorted({*QLinearOpsRegistry, *QDQRegistry})
    start = time.perf_counter()
    quantizer = QDQQuantizer(model, True, False, QuantType.QInt8, QuantType.QUInt8, ranges, [], [], ops, {})
    quantizer.quantize_model()
    written = quantizer.model.model
    written.SerializeToString()
    return time.perf_counter() - start, len(written.graph.node)


def _network():
    return graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)})


def peak_gibibytes() -> float:
    """The largest memory this process has had; what getrusage says may be its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def bench(lines: int) -> list[str]:
    """Print seconds, memory and ratios; return the aims missed."""
    print(f"\ncalibrating the text recognizer on {lines} lines, ranges chosen")
    found = {}
    for name in (OURS, SAME, PEER):
        command = [sys.executable, "-m", "tests.benchmarks.calibration", name, str(lines)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found[name] = json.loads(output.splitlines()[-1])
    for name, row in found.items():
        ratio = found[PEER]["seconds"] / row["seconds"]
        print(
            f"  {row['seconds']:7.1f} s  {row['gibibytes']:5.2f} GiB at most  {ratio:5.1f} x as fast as ONNX Runtime",
            end="",
        )
        print(f"  {row['tensors']} tensors  {name}")
    print("\nwriting its QDQ network, from ranges to bytes")
    few, _ = zoo.recognizer_lines(4, 999)
    candidates = {"qtools, fused": our_writing, "ONNX Runtime": their_writing}
    times = {name: min(write(few) for _ in range(3)) for name, write in candidates.items()}
    for name, (seconds, nodes) in times.items():
        ratio = times["ONNX Runtime"][0] / seconds
        print(f"  {seconds:7.2f} s  {ratio:5.1f} x as fast as ONNX Runtime  {nodes} nodes  {name}")
    aims = {
        f"{FASTER} x ONNX Runtime": found[PEER]["seconds"] >= FASTER * found[OURS]["seconds"],
        f"below {GIBIBYTES} GiB": found[OURS]["gibibytes"] < GIBIBYTES,
    }
    return [f"calibration: not {aim}" for aim, met in aims.items() if not met]


def main(name: str, count: str) -> None:
    """Measure one candidate in this process."""
    lines, _ = zoo.recognizer_lines(int(count), 999)
    seconds, tensors = onnx_runtime(lines) if name == PEER else ours(name == OURS, lines)
    print(json.dumps({"seconds": seconds, "tensors": tensors, "gibibytes": peak_gibibytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
