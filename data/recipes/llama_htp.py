"""The small Llama on the HTP backend (emulated) in many schemes, and where its codes part from the simulated ones.

Perplexity on 1,024 tokens of validation text in windows of 128, simulated, in integers and on the backend; a block on
four architectures; every operator alone, on the simulation's codes; and the network as ONNX Runtime's quantizer writes
it.  Calibrated on 8 windows of training text.  25 minutes on a loaded machine.  Run from the repository:

    python data/recipes/llama_htp.py data/results/measured/09_htp.json
"""

from __future__ import annotations

import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.utils import Extractor
from record import record
from torch.nn.functional import cross_entropy

from qtools.encodings import Rule
from qtools.llm import export, llama
from qtools.llm.checkpoint import EMBEDDING
from qtools.llm.evaluate import windows
from qtools.metrics import sqnr_db
from qtools.npu import htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq.convert import Runner
from qtools.ptq.verify import on_htp

MODEL = Path(__file__).resolve().parents[1] / "small_llama"
TOKENS, CALIBRATION, EVALUATED = 128, 8, 8  # of a window; windows
BLOCK, SHORT = 1, 64  # the block that is looked at, and its tokens
ARCHES = ("v68", "v73", "v75", "v79")
W8A8, W8A16, W4A16, KV8 = export.W8A8, export.W8A16, export.W4A16, export.KV8
Samples = list[dict[str, np.ndarray]]


def asymmetric(*_: object) -> list[Rule]:
    return [Rule("*_proj.weight", 4, False, "param")]


def wide_codes(network: onnx.ModelProto, samples: Samples) -> list[Rule]:
    """The very codes of w4a16, written as 8-bit ones."""
    known = export.quantize(network, samples).encodings.params
    names = [name for name in known if name.endswith("_proj.weight")]
    return [Rule(name, 8, True, "param", encoding=replace(known[name], bits=8)) for name in names]


def own_sigmoid(network: onnx.ModelProto, _: Samples) -> list[Rule]:
    """Sigmoids whose 16-bit codes cover what calibration saw, like any other tensor's."""
    return [Rule(node.name, 16, False, "activation") for node in network.graph.node if node.op_type == "Sigmoid"]


SCHEMES: dict[str, tuple] = {
    "w8a8": (W8A8, (), {}),
    "w8a8_softmax16": (W8A8, export.SOFTMAX16, {}),
    "w8a16": (W8A16, (), {}),
    "w8a16_kv8": (W8A16, KV8, {}),
    "w8a16_kv8_asymmetric": (W8A16, (replace(KV8[0], symmetric=False),), {}),
    "w8a16_own_sigmoid": (W8A16, own_sigmoid, {}),
    "w4a16": (W4A16, (), {}),
    "w4a16_kv8": (W4A16, KV8, {}),
    "w4a16_as_int8": (W8A16, wide_codes, {}),
    "w4a16_asymmetric": (W4A16, asymmetric, {}),
    "w4a16_g32": (W4A16, (), {"blocks": ("plain", 32)}),
    "w4a16_lpbq": (W4A16, (), {"blocks": ("LPBQ", 32)}),
    "w4a16_lpbq_kv8": (W4A16, KV8, {"blocks": ("LPBQ", 32)}),
}
LOOKED_AT = (
    "w8a8",
    "w8a16",
    "w8a16_own_sigmoid",
    "w8a16_kv8",
    "w8a16_kv8_asymmetric",
    "w4a16",
    "w4a16_as_int8",
    "w4a16_kv8",
    "w4a16_lpbq",
    "w4a16_lpbq_kv8",
)
ONLY_A_BLOCK = ("w8a16_own_sigmoid", "w4a16_asymmetric", "w8a16_kv8_asymmetric")
_COMPUTE = {"RMSNormalization": "norm", "MatMul": "linear", "Softmax": "softmax", "Sigmoid": "sigmoid"}
_COMPUTE |= {"Add": "sum", "Mul": "product"}
_model = llama.load(MODEL)


def ids_of(name: str) -> torch.Tensor:
    return torch.tensor(_model.tokenizer.encode((MODEL / f"{name}.txt").read_text()).ids)


def calibration_samples() -> Samples:
    return export.inputs(_model, windows(ids_of("calibration"), CALIBRATION, TOKENS)[:, :-1])


def perplexity(logits: list[np.ndarray], targets: torch.Tensor) -> float:
    return math.exp(float(cross_entropy(torch.from_numpy(np.concatenate(logits)).flatten(0, 1), targets.flatten())))


def quantized(network: onnx.ModelProto, samples: Samples, scheme: str) -> onnx.ModelProto:
    options, rules, more = SCHEMES[scheme]
    rules = rules(network, samples) if callable(rules) else rules
    return export.quantize(network, samples, options, rules, **more).network


