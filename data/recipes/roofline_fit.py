"""The rates of the 8 Gen 3 that explain its published latencies; how well they predict networks left out of the fit.

Eight numbers for three precisions together are fitted to 39 latencies of 19 networks (``data/latency.csv``); the DRAM
bandwidth is held at the 60 GB/s that were measured (Hao et al., arXiv 2509.23324).  Each network is then predicted, in
all its precisions, by a fit that never saw it.  Half a minute; with --cpu another, to measure this computer and compare
the model with ONNX Runtime.

    python data/recipes/roofline_fit.py data/results/measured/07_fit.json [--cpu]

Which terms the model has was decided by looking at such errors of these same networks, some dozens of times: they
flatter it a little, which no leaving out can undo.  What it was never shown: other phones, language models, U-Net.

The fitted numbers belong into ``data/soc.yaml`` (sm8650, kind: fitted); what does not stand there is printed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from qtools._files import replace_json
from qtools.llm import decode
from qtools.llm.decode import Transformer
from qtools.npu import roofline, soc
from qtools.npu.roofline import PRECISIONS

DATA = Path(__file__).resolve().parents[1]
SCALE = 0.05  # larger residuals are outliers: a latency changes by 4 to 5 % from one AI Hub release to the next
SIZES = soc.Rates(1, 1, 1, 1, 1, 1, 1, vtcm=8 * 2**20)  # only the sizes: what padding and spilling depend on

# Name in soc.yaml: start, least and largest, in the unit that is 1, 1e9, ... of SI; and what it is.
PARAMETERS = {
    "matrix_fp16": (5, 2, 12, 1e12, "fp16 multiply-accumulates; Hao et al. measured 6.0 TMAC/s"),
    "matrix_int8": (20, 8, 48, 1e12, "int8 multiply-accumulates; 16-bit activations take two passes"),
    "depthwise": (300, 20, 3000, 1e9, "depthwise multiply-accumulates at 8 bits; 16 bits take twice as long"),
    "vector": (100, 20, 1000, 1e9, "bytes that all other operators read and write inside the chip"),
    "node": (2, 0.1, 10, 1e-6, "for every operator, however small"),
    "overlap": (3, 1, 10, 1, "of work and DRAM traffic: 1 one after the other, infinite side by side"),
    "fixed_16": (200, 10, 1000, 1e-6, "for every run with 16-bit activations, fp16 or integer"),
    "fixed_8": (80, 5, 1000, 1e-6, "for every run with 8-bit activations"),
}
START, LEAST, LARGEST = (np.log([entry[i] for entry in PARAMETERS.values()]) for i in range(3))
ACTIVATIONS = ("relu_", "relu", "hardtanh_", "silu_", "hardswish_", "hardsigmoid", "sigmoid", "gelu")

# Of the 8 Gen 2 (QCS8550), 8 Gen 3 and 8 Elite, in ms: AI Hub Models v0.47.0, qnn_dlc.  Only the second is fitted.
PHONES = ("sm8550", "sm8650", "sm8750")
ON_PHONES = {
    ("resnet50", "w8a8"): (0.897, 0.679, 0.532), ("resnet50", "float"): (2.19, 1.60, 1.26),
    ("resnet18", "w8a8"): (0.518, 0.387, 0.300), ("mobilenet_v2", "w8a8"): (0.438, 0.308, 0.215),
    ("mobilenet_v2", "w8a16"): (0.809, 0.573, 0.384), ("mobilenet_v2", "float"): (0.941, 0.605, 0.459),
}  # fmt: skip
# Context, chip, tokens a second, seconds to the first of 1,024 tokens; w4a16 as Qualcomm exports it.
DECODERS = (
    ("Llama-2-7B", decode.LLAMA2_7B, 1024, "sm8650", 12.85, 1.496),
    ("Llama-2-7B", decode.LLAMA2_7B, 1024, "sm8750", 17.94, 1.440),
    ("Llama-2-7B", decode.LLAMA2_7B, 1024, "sc8380xp", 11.20, 1.919),
    ("Llama-2-7B", decode.LLAMA2_7B, 1024, "sm8550", 8.5, None),  # an early export; the sm8650 made 9.5 with it
    ("Llama-3.2-1B", Transformer(16, 2048, 32, 8, 8192, 128256), 4096, "sm8750", 64.1, None),
    ("Llama-3.2-3B", Transformer(28, 3072, 24, 8, 8192, 128256), 4096, "sm8750", 28.0, None),
    ("Llama-3-8B", Transformer(32, 4096, 32, 8, 14336, 128256), 4096, "sm8750", 14.7, None),
)


@dataclass(frozen=True)
class Rows:
    """Published latencies and `roofline.Work` of the networks: an entry, or a row, for each."""

    names: np.ndarray
    precisions: np.ndarray
    seconds: np.ndarray
    work: np.ndarray

    def __getitem__(self, keep: np.ndarray) -> Rows:
        return Rows(self.names[keep], self.precisions[keep], self.seconds[keep], self.work[keep])


def lines(name: str) -> list[dict[str, str]]:
    """A CSV file of ``data/``."""
    with (DATA / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(sizes: soc.Rates = SIZES, folded: bool = True, kinds: Mapping[str, str] | None = None) -> Rows:
    """The latency table; for the ladder activations may stay operators, and kinds of layers be others."""
    tables: dict[str, list[dict[str, str]]] = {}
    for line in lines("model_layers.csv"):
        line["op"] = line["op"] if folded or line["op"] not in ACTIVATIONS else "abs"
        tables.setdefault(line["model"], []).append(line)
    networks = {name: roofline.from_rows(table).layers for name, table in tables.items()}
    latencies, costs = lines("latency.csv"), []
    for row in latencies:
        layers = [replace(layer, kind=(kinds or {}).get(layer.kind, layer.kind)) for layer in networks[row["model"]]]
        costs.append(np.sum([roofline.work(layer, PRECISIONS[row["precision"]], sizes) for layer in layers], axis=0))
    names, precisions = (np.array([row[key] for row in latencies]) for key in ("model", "precision"))
    return Rows(
        names, precisions, np.array([float(row["inference_time_ms"]) for row in latencies]) / 1e3, np.array(costs)
    )


def modelled(values: np.ndarray, rows: Rows) -> np.ndarray:
    """Seconds by the model of `roofline`, for all rows at once; `values` are those of PARAMETERS, in their units."""
    si = {name: value * entry[3] for (name, entry), value in zip(PARAMETERS.items(), values)}
    eight, floating = rows.precisions == "w8a8", rows.precisions == "float"
    matrix = np.where(floating, si["matrix_fp16"], si["matrix_int8"] / np.where(eight, 1, 2))
    busy = rows.work[:, 0] / matrix + rows.work[:, 1:4] @ [1 / si["depthwise"], 1 / si["vector"], si["node"]]
    memory = rows.work[:, 4] / soc.table()["sm8650"].si("bandwidth")
    return np.where(eight, si["fixed_8"], si["fixed_16"]) + roofline.overlapped(busy, memory, si["overlap"])


def fit(rows: Rows, starts: int = 3, held: Mapping[str, float | str] | None = None) -> np.ndarray:
    """Parameters that make the logarithms of all ratios small, outliers counting less; the best of some starts.

    `held` are parameters that are not fitted: a number, or the name of another one that they equal.
    """
    names, held, rng = list(PARAMETERS), held or {}, np.random.default_rng(0)
    free = np.array([name not in held for name in names])
    best = None

    def filled(part: np.ndarray) -> np.ndarray:
        whole = np.zeros(len(names))
        whole[free] = part
        for name, value in held.items():
            whole[names.index(name)] = whole[names.index(value)] if isinstance(value, str) else np.log(value)
        return np.exp(whole)

    for number in range(starts):
        start = np.clip(START + number * rng.normal(0, 0.3, len(names)), LEAST + 1e-6, LARGEST - 1e-6)[free]
        found = least_squares(
            lambda part: np.log(modelled(filled(part), rows) / rows.seconds),
            start,
            bounds=(LEAST[free], LARGEST[free]),
            loss="soft_l1",
            f_scale=SCALE,
        )
        best = found if best is None or found.cost < best.cost else best
    return filled(best.x)


def folds(rows: Rows) -> Iterator[tuple[str, np.ndarray]]:
    """Each network with the rows that are its own."""
    yield from ((name, rows.names == name) for name in dict.fromkeys(rows.names.tolist()))


def out_of_fold(rows: Rows, predictor: Callable[[Rows, Rows], np.ndarray]) -> np.ndarray:
    """Each network predicted, in all its precisions, from the others: ``predictor(others, itself)``."""
    predicted = np.zeros(len(rows.names))
    for _, own in folds(rows):
        predicted[own] = predictor(rows[~own], rows[own])
    return predicted


def errors(predicted: np.ndarray, rows: Rows) -> dict[str, Any]:
    """Median and 90th percentile of the absolute relative errors, in percent, and the median of each precision."""
    off = 100 * np.abs(predicted / rows.seconds - 1)
    each = {one: off[rows.precisions == one] for one in dict.fromkeys(rows.precisions.tolist())}
    medians = {one: float(np.median(part)) for one, part in each.items() if np.isfinite(part).all()}
    off = off[np.isfinite(off)]
    return {"median": float(np.median(off)), "p90": float(np.quantile(off, 0.9)), "rows": len(off), "medians": medians}


def each_precision(predictor: Callable[[Rows, Rows], np.ndarray]) -> Callable[[Rows, Rows], np.ndarray]:
    """A predictor that is fitted to every precision on its own."""

    def predict(others: Rows, itself: Rows) -> np.ndarray:
        predicted = np.zeros(len(itself.names))
        for one in set(itself.precisions):
            asked = itself.precisions == one
            predicted[asked] = predictor(others[others.precisions == one], itself[asked])
        return predicted

    return predict


def linear(others: Rows, itself: Rows) -> np.ndarray:
    """Six coefficients of at least 0: MACs, depthwise MACs, bytes moved, operators, DRAM bytes, a constant."""
    terms, asked = (np.column_stack([rows.work, np.ones(len(rows.names))]) for rows in (others, itself))
    scale = np.maximum(terms.max(axis=0), 1e-30)
    found, _ = nnls(terms / scale / others.seconds[:, None], np.ones(len(terms)))
    return asked @ (found / scale)


def article(rows: Rows) -> np.ndarray:
    """The article's formula; its 18 TOPS for 16-bit activations; for fp16 it has no rate."""
    operations = {"w8a8": 36e12, "w8a16": 18e12, "float": np.nan}
    tables = {name: roofline.from_table(name) for name, _ in folds(rows)}
    asked = zip(rows.names, rows.precisions)
    return np.array([roofline.article_seconds(tables[name], operations[one]) for name, one in asked])


