"""The recognizer of printed lines, quantized in every way the course offers and by ONNX Runtime, on 3 x 600 lines.

About twenty minutes and up to 7 GB (ONNX Runtime's calibration).  Run from the repository:

    python data/recipes/recognizer.py data/results/measured/03_recognizer.json
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from record import ahead, means, record

from qtools import zoo
from qtools.ptq import fuse, graph
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, quantize_network

SEEDS, LINES = (1234, 1235, 1236), 600
SHAPE = {"x": (1, 3, 48, 320)}
METHODS = ("min-max", "percentile", "mse", "sqnr", "entropy")


def right(network: onnx.ModelProto, inputs: np.ndarray, texts: list[str], alphabet: list[str]) -> np.ndarray:
    """Whether each line is read without a mistake."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    told = [zoo.decode(session.run(None, {name: line[None]})[0], alphabet)[0] for line in inputs]
    return np.array([answer.strip() == text.strip() for answer, text in zip(told, texts)])


def by_onnxruntime(network: onnx.ModelProto, samples: np.ndarray) -> onnx.ModelProto:
    """ONNX Runtime's best setting on these lines: QDQ, per channel, percentile 99.999."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.at, self.end = 0, len(samples)

        def __len__(self) -> int:
            return len(samples)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.at, self.end = start_index, end_index

        def get_next(self) -> dict[str, np.ndarray] | None:
            if self.at >= self.end:
                return None
            self.at += 1
            return {"x": samples[self.at - 1 : self.at]}

    with tempfile.TemporaryDirectory() as folder:
        source, ready, target = (f"{folder}/{name}.onnx" for name in ("float", "ready", "quantized"))
        # The steps its documentation asks for: a newer opset, fixed shapes, its own fusions.
        onnx.save(onnx.version_converter.convert_version(network, 17), source)
        quant_pre_process(source, ready)
        quantize_static(
            ready,
            target,
            Reader(),
            per_channel=True,
            calibrate_method=CalibrationMethod.Percentile,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"CalibStridedMinMax": 20, "CalibPercentile": 99.999},
        )
        return onnx.load(target)


def table() -> dict[str, float]:
    """Percent of lines right for every setting and seed, and how far ours are ahead with a 95 % interval."""
    base = graph.prepare(zoo.text_recognizer(), SHAPE)
    fused, alphabet = fuse.fuse(base), zoo.characters(zoo.text_recognizer())
    samples, _ = zoo.recognizer_lines(200, 999)
    start = time.perf_counter()
    calibration = calibrate(fused, ({"x": line[None]} for line in samples))
    networks = {"float": fused}
    found = {"calibrate_seconds": time.perf_counter() - start}
    for method in METHODS:
        options = Options(
            act_quantizer_calibration=method, percentile_calibration_value=99.999,
            use_per_channel_quantization=True, use_per_row_quantization=True,
        )  # fmt: skip
        networks[f"w8a8_{method}".replace("-", "_")] = quantize_network(
            fused, (), options, calibration=calibration
        ).network
    wide = Options(
        act_bw=16, act_quantizer_calibration="min-max", use_per_channel_quantization=True, use_per_row_quantization=True
    )
    networks["w8a16_min_max"] = quantize_network(fused, (), wide, calibration=calibration).network
    networks["w8a8_tensor"] = quantize_network(fused, (), Options(), calibration=calibration).network
    start = time.perf_counter()
    original = zoo.text_recognizer()
    for dim, size in zip(original.graph.input[0].type.tensor_type.shape.dim, SHAPE["x"]):
        dim.dim_value = size
    original.graph.output[0].type.tensor_type.ClearField("shape")
    del original.graph.value_info[:]
    networks["onnxruntime"] = by_onnxruntime(original, samples)
    found["onnxruntime_seconds"] = time.perf_counter() - start
    hits = {name: [] for name in networks}
    for seed in SEEDS:
        inputs, texts = zoo.recognizer_lines(LINES, seed)
        for name, network in networks.items():
            hits[name].append(right(network, inputs, texts, alphabet))
            found[f"{name}_{seed}"] = 100 * hits[name][-1].mean()
            print(seed, name, f"{found[f'{name}_{seed}']:.1f} %", flush=True)
    return (
        found
        | means(hits)
        | ahead(hits, "onnxruntime", "ahead_of_onnxruntime")
        | ahead(hits, "float", "ahead_of_float")
    )


def main() -> None:
    """Write the table where the chapter looks for it."""
    record(sys.argv[1], table())


if __name__ == "__main__":
    main()
