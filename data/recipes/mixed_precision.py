"""Mixed precision: how fast and how good the search is, on the digits and on the recognizer of printed lines.

Each part writes a file of its own; about an hour for all of them.  Run from the repository:

    python data/recipes/mixed_precision.py data/results/measured [speed proxy recognizer op_types front htp]
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
from recognizer import LINES, SEEDS, right
from record import ahead, means, record
from scipy.stats import spearmanr

from qtools import mixed_precision, zoo
from qtools.encodings import Encoding, Rule, read_overrides
from qtools.metrics import sqnr_db
from qtools.ptq import agreement, fuse, graph
from qtools.ptq.calibrate import Calibration, calibrate
from qtools.ptq.convert import Options, Runner, quantize_network
from qtools.ptq.sensitivity import FLOAT, proxy, sensitivity
from qtools.ptq.write import quantized_tensors

sys.path.append(str(Path(__file__).parents[2]))
from tests.benchmarks.mixed_precision import FINE, loop

SHAPE = {"x": (1, 3, 48, 320)}
PERCENTILE = {"methods": ("min_max", "percentile"), "percentile": 99.999}
ROUNDS = 3
FOLDER = Path("runs/mixed_precision")  # what the command reads and writes; kept, so that a second run goes on
COMMAND = (
    "qtools search recognizer.onnx -d x 1,3,48,320 --input_list lines.txt --budget 30% --soc sm8650 "
    "--act_quantizer_calibration percentile --percentile_calibration_value 99.999 --use_per_channel_quantization "
    "--use_per_row_quantization --output mixed.json --converted mixed.onnx --algorithms gptq --resume kept"
)
Case = tuple[Any, list[np.ndarray], Calibration, Options]


def digits(images: int = 1797, variant: str = "mini") -> Case:
    """The digit network, images (test images first), a calibration on 64 others, and how it is quantized."""
    network = fuse.fuse(graph.prepare(zoo.digits_cnn(variant)))
    train, _, test, _ = zoo.digits()
    calibration = calibrate(network, [image[None] for image in train[-64:]], methods=("min_max",))
    return network, [image[None] for image in np.concatenate([test, train])[:images]], calibration, Options()


def recognizer(lines: int) -> Case:
    """The recognizer, lines, its calibration on 60 of them, and how it is quantized."""
    network = fuse.fuse(graph.prepare(zoo.text_recognizer(), SHAPE))
    samples = [line[None] for line in zoo.recognizer_lines(max(lines, 60), 999)[0]]
    return network, samples[:lines], calibrate(network, samples[:60], **PERCENTILE), FINE


def units(network: Any, every: int = 1) -> list[str]:
    """Each activation and weight that has a type of its own, or each `every`-th."""
    tensors = quantized_tensors(network)
    return [*dict.fromkeys(tensors.activations.values()), *tensors.weights][::every]


def seconds(call: Callable[..., Any], *args: Any, **more: Any) -> tuple[float, float, Any]:
    """Seconds on the wall, seconds of all processors (those of workers come when these end), and what was found."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = call(*args, **more)
    return time.perf_counter() - wall, time.process_time() - cpu, found


# -- speed -----------------------------------------------------------------------------------------------------------


def with_two(*args: Any, **more: Any) -> Any:
    """`sensitivity` in two processes."""
    with joblib.parallel_config("loky", n_jobs=2):
        return sensitivity(*args, **more)