def ladder() -> list[dict[str, Any]]:
    """What each refinement buys out of the fold, added one after another."""
    steps = (
        ("matrix", "MACs / rate and weights / bandwidth, the larger of the two, and a fixed time"),
        ("fixed", "a fixed time for each width of activations"),
        ("node", "a time for every operator"),
        ("vector", "bytes moved by all other operators"),
        ("depthwise", "a rate of their own for depthwise convolutions"),
        ("padding", "channels and pixels in whole tiles"),
        ("folding", "activations folded into the operator before them"),
        ("concat", "concatenation free in floating point"),
        ("overlap", "an exponent instead of the larger of the two"),
        ("vtcm", "activations beyond the VTCM through DRAM"),
    )
    found = []
    for number, (_, what) in enumerate(steps):
        on = {name for name, _ in steps[: number + 1]}
        sizes = SIZES if "padding" in on else replace(SIZES, channels=1, tile=0)
        kinds = {"depthwise": "matrix", "concat": "move"}
        kinds = {kind: other for kind, other in kinds.items() if kind not in on}
        sizes = replace(sizes, vtcm=SIZES.vtcm if "vtcm" in on else np.inf)
        rows = read(sizes, "folding" in on, kinds)
        rows.work[:, 2:4] *= "vector" in on, "node" in on
        held = {name: 1.0 for name in ("depthwise", "vector", "node") if name not in on}
        held |= {"overlap": 200.0} if "overlap" not in on else {}
        held |= {"fixed_8": "fixed_16"} if "fixed" not in on else {}
        predicted = out_of_fold(rows, lambda others, itself, held=held: modelled(fit(others, 2, held), itself))
        found.append({"step": what, "parameters": len(PARAMETERS) - len(held), **errors(predicted, rows)})
    return found


