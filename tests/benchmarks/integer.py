"""Integer-only inference beside ONNX Runtime, on the float file and on the quantized one with its integer kernels."""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import onnx
import onnxruntime as ort

from qtools import zoo
from qtools.npu import htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import convert, fuse, graph
from qtools.ptq.convert import Options

OURS, FIXED, PEER, FLOAT = "qtools", "qtools, fixed point", "ONNX Runtime, quantized", "ONNX Runtime, float"
SLOWER, FASTER = 3, 20  # the aims: at most so many times ONNX Runtime's time, and at most such a part of the emulator's
_SETTLE = 0.01  # seconds; the threads of a session spin on for a while and would hold a core


def networks() -> dict[str, tuple[onnx.ModelProto, onnx.ModelProto, list[np.ndarray]]]:
    """Name to the float network, the quantized one, and what to time them on."""
    images, lines = zoo.digits()[2], zoo.recognizer_lines(2, 999)[0]
    small = zoo.classifier_lines(4, 999)[0]
    cases = {
        "digits": (zoo.digits_cnn(), None, zoo.digits()[0][:128], [images[:1], images[:64], images]),
        "direction classifier": (zoo.direction_classifier(), {"x": (1, *small.shape[1:])}, small, [small[:1]]),
        "text recognizer": (zoo.text_recognizer(), {"x": (1, *lines.shape[1:])}, lines, [lines[:1]]),
    }
    made = {}
    for name, (model, shapes, samples, inputs) in cases.items():
        network = fuse.fuse(graph.prepare(model, shapes))
        for bits in (8, 16):
            options = Options(act_bw=bits, use_per_channel_quantization=True)
            done = convert.quantize_network(network, [sample[None] for sample in samples], options)
            made[f"{name}, W8A{bits}"] = network, done.network, inputs
    return made


def session(model: onnx.ModelProto, threads: int) -> Callable[[np.ndarray], object]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {made.get_inputs()[0].name: x})


def time_rounds(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of every function, in rounds of another order each, after one round that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    order, end = random.Random(0), time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[OURS]) < 4:
        for name, function in order.sample(list(functions.items()), len(functions)):
            time.sleep(_SETTLE)
            start = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def bench(seconds: float = 3.0) -> list[str]:
    """Print milliseconds and ratios to ONNX Runtime's integer kernels; return the aims missed."""
    missed, classifier = [], None
    for case, (network, quantized, inputs) in networks().items():
        runs: dict[str, Callable[[np.ndarray], object]] = {
            OURS: IntegerNetwork(quantized), FIXED: IntegerNetwork(quantized, requantize="fixed")
        }  # fmt: skip
        for threads in (1, 2):
            more = "" if threads == 1 else ", 2 threads"
            runs |= {PEER + more: session(quantized, threads), FLOAT + more: session(network, threads)}
        for x in inputs:
            times = time_rounds({name: partial(run, x) for name, run in runs.items()}, seconds)
            print(f"\n{case}, batch of {len(x)}")
            for name in sorted(times, key=times.get):
                print(f"  {times[name] * 1e3:9.3f} ms  {times[name] / times[PEER]:6.2f} x ONNX Runtime's  {name}")
            if times[OURS] > SLOWER * times[PEER]:
                missed.append(f"{case}, batch of {len(x)}: not {SLOWER} x ONNX Runtime, quantized")
            if case == "direction classifier, W8A8":
                classifier = quantized, x, times[OURS]
    return missed + (emulated(*classifier) if htp.status().available else [])


def emulated(network: onnx.ModelProto, x: np.ndarray, ours: float) -> list[str]:
    """The classifier on the HTP backend, emulated: how long this takes says nothing about a phone."""
    run = htp.session(network)
    seconds = time_rounds({OURS: lambda: run.run(None, {run.get_inputs()[0].name: x})}, 1)[OURS]
    print(f"\nthe direction classifier takes the emulated HTP backend {seconds:.2f} s, {seconds / ours:.0f} x ours")
    return [] if seconds >= FASTER * ours else [f"integer inference: not {FASTER} x as fast as the emulated backend"]
