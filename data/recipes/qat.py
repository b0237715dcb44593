"""The digit network trained with its rounding: every figure of chapter 6 that takes more than seconds.

    python data/recipes/qat.py ladder data/results/measured/06_ladder.json

and so for parts, remedies, epochs, rates, shifts, steps, backend (needs onnxruntime-qnn) and aimet (needs aimet-torch):
one to three minutes each on an idle core.

A seed chooses the 256 images of the calibration and the order of the batches.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from record import record
from torch import nn
from torch.nn import functional

from qtools import metrics, zoo
from qtools.npu import htp
from qtools.npu.integer import IntegerNetwork
from qtools.ptq import equalize, graph
from qtools.qat import CONFIG, QuantSim

SCHEMES = {  # bits of weights and of activations, how their first ranges are chosen
    "w8a8": (8, 8, "min-max", "min-max"),
    "w4a8": (4, 8, "min-max", "min-max"),
    "w4a4": (4, 4, "min-max", "sqnr"),
    "w3a4": (3, 4, "sqnr", "sqnr"),
    "w2a4": (2, 4, "sqnr", "sqnr"),
}
EPOCHS, RATE, BATCH = 5, 0.01, 64
LAYER, EDGES = "b3.pw.weight", np.linspace(-8.5, 7.5, 81)  # five bins a step, their edges off the codes
SGD_RATES, ADAM_RATES = (0.1, 0.03, 0.01, 0.001), (0.01, 0.003, 0.001, 0.0001)

TRAIN, LABELS, TEST, TRUTH = (torch.from_numpy(part) for part in zoo.digits())
STEPS = -(-len(TRAIN) // BATCH)  # in an epoch
FLOAT = zoo.digits_module()
with torch.no_grad():
    LOGITS, TRAIN_LOGITS = FLOAT(TEST), FLOAT(TRAIN)
SHIFTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda x: x,
    "faint": lambda x: x / 4,
    "strong": lambda x: x * 4,
    "inverted": lambda x: 1 - x,
    "noise": lambda x: torch.rand(x.shape, generator=torch.Generator().manual_seed(0)),
}


def calibration(seed: int, shift: str = "same") -> list[torch.Tensor]:
    """Four batches of training images, changed in the way that `shift` names."""
    chosen = np.random.default_rng(1000 + seed).choice(len(TRAIN), 256, replace=False)
    return [SHIFTS[shift](part) for part in TRAIN[chosen].split(BATCH)]


def simulation(scheme: str, seed: int = 0, shift: str = "same", learned: bool = True) -> QuantSim:
    """The network in a scheme, calibrated."""
    weight_bits, act_bits, weight_scheme, act_scheme = SCHEMES[scheme]
    bits, schemes = dict(weight_bits=weight_bits, act_bits=act_bits), dict(weight_scheme=weight_scheme)
    sim = QuantSim(FLOAT, TRAIN[:1], **bits, **schemes, act_scheme=act_scheme, learned=learned)
    sim.calibrate(calibration(seed, shift))
    return sim


def train(
    model: nn.Module,
    seed: int,
    epochs: int = EPOCHS,
    rate: float = RATE,
    optimizer: str = "sgd",
    goal: str = "labels",
    after_step: Callable[[int], Any] = lambda step: None,
) -> None:
    """SGD with momentum or Adam and a cosine, towards the labels or towards the logits of the float network."""
    order = torch.Generator().manual_seed(seed)
    both = {"sgd": lambda p: torch.optim.SGD(p, rate, momentum=0.9), "adam": lambda p: torch.optim.Adam(p, rate)}
    chosen = both[optimizer]([parameter for parameter in model.parameters() if parameter.requires_grad])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(chosen, epochs * STEPS)
    batches = (part for _ in range(epochs) for part in torch.randperm(len(TRAIN), generator=order).split(BATCH))
    for step, batch in enumerate(batches, 1):
        chosen.zero_grad()
        logits = model(TRAIN[batch])
        if goal == "labels":
            loss = functional.cross_entropy(logits, LABELS[batch])
        else:
            loss = 0.1 * functional.mse_loss(logits, TRAIN_LOGITS[batch])
        loss.backward()
        chosen.step()
        schedule.step()
        after_step(step)


@torch.no_grad()
def score(model: nn.Module) -> tuple[float, float]:
    """Percent of the test digits right, and SQNR of the logits against the float network in dB."""
    logits = model(TEST)
    return 100 * (logits.argmax(1) == TRUTH).float().mean().item(), metrics.sqnr_db(LOGITS.numpy(), logits.numpy())


def summary(name: str, scores: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    values = {}
    for part, column in zip(("right", "db"), zip(*scores)):
        values |= {f"{name}_{part}": statistics.mean(column), f"{name}_{part}_sd": statistics.stdev(column)}
    print({key: round(value, 2) for key, value in values.items()}, flush=True)
    return values


def repeated(name: str, scheme: str, seeds: int, shift: str = "same", learned: bool = True, **how: Any) -> dict:
    """A scheme trained once a seed."""

    def once(seed: int) -> tuple[float, float]:
        sim = simulation(scheme, seed, shift, learned)
        train(sim.model, seed, **how)
        return score(sim.model)

    return summary(name, [once(seed) for seed in range(seeds)])


def trained(scheme: str, make: Callable[[int], Any], prefix: str = "") -> dict[str, float]:
    """What is right before and after the training of what `make` gives for three seeds, and how long that takes."""
    before, after, seconds = [], [], []
    for seed in range(3):
        sim = make(seed)
        before.append(score(sim.model))
        start = time.process_time()
        train(sim.model, seed)
        seconds.append(time.process_time() - start)
        after.append(score(sim.model))
    found = summary(f"{prefix}ptq_{scheme}", before) | summary(f"{prefix}qat_{scheme}", after)
    return found | {f"{prefix}qat_{scheme}_seconds": min(seconds)}


def ladder() -> dict[str, float]:
    """Five schemes before and after training, and what the choice of the goal does."""
    values = {}
    for scheme in SCHEMES:
        values |= trained(scheme, partial(simulation, scheme))
    for scheme in SCHEMES:
        values |= repeated(f"logits_{scheme}", scheme, 3, goal="logits")
    values |= repeated("slow_w8a8", "w8a8", 3, rate=0.001)
    return values | summary("float_trained_on", [float_trained_on(seed) for seed in range(3)])


def unrounded() -> QuantSim:
    """The float network, its BatchNorms folded: a simulation that rounds nothing."""
    nothing = json.loads(CONFIG.read_text())
    nothing["defaults"]["ops"]["is_output_quantized"] = nothing["defaults"]["params"]["is_quantized"] = "False"
    nothing["model_input"]["is_input_quantized"] = "False"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nothing.json"
        path.write_text(json.dumps(nothing))
        return QuantSim(FLOAT, TRAIN[:1], path)


def float_trained_on(seed: int) -> tuple[float, float]:
    """The float network through the same training."""
    sim = unrounded()
    train(sim.model, seed)
    return score(sim.model)


def epochs(seeds: int = 3) -> dict[str, float]:
    """How many epochs."""
    values = {}
    for scheme in ("w4a4", "w2a4"):
        for count in (1, 2, 3, 5, 10):
            values |= repeated(f"epochs_{scheme}_{count}", scheme, seeds, epochs=count)
    return values


def rates(seeds: int = 3) -> dict[str, float]:
    """Which learning rate, with SGD and with Adam; the rates are numbered."""
    values = {}
    for scheme in ("w4a4", "w2a4"):
        for optimizer, tried in (("sgd", SGD_RATES), ("adam", ADAM_RATES)):
            for place, rate in enumerate(tried):
                name = f"{optimizer}_{scheme}_{place}"
                values |= repeated(name, scheme, seeds, rate=rate, optimizer=optimizer)
    return values


def shifts(seeds: int = 3) -> dict[str, float]:
    """Calibration on pictures unlike those to come, then training with steps that stay or learn."""
    values = {}
    for scheme in ("w4a4", "w2a4"):
        for shift in SHIFTS:
            before = [score(simulation(scheme, seed, shift).model) for seed in range(seeds)]
            values |= summary(f"shift_ptq_{scheme}_{shift}", before)
            for kind, learned in (("learned", True), ("fixed", False)):
                values |= repeated(f"shift_{kind}_{scheme}_{shift}", scheme, seeds, shift, learned)
    return values


def steps(seeds: int = 3) -> dict[str, float]:
    """Steps that stay, that learn, that learn for three epochs, and that are calibrated once more after training."""
    values = {}
    for scheme in ("w4a4", "w3a4", "w2a4"):
        values |= repeated(f"steps_fixed_{scheme}", scheme, seeds, learned=False)
        learned, frozen, again = [], [], []
        for seed in range(seeds):
            sim = simulation(scheme, seed)
            train(sim.model, seed)
            learned.append(score(sim.model))
            sim.calibrate(calibration(seed))
            again.append(score(sim.model))
            sim = simulation(scheme, seed)
            train(sim.model, seed, after_step=lambda step, sim=sim: step == 3 * STEPS and sim.freeze())
            frozen.append(score(sim.model))
        for name, scores in (("learned", learned), ("frozen", frozen), ("again", again)):
            values |= summary(f"steps_{name}_{scheme}", scores)
    return values


def kind_of(name: str) -> str:
    """Whether a parameter of a simulation is a weight, a bias or a step."""
    return "steps" if name.endswith("scale") else "biases" if ".bias." in name else "weights"


def part(scheme: str, seed: int, *kinds: str) -> tuple[float, float]:
    """A scheme of which nothing is trained but parameters of some kinds."""
    sim = simulation(scheme, seed)
    for name, parameter in sim.model.named_parameters():
        parameter.requires_grad_(kind_of(name) in kinds)
    train(sim.model, seed)
    return score(sim.model)


@torch.no_grad()
def in_steps(sim: QuantSim, name: str) -> torch.Tensor:
    """A weight tensor, not rounded, in units of its step."""
    owner = sim.model.get_submodule(name.rpartition(".")[0])
    return owner.parametrizations.weight.original / sim.quantizers[name].step


def codes(sim: QuantSim) -> torch.Tensor:
    """All weights' codes."""
    found = {name: one for name, one in sim.quantizers.items() if one.is_weight}
    parts = [in_steps(sim, name).round().clamp(one.low, one.low + one.last) for name, one in found.items()]
    return torch.cat([part.flatten() for part in parts])