def leave_three_out(rows: Rows, groups: int = 40) -> dict[str, Any]:
    """Harder: three networks at a time, drawn at random, predicted from sixteen."""
    rng, off = np.random.default_rng(0), []
    names = [name for name, _ in folds(rows)]
    for _ in range(groups):
        out = np.isin(rows.names, rng.choice(names, 3, replace=False))
        off += np.abs(modelled(fit(rows[~out], 2), rows[out]) / rows[out].seconds - 1).tolist()
    return {"groups": groups, "median": 100 * float(np.median(off)), "p90": 100 * float(np.quantile(off, 0.9))}


def carried() -> list[dict[str, Any]]:
    """Networks on other phones by the ratios of soc.yaml."""
    found = []
    for (name, precision), times in ON_PHONES.items():
        network = roofline.from_table(name)
        for chip, published in zip(PHONES, times):
            predicted = 1e3 * roofline.predict(network, PRECISIONS[precision], soc.rates(chip, precision)).seconds
            found.append(dict(network=name, precision=precision, soc=chip, published_ms=published, ms=predicted))
    return found


def decoders() -> list[dict[str, Any]]:
    """Language models, none of which was fitted; and what becomes of them with half and twice the time of an operator.

    How many operators a head is split into is not published, and their number times that time is what counts.
    """
    found = []
    for name, model, context, chip, published, first in DECODERS:
        rates = soc.rates(chip, "w4a16")
        to_first, token = decode.seconds(model, rates, context, 1024)
        entry = dict(model=name, soc=chip, context=context, published_tokens_per_s=published, tokens_per_s=1 / token)
        entry |= dict(published_first_s=first, first_s=to_first)
        for factor, word in ((0.5, "half"), (2, "twice")):
            slower = replace(rates, node=rates.node * factor)
            to_first, token = decode.seconds(model, slower, context, 1024)
            entry |= {f"tokens_per_s_{word}_node": 1 / token, f"first_s_{word}_node": to_first}
        found.append(entry)
    return found