def speed() -> tuple[dict[str, float], str]:
    """The loop, the same alone, and with two workers, in turns; the quickest of some rounds of each."""
    values: dict[str, float] = {"speed_rounds": ROUNDS}
    cases = {"digits": (digits(), 1), "recognizer": (recognizer(16), 8)}
    for (name, (case, every)), direction in [
        (one, direction) for one in cases.items() for direction in ("one_quantized", "one_spared")
    ]:
        network, samples, calibration, options = case
        chosen, bits = units(network, every), (4, 8, 16) if name == "digits" else (8, 16)
        asked = {"options": options, "direction": direction, "bits": bits, "units": chosen}
        with_two(network, samples[:4], calibration, **asked | {"units": chosen[:4]})  # starts the workers
        taken = []
        for _ in range(ROUNDS):
            naive = seconds(loop, network, samples, calibration, options, direction, bits, chosen)
            alone, two = (seconds(one, network, samples, calibration, **asked) for one in (sensitivity, with_two))
            taken.append({"naive": naive, "alone": alone, "two": two})
        wall, cpu = ({k: min(one[k][i] for one in taken) for k in taken[0]} for i in (0, 1))
        true, found, other = (taken[0][k][2] for k in ("naive", "alone", "two"))
        order = np.argsort(-(true[:, 0] - true[:, -1]).mean(1), kind="stable")
        same = found.ranking() == [found.names[i] for i in order] == [other.names[i] for i in order]
        key = f"speed_{name}_{direction}"
        values |= {
            f"{key}_samples": len(samples), f"{key}_changes": len(chosen) * len(bits),
            f"{key}_naive_seconds": wall["naive"], f"{key}_alone_seconds": wall["alone"],
            f"{key}_two_seconds": wall["two"], f"{key}_alone": wall["naive"] / wall["alone"],
            f"{key}_two": wall["naive"] / wall["two"], f"{key}_alone_of_cpu": cpu["naive"] / cpu["alone"],
            f"{key}_rerun": 100 * found.rerun, f"{key}_same_ranking": same,
            f"{key}_largest_difference": max(np.abs(one.noise - true).max() for one in (found, other)),
        }  # fmt: skip
        show(values, key)
    return values, (
        "every activation and weight of the digit network at 4, 8, 16 bits on 1797 images, and every eighth of "
        "the recognizer at 8 and 16 bits on 16 lines; naive: writes the whole network for each change, opens a session "
        "of one thread and runs all samples through it; alone: qtools, one thread; two: joblib, two processes; in "
        "turns, the quickest of the rounds, on a computer that did other work; rerun: operators run, in percent of the "
        "naive loop's"
    )


def show(values: Mapping[str, float], key: str) -> None:
    """Print the new values."""
    print("\n".join(f"{name} {value:.4g}" for name, value in values.items() if name.startswith(key)), flush=True)


# -- guesses ---------------------------------------------------------------------------------------------------------


def guesses() -> tuple[dict[str, float], str]:
    """Rank correlation of the proxies with what is measured, and how much sooner they are there."""
    values: dict[str, float] = {}
    for name, (network, samples, calibration, options) in (("digits", digits()), ("recognizer", recognizer(32))):
        bits = (4, 8, 16)
        slow, cpu, true = seconds(sensitivity, network, samples, calibration, options=options, bits=bits)
        values |= {f"proxy_{name}_true_seconds": slow, f"proxy_{name}_samples": len(samples)}
        weight = np.array(true.kinds) == "weight"
        for kind in ("local", "hessian"):
            key, asked = f"proxy_{name}_{kind}", {"options": options, "bits": bits}
            runs = [seconds(proxy, network, samples[:2], calibration, kind, **asked) for _ in range(ROUNDS)]
            guess = runs[0][2]
            values[f"{key}_times_sooner"] = slow / min(run[0] for run in runs)
            values[f"{key}_times_less_cpu"] = cpu / min(run[1] for run in runs)
            for k, width in enumerate(bits):
                pair = np.stack([one.noise[:, k].mean(1) for one in (guess, true)])
                values[f"{key}_spearman_{width}"] = spearmanr(*pair)[0]
                values[f"{key}_spearman_{width}_activations"] = spearmanr(*pair[:, ~weight])[0]
                values[f"{key}_spearman_{width}_weights"] = spearmanr(*pair[:, weight])[0]
        halves = [true.noise[..., i::2].mean(2) for i in (0, 1)]
        for k, width in enumerate(bits):
            values[f"proxy_{name}_halves_spearman_{width}"] = spearmanr(halves[0][:, k], halves[1][:, k])[0]
        show(values, f"proxy_{name}")
    return values, (
        "one tensor at a time quantized, all others float; truth: noise power of the outputs as a share of their "
        "power, for every activation and weight at 4, 8 and 16 bits, on 1797 images and 32 lines; proxies on two "
        "of these; halves: the truth on one half of the samples beside that on the other; one thread, quickest of "
        "three runs of a proxy beside one of the truth, on a computer that did other work"
    )