def path(scheme: str, seed: int = 0) -> dict[str, list]:
    """One training, looked at every five steps: score, changed codes, and the weights of one layer, not rounded."""
    sim = simulation(scheme, seed)
    first, seen = codes(sim), {"right": [], "db": [], "changed": [], "histogram": []}

    def look(step: int) -> None:
        if step % 5 == 0:
            for name, value in zip(seen, (*score(sim.model), 100 * (codes(sim) != first).float().mean().item())):
                seen[name].append(round(value, 2))
            seen["histogram"].append(np.histogram(in_steps(sim, LAYER).numpy(), EDGES)[0].tolist())

    look(0)
    train(sim.model, seed, after_step=look)
    return seen


def parts() -> tuple[dict[str, float], dict[str, Any]]:
    """What training changes: one kind of parameters at a time; and three trainings step by step."""
    values = {}
    sim = simulation("w4a4")
    for kind in ("weights", "biases", "steps"):
        values[f"count_{kind}"] = sum(p.numel() for name, p in sim.model.named_parameters() if kind_of(name) == kind)
        for scheme in ("w4a4", "w3a4", "w2a4"):
            values |= summary(f"only_{kind}_{scheme}", [part(scheme, seed, kind) for seed in range(3)])
    paths = {scheme: path(scheme) for scheme in ("w4a4", "w3a4", "w2a4")}
    values |= {f"changed_{scheme}": found["changed"][-1] for scheme, found in paths.items()}
    return values, {"edges": EDGES.tolist(), "paths": paths}