def cpu() -> dict[str, Any]:
    """The same model with this computer's rates, one thread, against ONNX Runtime."""
    from onnx import parser, shape_inference

    from qtools import zoo
    from qtools.ptq import graph
    from qtools.zoo import shapes

    def single(x: str, body: str, weight: str = "1") -> Any:
        constant = f"s = Constant <value = int64[{weight.count(',') + 1}] {{{weight}}}> () w = ConstantOfShape (s)"
        text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{x}] x) => (float[N] y) {{ {constant} {body} }}'
        model = parser.parse_model(text)
        model.graph.output[0].type.tensor_type.ClearField("shape")
        return shape_inference.infer_shapes(model, data_prop=True)

    photo, conv = {"x": (1, 3, 224, 224)}, "y = Conv <pads = [1, 1, 1, 1]> (x, w)"
    networks = {
        "MobileNetV2": graph.prepare(shapes.mobilenet_v2(), photo),
        "ResNet-50": graph.prepare(shapes.resnet50(), photo),
        "EfficientNet-Lite0": graph.prepare(zoo.efficientnet_lite0(), photo),
        "text recognizer": graph.prepare(zoo.text_recognizer(), {"x": (1, 3, 48, 320)}),
        "direction classifier": graph.prepare(zoo.direction_classifier(), {"x": (1, 3, 48, 192)}),
        "digits, batch 64": graph.prepare(zoo.digits_cnn(), {"input": (64, 1, 8, 8)}),
        "conv 3x3 64-64, 56x56": single("1, 64, 56, 56", conv, "64, 64, 3, 3"),
        "conv 3x3 256-256, 14x14": single("1, 256, 14, 14", conv, "256, 256, 3, 3"),
        "conv 1x1 64-256, 56x56": single("1, 64, 56, 56", "y = Conv (x, w)", "256, 64, 1, 1"),
        "conv 1x1 512-2048, 7x7": single("1, 512, 7, 7", "y = Conv (x, w)", "2048, 512, 1, 1"),
        "depthwise 32, 112x112": single("1, 32, 112, 112", conv.replace("<", "<group = 32, "), "32, 1, 3, 3"),
        "matmul 197x768x3072": single("197, 768", "y = MatMul (x, w)", "768, 3072"),
        "matmul 1x4096x4096": single("1, 4096", "y = MatMul (x, w)", "4096, 4096"),
        "add 128, 56x56": single("1, 128, 56, 56", "z = Abs (x) y = Add (x, z)"),
        "max pool 64, 112x112": single(
            "1, 64, 112, 112", "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)"
        ),
    }
    rates, found = roofline.measure_cpu(), []
    for name, model in networks.items():
        predicted = roofline.predict(roofline.from_onnx(model), PRECISIONS["float32"], rates).seconds
        found.append(
            {"network": name, "ms": 1e3 * predicted, "measured_ms": 1e3 * roofline.run_seconds(model, runs=30)}
        )
    off = [100 * abs(entry["ms"] / entry["measured_ms"] - 1) for entry in found]
    load = os.getloadavg()[0]  # one thread is timed by its own clock, yet shares caches and memory with the others
    return {"gmacs_per_s": rates.matrix / 1e9, "gbytes_per_s": rates.bandwidth / 1e9, "load": load,
            "median": float(np.median(off)), "networks": found}  # fmt: skip