# -- the recognizer --------------------------------------------------------------------------------------------------


def searched() -> float:
    """Run the command, if its network is not there yet; the seconds that it took."""
    if not (FOLDER / "mixed.onnx").exists():
        (FOLDER / "lines").mkdir(parents=True, exist_ok=True)
        onnx.save(zoo.text_recognizer(), FOLDER / "recognizer.onnx")
        names = [f"lines/{i:02}.raw" for i in range(60)]
        for name, line in zip(names, zoo.recognizer_lines(60, 999)[0]):
            line.astype("<f4").tofile(FOLDER / name)
        (FOLDER / "lines.txt").write_text("\n".join(names))
        start = time.time()
        subprocess.run([sys.executable, "-m", "qtools.cli", *shlex.split(COMMAND)[1:]], cwd=FOLDER, check=True)
        (FOLDER / "seconds").write_text(f"{time.time() - start}")
    return float((FOLDER / "seconds").read_text())


def chosen_by_command() -> tuple[dict[str, float], str]:
    """The lines of three seeds, read in floats and with the types that one command found."""
    taken = searched()
    network, _, calibration, options = recognizer(60)
    types, roots = read_overrides(FOLDER / "mixed.json"), set(quantized_tensors(network).activations.values())
    networks = {
        "float": network,
        "all8": quantize_network(network, (), options, calibration=calibration).network,
        "mixed_nearest": quantize_network(network, (), options, types, calibration=calibration).network,
        "mixed_gptq": onnx.load(FOLDER / "mixed.onnx"),
    }
    wide = {rule.pattern for rule in types.rules if rule.bits == 16} & roots
    values = {"recognizer_search_seconds": taken, "recognizer_wide": len(wide), "recognizer_tensors": len(roots)}
    values["recognizer_wide_percent"] = 100 * len(wide) / len(roots)
    alphabet, hits = zoo.characters(zoo.text_recognizer()), {f"recognizer_{name}": [] for name in networks}
    for seed in SEEDS:
        inputs, texts = zoo.recognizer_lines(LINES, seed)
        for name, model in networks.items():
            hits[f"recognizer_{name}"].append(right(model, inputs, texts, alphabet))
            values[f"recognizer_{name}_{seed}"] = 100 * float(hits[f"recognizer_{name}"][-1].mean())
            print(seed, name, values[f"recognizer_{name}_{seed}"], flush=True)
    for name in networks:
        values[f"recognizer_{name}_spread"] = np.std([values[f"recognizer_{name}_{s}"] for s in SEEDS], ddof=1)
    values |= means(hits) | ahead(hits, "recognizer_float", "ahead")
    return values, (
        f"lines read without a mistake, in percent, of 600 of each of the seeds {SEEDS}; ahead: of the float network "
        "on the same lines, with half its 95 % interval; spread: standard deviation over the seeds; types found by the "
        f"one command: {COMMAND}"
    )


# -- one type of operators left in floats ----------------------------------------------------------------------------

TYPES = {
    "Conv": ("Conv",), "Mul": ("Mul",), "Add": ("Add",), "Clip": ("Clip",), "Div": ("Div",), "Sigmoid": ("Sigmoid",),
    "MatMul": ("MatMul", "Gemm"), "Softmax": ("Softmax",),
    "LayerNorm": ("ReduceMean", "Sub", "Pow", "Sqrt", "LayerNormalization"),
}  # fmt: skip
SUBSETS, EACH, READ = 3, 16, 32
ASKED = ("all", "Conv", "Mul", "Add", "Clip")  # of ONNX Runtime's tool