def put(sim: QuantSim, network: onnx.ModelProto) -> None:
    """Take weights and biases, not rounded, from a network with the simulation's names."""
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in network.graph.initializer}
    for name, parameter in sim.model.named_parameters():
        if name.endswith(".original"):
            parameter.data = torch.tensor(found[name.replace(".parametrizations", "").removesuffix(".original")])


def corrected(scheme: str, seed: int) -> tuple[float, float]:
    """No training: the biases are corrected on the pictures of the calibration, as the converter does it."""
    sim = simulation(scheme, seed)
    weights = {one.name: one.values for one in graph.weights(sim.export().float_network).values()}
    samples = [{"input": batch.numpy()} for batch in calibration(seed)]
    put(sim, equalize.correct_biases(unrounded().export().float_network, weights, samples).network)
    return score(sim.model)


def forgotten(scheme: str, seed: int) -> tuple[float, float]:
    """Trained and exported; then the float network is calibrated as at first, without its encodings."""
    trained = simulation(scheme, seed)
    train(trained.model, seed)
    sim = simulation(scheme, seed)
    put(sim, trained.export().float_network)
    sim.calibrate(calibration(seed))
    return score(sim.model)


def remedies() -> dict[str, float]:
    """What comes near training, and what undoes it."""
    values = {}
    for scheme in ("w4a4", "w3a4", "w2a4"):
        values |= summary(f"corrected_{scheme}", [corrected(scheme, seed) for seed in range(3)])
        both = [part(scheme, seed, "biases", "steps") for seed in range(3)]
        values |= summary(f"without_weights_{scheme}", both)
        values |= summary(f"forgotten_{scheme}", [forgotten(scheme, seed) for seed in range(3)])
    return values