def sides(network: onnx.ModelProto, samples: Samples) -> Iterator[tuple[str, list[np.ndarray], float]]:
    """Logits on each side that takes the network, and the seconds of getting ready and of all samples."""
    ready: dict[str, Callable] = {
        "sim": lambda: Runner(network, ["logits"]),
        "int": lambda: IntegerNetwork(network),
        "htp": lambda: session(network),
    }
    for side, make in ready.items():
        try:
            start = time.perf_counter()
            run = make()
            seconds = time.perf_counter() - start
            logits = [run(sample)[0] for sample in samples]
        except ValueError as refused:
            print(side, refused, flush=True)
        else:
            yield side, logits, seconds


def session(network: onnx.ModelProto) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    opened = htp.session(network)
    return lambda sample: htp.quietly(opened.run, ["logits"], dict(sample))


def compared(name: str, network: onnx.ModelProto, samples: Samples, real: list, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity and closeness of every side."""
    values, found = {}, {}
    for side, logits, seconds in sides(network, samples):
        found[side] = np.concatenate(logits)
        values[f"{side}_ppl_{name}"] = perplexity(logits, ids[:, 1:])
        values[f"{side}_db_{name}"] = sqnr_db(np.concatenate(real), found[side])
        same = np.concatenate(real).argmax(-1) == found[side].argmax(-1)
        values[f"{side}_agree_{name}"] = 100 * float(same.mean())
        if side != "sim":
            values[f"{side}_to_sim_db_{name}"] = sqnr_db(found["sim"], found[side])
        if side == "htp":
            values[f"htp_compile_seconds_{name}"] = seconds
    print(name, {key: round(value, 3) for key, value in values.items()}, flush=True)
    return values


def whole() -> dict[str, float]:
    """The whole network in every scheme, and as ONNX Runtime's quantizer writes it, with its defaults and without."""
    ids = windows(ids_of("validation"), EVALUATED, TOKENS)
    samples, calibration = export.inputs(_model, ids[:, :-1]), calibration_samples()
    network = export.to_onnx(_model, TOKENS)
    run = Runner(network, ["logits"])
    real = [run(sample)[0] for sample in samples]
    values = {"float_ppl": perplexity(real, ids[:, 1:]), "tokens": ids[:, 1:].numel()}
    for scheme in (scheme for scheme in SCHEMES if scheme not in ONLY_A_BLOCK):
        made = quantized(network, calibration, scheme)
        values |= compared(scheme, made, samples, real, ids)
        if scheme in LOOKED_AT:
            values |= layers(scheme, made, samples[:2])
    for name, symmetric in (("ort_w4a16", None), ("ort_w4a16_symmetric", True)):
        made = by_onnx_runtime(network, calibration, symmetric)
        values |= compared(name, made, samples, real, ids) | layers(name, made, samples[:2])
        values |= {f"{key}_{name}": value for key, value in columns(made, samples[0]).items()} if not symmetric else {}
    return values | article(ids, real)


def article(ids: torch.Tensor, real: list) -> dict[str, float]:
    """Embedding and head int8, attention projections int4 in groups of 128, all else w8a16; from ids."""
    network, calibration = export.to_onnx(_model, TOKENS, start="ids"), windows(ids_of("calibration"), 8, TOKENS)
    rules = [Rule(EMBEDDING, 8, True, "param"), Rule("*.self_attn.*_proj.weight", 4, True, "param", 128)]
    samples, others = ([{"ids": one[None, :-1].int().numpy()} for one in part] for part in (ids, calibration))
    return compared("article", export.quantize(network, others, W8A16, rules).network, samples, real, ids)


def layers(name: str, network: onnx.ModelProto, samples: Samples) -> dict[str, float]:
    """How close the backend stays to the simulation behind every block."""
    outs = [f"{layer}.out" for layer in range(_model.config.num_hidden_layers)]
    ours, run = on_htp(network, outs, samples, "v75"), Runner(network, outs)
    pairs = [(run(sample), found) for sample, found in zip(samples, ours)]
    return {
        f"htp_to_sim_db_{name}_behind_{layer}": sqnr_db(*(np.stack([p[side][layer] for p in pairs]) for side in (0, 1)))
        for layer in range(len(outs))
    }


def blocks() -> dict[str, float]:
    """One block on all architectures, and its operators one by one."""
    part = windows(ids_of("calibration"), 2 * CALIBRATION, SHORT)[:, :-1]
    [sample] = export.inputs(_model, windows(ids_of("validation"), 1, SHORT)[:, :-1], BLOCK)
    network, calibration = export.to_onnx(_model, SHORT, layers=[BLOCK]), export.inputs(_model, part, BLOCK)
    name, values = network.graph.output[0].name, {}
    [real] = Runner(network, [name])(sample)
    for scheme in SCHEMES:
        made = quantized(network, calibration, scheme)
        [simulated], [whole] = Runner(made, [name])(sample), IntegerNetwork(made)(sample)
        values |= {f"sim_block_{scheme}_db": sqnr_db(real, simulated), f"int_block_{scheme}_db": sqnr_db(real, whole)}
        for arch in ARCHES:
            try:
                found = htp.run(made, sample, arch)[name]
            except htp.HTPRefused as refused:
                print(scheme, refused, flush=True)
                continue
            values[f"htp_block_{scheme}_db_{arch}"] = sqnr_db(real, found)
            values[f"htp_block_{scheme}_to_sim_db_{arch}"] = sqnr_db(simulated, found)
        if scheme in LOOKED_AT:
            values |= {f"alone_{scheme}_{key}": value for key, value in alone(made, sample).items()}
        print(scheme, {key: round(value, 2) for key, value in values.items() if f"_{scheme}_" in key}, flush=True)
    return values


def alone(network: onnx.ModelProto, sample: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Distances of codes on v75, in codes of the output, of every operator run by itself on the simulation's codes."""
    makers = {name: node for node in network.graph.node for name in node.output}
    codes = [node.output[0] for node in network.graph.node if node.op_type == "QuantizeLinear"]
    simulated, extractor = dict(zip(codes, Runner(network, codes)(sample))), Extractor(network)
    distances: dict[str, list[np.ndarray]] = {}
    for node in network.graph.node:
        if node.op_type not in _COMPUTE:
            continue
        sources = [makers[name].input[0] for name in node.input if name in makers]
        sources = list(dict.fromkeys(name for name in sources if name in simulated))
        output = f"{node.output[0].removesuffix('.float')}.codes"
        try:
            found = htp.run(extractor.extract_model(sources, [output]), {s: simulated[s] for s in sources})[output]
        except htp.HTPRefused as refused:
            print("alone", node.name, refused, flush=True)
            continue
        kind = "matmul" if node.op_type == "MatMul" and len(sources) == 2 else _COMPUTE[node.op_type]
        distances.setdefault(kind, []).append(np.abs(found.astype(int) - simulated[output]).ravel())
    joined = {kind: np.concatenate(parts) for kind, parts in distances.items()}
    means = {f"{kind}_mean": float(parts.mean()) for kind, parts in joined.items()}
    return means | {f"{kind}_worst": float(parts.max()) for kind, parts in joined.items()}


# -- ONNX Runtime's quantizer ----------------------------------------------------------------------------------------


def by_onnx_runtime(network: onnx.ModelProto, samples: Samples, symmetric: bool | None) -> onnx.ModelProto:
    """int4 weights and uint16 activations by ``get_qnn_qdq_config``; its default of `weight_symmetric` is None."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "quantized.onnx")
        onnx.save(network, source)
        types = {"activation_type": QuantType.QUInt16, "weight_type": QuantType.QInt4, "weight_symmetric": symmetric}
        quantize(source, target, get_qnn_qdq_config(source, Reader(), **types))
        return onnx.shape_inference.infer_shapes(onnx.load(target))


def columns(network: onnx.ModelProto, sample: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Output channels of linear layers, each layer alone, that are far off; and those with a code 8 above the zero."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in network.graph.initializer}
    makers = {name: node for node in network.graph.node for name in node.output}
    readers = {node.input[0]: node for node in network.graph.node if node.op_type == "QuantizeLinear"}
    extractor, values = Extractor(network), dict.fromkeys(("linear", "shifted", "far", "above", "both"), 0.0)
    for node in (node for node in network.graph.node if node.op_type == "MatMul"):
        weight, source = makers[node.input[1]], makers[node.input[0]].input[0]
        if weight.input[0] not in constants or constants[weight.input[0]].data_type != onnx.TensorProto.INT4:
            continue
        codes, zero = (numpy_helper.to_array(constants[weight.input[i]]).astype(int) for i in (0, 2))
        output = readers[node.output[0]].output[0]
        x, expected = Runner(network, [source, output])(sample)
        found = htp.run(extractor.extract_model([source], [output]), {source: x})[output]
        far = (np.abs(found.astype(int) - expected) > 256).reshape(-1, codes.shape[1]).any(0)
        above = (codes - zero > 7).any(0)
        counts = {
            "linear": 1,
            "shifted": zero != 0,
            "far": far.sum(),
            "above": above.sum(),
            "both": (far & above).sum(),
        }
        values = {key: values[key] + float(count) for key, count in counts.items()}
    return {f"columns_{key}": value for key, value in values.items()}


def main() -> None:
    """Write the results where the chapter looks for them."""
    torch.set_num_threads(1)
    values = blocks() | whole()
    record(sys.argv[1], values, f"{htp.status().reason}; seconds on a loaded machine")


if __name__ == "__main__":
    main()