def answers(model: onnx.ModelProto, lines: np.ndarray, optimized: bool = False, off: Sequence[str] = ()) -> np.ndarray:
    """What a network gives for lines, one by one, on ONNX Runtime with or without its optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    session = ort.InferenceSession(content, options, providers=providers, disabled_optimizers=list(off))
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: line[None]})[0] for line in lines])


class Judge:
    """Lines with their texts; says of networks how far they are from the float one and how many lines they read."""

    def __init__(self, network: onnx.ModelProto) -> None:
        self.lines, self.texts = zoo.recognizer_lines(READ, SEEDS[0])
        self.alphabet = zoo.characters(zoo.text_recognizer())
        self.real = answers(network, self.lines)
        self.found: dict[str, list[tuple[float, float]]] = {}
        self.counts: dict[str, float] = {}

    def add(self, key: str, out: np.ndarray) -> None:
        """One more subset of what `key` stands for."""
        told = zoo.decode(out, self.alphabet)
        right = np.mean([a.strip() == b.strip() for a, b in zip(told, self.texts)])
        self.found.setdefault(key, []).append((100 * right, sqnr_db(self.real, out)))
        print(key, *self.found[key][-1], flush=True)

    def values(self) -> dict[str, float]:
        """Means over the subsets, and standard deviations."""
        found = {}
        for key, pairs in self.found.items():
            for what, numbers in zip(("right", "db"), np.transpose(pairs)):
                found |= {f"{key}_{what}": numbers.mean(), f"{key}_{what}_spread": numbers.std(ddof=1)}
        return found


def belonging(network: onnx.ModelProto, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """What operators of some types make, with their weights and constants; each with the kind of its encoding."""
    tensors = quantized_tensors(network)
    nodes = [node for node in network.graph.node if node.op_type in kinds]
    roots = set(tensors.activations.values())
    made = [(name, "activation") for node in nodes for name in node.output if name in roots]
    return made + [(n, "param") for node in nodes for n in node.input if n in {*tensors.weights, *tensors.constants}]


def by_qtools(judge: Judge, network: onnx.ModelProto, samples: list[np.ndarray], options: Options) -> None:
    """All but one type of operators, and only one."""
    calibration = calibrate(network, samples, methods=("min_max",))

    def add(key: str, rules: list[Rule]) -> None:
        done = quantize_network(network, (), options, rules, calibration=calibration)
        judge.add(f"types_{key}", answers(done.network, judge.lines))

    nothing = [Rule("*", FLOAT, None, kind, None, Encoding(FLOAT)) for kind in ("activation", "param")]
    add("all", [])
    for name, kinds in TYPES.items():
        mine = belonging(network, kinds)
        add(f"but_{name}", [Rule(one, FLOAT, None, kind, None, Encoding(FLOAT)) for one, kind in mine])
        add(f"only_{name}", [*nothing, *(Rule(one, 8, None, kind) for one, kind in mine)])


def by_onnxruntime(samples: list[np.ndarray], folder: str, without: Sequence[str] = ()) -> onnx.ModelProto:
    """The recognizer quantized by ONNX Runtime's tool, without operators of some types."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({"x": sample} for sample in self.left), None)

    ready, target = f"{folder}/ready.onnx", f"{folder}/quantized.onnx"
    if not Path(ready).exists():
        original = zoo.text_recognizer()
        for dim, size in zip(original.graph.input[0].type.tensor_type.shape.dim, SHAPE["x"]):
            dim.dim_value = size
        original.graph.output[0].type.tensor_type.ClearField("shape")
        del original.graph.value_info[:]
        onnx.save(onnx.version_converter.convert_version(original, 17), f"{folder}/float.onnx")
        quant_pre_process(f"{folder}/float.onnx", ready)
    present = dict.fromkeys(node.op_type for node in onnx.load(ready).graph.node)
    taken = [kind for kind in present if kind in QDQRegistry or kind in QLinearOpsRegistry]
    quantize_static(
        ready, target, Reader(), per_channel=True, op_types_to_quantize=[kind for kind in taken if kind not in without],
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(target)


def asked_of_onnxruntime(judge: Judge, samples: list[np.ndarray], folder: str) -> None:
    """All but one type, by ONNX Runtime's tool; run as it runs by default, and with one optimization fewer."""
    for name in ASKED:
        model = by_onnxruntime(samples, folder, TYPES.get(name, ()))
        key = "ort_all" if name == "all" else f"ort_but_{name}"
        judge.add(key, answers(model, judge.lines, optimized=True))
        judge.counts[f"{key}_tensors"] = len(quantized(model))
        if name == "Conv":
            judge.counts |= weights_when_open(model, f"{folder}/open.onnx")
            judge.add(f"{key}_kept_float", answers(model, judge.lines, optimized=True, off=["WeightBiasQuantization"]))


def quantized(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """What quantizes each activation."""
    return {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}


def weights_when_open(model: onnx.ModelProto, path: str) -> dict[str, float]:
    """How many convolutions of float weights ONNX Runtime runs with 8-bit weights of one scale."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 4, path
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(path).graph
    scales = {tensor.name: tensor.dims for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [made.get(node.input[1]) for node in graph.node if node.op_type == "Conv"]
    one = sum(node is not None and not scales.get(node.input[1], [2]) for node in weights)
    return {"ort_but_Conv_convolutions": len(weights), "ort_but_Conv_of_one_scale": one}


def op_types() -> tuple[dict[str, float], str]:
    """Why it does not always help to leave a type of operators in floats."""
    network = graph.prepare(zoo.text_recognizer(), SHAPE)
    options = Options(use_per_channel_quantization=True, use_per_row_quantization=True)
    judge, lines = Judge(network), [line[None] for line in zoo.recognizer_lines(SUBSETS * EACH, 999)[0]]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(SUBSETS):
            asked_of_onnxruntime(judge, lines[i::SUBSETS], folder)
            by_qtools(judge, network, lines[i::SUBSETS], options)
    counts = {f"types_{name}_tensors": len(belonging(network, kinds)) for name, kinds in TYPES.items()}
    return judge.values() | judge.counts | counts, (
        f"8-bit weights per channel and activations, min-max, calibrated on {SUBSETS} subsets of {EACH} lines, of "
        f"which mean and standard deviation (spread); right: percent of {READ} lines; db: SQNR of the output against "
        "floats. "
        "types: qtools, hard swishes not fused, run without optimizations; but: this type alone in floats, only: this "
        "type alone quantized.  ort: quantize_static of ONNX Runtime without this type, run by ONNX Runtime as it runs "
        "by default; kept_float: without its optimization WeightBiasQuantization, which gives float weights of a Conv "
        "beside quantized activations 8 bits and one scale when a session opens (of_one_scale counts them); tensors: "
        "activations quantized"
    )


def without_quantizers(model: onnx.ModelProto, names: Sequence[str], clip: bool) -> onnx.ModelProto:
    """Some activations in floats again; if asked, still held to the range of what quantized them."""
    from onnx import helper, numpy_helper

    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sources = {quantized(model)[name].output[0]: name for name in names}
    for node in changed.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            name, scale, zero = sources[node.input[0]], *(values[one] for one in node.input[1:3])
            ends = [((code - zero.astype(np.float32)) * scale).astype(np.float32) for code in (0, 255)]
            tensors = [numpy_helper.from_array(end, f"{name}.end{i}") for i, end in enumerate(ends)]
            changed.graph.initializer.extend(tensors if clip else [])
            kind, more = ("Clip", [tensor.name for tensor in tensors]) if clip else ("Identity", [])
            node.CopyFrom(helper.make_node(kind, [name, *more], list(node.output), name=node.name))
    return changed


def clipping() -> tuple[dict[str, float], str]:
    """What is lost with the quantizers that the tool no longer writes when convolutions are left out."""
    judge = Judge(graph.prepare(zoo.text_recognizer(), SHAPE))
    lines = [line[None] for line in zoo.recognizer_lines(SUBSETS * EACH, 999)[0]]
    with tempfile.TemporaryDirectory() as folder:
        for i in range(SUBSETS):
            every = by_onnxruntime(lines[i::SUBSETS], folder)
            left = by_onnxruntime(lines[i::SUBSETS], folder, ("Conv",))
            gone = [name for name in quantized(every) if name not in quantized(left)]
            judge.counts["clipping_tensors"] = len(gone)
            judge.add("clipping_all", answers(every, judge.lines))
            judge.add("clipping_but_Conv", answers(left, judge.lines))
            judge.add("clipping_all_without", answers(without_quantizers(every, gone, False), judge.lines))
            judge.add("clipping_all_clipped", answers(without_quantizers(every, gone, True), judge.lines))
    found = {f"{k}_{i}_db": pair[1] for k, pairs in judge.found.items() for i, pair in enumerate(pairs)}
    return judge.values() | judge.counts | found, (
        "quantize_static of ONNX Runtime as in 05_op_types, run without optimizations, so that left-out weights are "
        "float; without: all quantized, but the activations in floats that the tool no longer quantizes when "
        "convolutions are left out; clipped: the same, but held to the ranges of the quantizers that were removed; by "
        "subset, and the mean"
    )


# -- loss against budget ---------------------------------------------------------------------------------------------

SHARES = (0.03, 0.06, 0.1, 0.2)


def noise(out: np.ndarray, real: np.ndarray) -> float:
    """Power of the error as a share of the power."""
    return float(np.square(out - real, dtype=float).sum() / np.square(real, dtype=float).sum())


def one_front(name: str, case: Case, held: list[np.ndarray], arch: str | None) -> dict[str, float]:
    """The rule, greedy and exact plans for the bytes that the rule takes: what they should lose, and what they do."""
    network, samples, calibration, options = case
    values = {}
    groups = mixed_precision.groups(network, arch) if arch else [(name,) for name in units(network)]
    output = [network.graph.output[0].name]

    def run(types: Mapping[str, int]) -> np.ndarray:
        done = mixed_precision.apply(network, types, calibration, options)
        return answers_of(done.network, output, held)

    real = answers_of(network, output, held)
    values |= {f"front_{name}_units": len(groups), f"front_{name}_none_noise": noise(run({}), real)}
    values[f"front_{name}_full_noise"] = noise(run({n: 16 for unit in groups for n in unit}), real)
    for direction in ("one_quantized", "one_spared"):
        asked = {"options": options, "bits": (8, 16), "units": groups, "direction": direction}
        task = mixed_precision.problem(sensitivity(network, samples, calibration, **asked), network, "bytes", options)
        wide = np.isfinite(task.costs).argsort(axis=1, kind="stable")[:, -1]  # the last that is to be had
        low, full, base = task.cost(0 * wide), task.cost(wide), float(task.losses[:, 0].sum())
        for share in SHARES:
            rule = mixed_precision.top_share(task, share)
            plans = {
                "top": rule,
                "greedy": mixed_precision.greedy(task, rule.cost),
                "exact": mixed_precision.exact(task, rule.cost),
            }
            for method, plan in plans.items():
                key = f"front_{name}_{direction}_{method}_{100 * share:.0f}"
                values[f"{key}_bytes_percent"] = 100 * (plan.cost - low) / (full - low)
                values[f"{key}_saved"] = base - plan.loss
                values[f"{key}_noise"] = noise(run(plan.types), real)
                show(values, key)
    return values


def answers_of(model: onnx.ModelProto, names: list[str], samples: list[np.ndarray]) -> np.ndarray:
    """The first output for all samples, one by one, without optimizations."""
    run = Runner(model, names)
    return np.concatenate([run(sample)[0] for sample in samples])


def front() -> tuple[dict[str, float], str]:
    """What share of the bytes at 16 bits buys, chosen in three ways."""
    held = [line[None] for line in zoo.recognizer_lines(40, SEEDS[0])[0]]
    case = digits(1257 + 540)
    images = case[1]
    values = one_front("digits", (case[0], images[540:], *case[2:]), images[:540], None)
    values |= one_front("recognizer", recognizer(24), held, "v75")
    return values, (
        "8 or 16 bits for the groups of activations of the recognizer that the backend wants at one width, and for "
        "each activation and weight of the digit network, as no backend takes it; sensitivities on 1257 images "
        "and 24 lines, either of one group quantized alone, or of one group at 16 bits among all at 8; the rule takes "
        "the most sensitive 3, 6, 10, 20 percent of the groups, greedy and exact spend as many bytes as it does; "
        "bytes_percent: of the bytes that 16 bits everywhere would add; saved: what the sum of the sensitivities "
        "promises to save over all at 8 bits; noise: of the converted network, error power of the outputs as a share "
        "of their power, on 540 and 40 other samples; none: all at 8 bits, full: all at 16"
    )


# -- the backend -----------------------------------------------------------------------------------------------------


SIDES = {"simulated": 100, "integer": 100, "v75": 100, "v73": 40}  # lines


def on_htp() -> tuple[dict[str, float], str]:
    """The mixed recognizer on two architectures of the HTP backend, beside its simulation and integers."""
    searched()
    network = onnx.load(FOLDER / "mixed.onnx")
    inputs, texts = zoo.recognizer_lines(max(SIDES.values()), SEEDS[0])
    output, samples = [network.graph.output[0].name], [{"x": line[None]} for line in inputs]
    outs = {"float": answers_of(fuse.fuse(graph.prepare(zoo.text_recognizer(), SHAPE)), output, samples)}
    values = {"htp_width_changes": changes(network)}
    for side, lines in SIDES.items():
        start = time.perf_counter()
        outs[side] = np.concatenate([run[0] for run in agreement.on_side(network, side, output, samples[:lines])])
        values[f"htp_{side}_seconds_per_line"] = (time.perf_counter() - start) / lines
    values |= compared(outs, texts)
    show(values, "htp")
    return values, (
        "the network of 05_recognizer (rounded by gptq) on the HTP backend (emulated), fallback to the CPU switched "
        "off; right: lines read without a mistake, in percent; agree: letters in common with the simulation; db: SQNR "
        "of the output against floats; width_changes: operators that read and write activations of different widths; "
        "seconds_per_line with compilation, on a computer that did other work"
    )


def compared(outs: Mapping[str, np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """How many of its lines each side reads, and how it agrees with the simulation and with floats."""
    values, alphabet = {}, zoo.characters(zoo.text_recognizer())
    for side, out in outs.items():
        lines = len(out)
        values |= {
            f"htp_{side}_lines": lines,
            f"htp_{side}_right": zoo.exact_match(zoo.decode(out, alphabet), texts[:lines]),
            f"htp_{side}_agree": 100 * np.mean(out.argmax(2) == outs["simulated"][:lines].argmax(2)),
        }
        if side != "float":
            values[f"htp_{side}_db"] = sqnr_db(outs["float"][:lines], out)
            values[f"htp_{side}_simulated_right"] = zoo.exact_match(
                zoo.decode(outs["simulated"][:lines], alphabet), texts[:lines]
            )
    return values


def changes(network: onnx.ModelProto) -> int:
    """Operators that read activations of one width and write another."""
    made = {name: node for node in network.graph.node for name in node.output}
    kinds = {tensor.name: tensor.data_type for tensor in network.graph.initializer}
    after: dict[str, set[int]] = {}
    for node in network.graph.node:
        if node.op_type == "QuantizeLinear":
            after.setdefault(node.input[0], set()).add(kinds[node.input[2]])
    count = 0
    for node in network.graph.node:
        sources = [made[name] for name in node.input if name in made and made[name].op_type == "DequantizeLinear"]
        read = {kinds[one.input[2]] for one in sources if one.input[0] in made or one.input[0] not in kinds}
        wide = {onnx.TensorProto.UINT8, onnx.TensorProto.UINT16}
        written = {kind for name in node.output for kind in after.get(name, ())}
        count += len((read | written) & wide) > 1
    return count


PARTS: dict[str, Callable[[], tuple[dict[str, float], str]]] = {
    "speed": speed, "proxy": guesses, "recognizer": chosen_by_command, "op_types": op_types, "clipping": clipping,
    "front": front, "htp": on_htp,
}  # fmt: skip


def main() -> None:
    """Write the results where the chapter looks for them."""
    for part in sys.argv[2:] or PARTS:
        values, about = PARTS[part]()
        load = f"{os.getloadavg()[1]:.1f} processes wanted to run"
        record(Path(sys.argv[1]) / f"05_{part}.json", values, load, how=about)


if __name__ == "__main__":
    main()