def main() -> None:
    """Fit, validate, carry over, and write all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--cpu", action="store_true", help="measure this computer too; otherwise what was measured stays"
    )
    args = parser.parse_args()
    rows = read()
    fitted = fit(rows)
    each_fold = {name: fit(rows[~own]) for name, own in folds(rows)}
    predicted = np.concatenate([modelled(each_fold[name], rows[own]) for name, own in folds(rows)])
    order = np.concatenate([np.flatnonzero(own) for _, own in folds(rows)])
    predicted = predicted[np.argsort(order)]
    spread = np.array(list(each_fold.values()))
    recorded = soc.table()["sm8650"].figures
    parameters = {}
    for number, (name, entry) in enumerate(PARAMETERS.items()):
        value = float(f"{fitted[number]:.4g}")
        parameters[name] = {
            "value": value, "unit": recorded[name][0].unit, "least": float(spread[:, number].min()),
            "largest": float(spread[:, number].max()), "what": entry[4],
        }  # fmt: skip
        if recorded[name][0].value != value:
            print(f"data/soc.yaml: sm8650: {name}: {recorded[name][0].value} should be {value}")
    table = [
        {"network": str(name), "precision": str(one), "published_ms": 1e3 * float(took), "ms": 1e3 * float(guess),
         "error": 100 * float(guess / took - 1)}
        for name, one, took, guess in zip(rows.names, rows.precisions, rows.seconds, predicted)
    ]  # fmt: skip
    ours, llms = errors(predicted, rows), decoders()
    compared = {
        "this model": {"parameters": len(PARAMETERS), **ours},
        "this model, fitted to each precision alone": {
            "parameters": 7 * 3,
            **errors(out_of_fold(rows, each_precision(lambda a, b: modelled(fit(a), b))), rows),
        },
        "six coefficients for each precision": {
            "parameters": 6 * 3,
            **errors(out_of_fold(rows, each_precision(linear)), rows),
        },
        "the article's formula": {"parameters": 0, **errors(article(rows), rows)},
    }
    before = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    measured = cpu() if args.cpu else before.get("this_computer")
    values = {
        "fit_median": ours["median"], "fit_p90": ours["p90"],
        **{f"fit_median_{name}": value for name, value in ours["medians"].items()},
        "fit_outliers": sum(abs(entry["error"]) > 35 for entry in table),
        "article_median": compared["the article's formula"]["medians"]["w8a8"],
        "llama_tokens_per_s": llms[0]["tokens_per_s"], "llama_first_s": llms[0]["first_s"],
        **({"cpu_median": measured["median"]} if measured else {}),
    }  # fmt: skip
    content = {
        "values": {name: float(value) for name, value in values.items()},
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": datetime.date.today().isoformat(),
        "parameters": parameters, "out_of_fold": table, "compared": compared, "ladder": ladder(),
        "three_left_out": leave_three_out(rows), "other_phones": carried(), "decoders": llms,
        "this_computer": measured,
    }  # fmt: skip
    replace_json(args.output, content)
    print(json.dumps(content["values"], indent=1))


if __name__ == "__main__":
    main()