def on_htp(network: onnx.ModelProto, arch: str = "v75") -> np.ndarray:
    """The logits of all test digits on the HTP backend (emulated), CPU fallback off."""
    network = copy.deepcopy(network)
    for entry in (*network.graph.input, *network.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = len(TEST)
    del network.graph.value_info[:]
    shaped = onnx.shape_inference.infer_shapes(network, data_prop=True)
    return next(iter(htp.run(shaped, {"input": TEST.numpy()}, arch).values()))


def backend() -> dict[str, float]:
    """Exported networks on the HTP backend (emulated) and in integers, against the simulation."""
    values, truth = {}, TRUTH.numpy()
    for scheme in SCHEMES:
        rows = []
        for seed in range(3):
            sim = simulation(scheme, seed)
            train(sim.model, seed)
            converted = sim.export()
            with torch.no_grad():
                simulated = sim.model(TEST).numpy()
            step = float(converted.encodings.activations["fc"].scale)
            found = on_htp(converted.network), IntegerNetwork(converted.network)({"input": TEST.numpy()})[0]
            right = [100 * (logits.argmax(1) == truth).mean() for logits in (simulated, *found)]
            apart = [np.abs(logits - simulated) / step for logits in found]
            changes = [100.0 * ((found[0].argmax(1) == truth) - (simulated.argmax(1) == truth).astype(float))]
            rows.append((*right, *[100 * (a < 0.5).mean() for a in apart], *[a.max() for a in apart], *changes))
        columns = list(zip(*rows))
        names = "sim_right", "htp_right", "integer_right", "htp_equal", "integer_equal"
        values |= {f"backend_{scheme}_{name}": statistics.mean(column) for name, column in zip(names, columns)}
        values |= {f"backend_{scheme}_{name}_worst": max(columns[5 + i]) for i, name in enumerate(("htp", "integer"))}
        points = np.concatenate(columns[7])
        values[f"backend_{scheme}_change"] = points.mean()
        values[f"backend_{scheme}_change_95"] = 1.96 * points.std() / np.sqrt(len(points))
        print({key: round(value, 2) for key, value in values.items() if scheme in key}, flush=True)
    return values


def aimet() -> dict[str, float]:
    """The same schemes, images, batches and steps in aimet-torch, its BatchNorms folded."""
    from aimet_torch.batch_norm_fold import fold_all_batch_norms
    from aimet_torch.quantsim import QuantizationSimModel

    network, values = copy.deepcopy(FLOAT), {}
    fold_all_batch_norms(network, (1, 1, 8, 8))
    names = {"min-max": "tf", "sqnr": "tf_enhanced"}
    for scheme, (weight_bits, act_bits, _, act_scheme) in SCHEMES.items():
        bits = {"default_output_bw": act_bits, "default_param_bw": weight_bits}

        def theirs(seed: int, bits: dict = bits, name: str = names[act_scheme]) -> QuantizationSimModel:
            sim = QuantizationSimModel(network, TRAIN[:1], quant_scheme=name, **bits)
            with torch.no_grad():
                sim.compute_encodings(lambda model, seed: [model(part) for part in calibration(seed)], seed)
            return sim

        values |= trained(scheme, theirs, "aimet_")
    return values


def main() -> None:
    """Write one table where the chapter looks for it."""
    torch.set_num_threads(1)  # layers this small gain nothing from a second one
    table, target = sys.argv[1:]
    tables = ladder, parts, remedies, epochs, rates, shifts, steps, backend, aimet
    made = {function.__name__: function for function in tables}[table]()
    values, more = made if isinstance(made, tuple) else (made, {})
    about = "one thread, with others at work on the same computer" + ("; aimet-torch 2.42.0" * (table == "aimet"))
    record(target, values, about, **more)


if __name__ == "__main__":
    main()
