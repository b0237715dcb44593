"""Which tensors get how many bits: losses, costs and the rules of the hardware side by side, and a choice from them.

`problem` puts together what `ptq.sensitivity` measured, what each type costs and what an architecture takes; `exact`,
`greedy`, `top_share` and `pareto` choose; `search` is all of it in one call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qtools._files import replace_json
from qtools.encodings import Overrides, Rule
from qtools.metrics import sqnr_db
from qtools.npu import capabilities
from qtools.ptq.convert import Converted, Options, Runner, in_words, outputs, quantize_network
from qtools.ptq.fuse import View
from qtools.ptq.graph import channel_axis
from qtools.ptq.sensitivity import FLOAT, Metric, Sensitivity, Types, gives, owners, sensitivity
from qtools.ptq.write import quantized_tensors

if TYPE_CHECKING:
    import onnx

    from qtools.ptq.calibrate import Calibration

Cost = Literal["bytes", "bitops", "wide"] | Mapping[str, Mapping[int, float]]
_DEFAULTS = Options()
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
# Operators that the HTP backend takes with any mix of 8- and 16-bit inputs and outputs (each tried alone); the rest
# is taken for what wants one width, as the products do.
_CONVERTING = {
    *_ARITHMETIC, "Abs", "AveragePool", "Clip", "Concat", "Exp", "GlobalAveragePool", "GlobalMaxPool", "HardSwish",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "Max", "Min", "Neg", "Pow", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceSum", "Relu", "Resize", "Sigmoid", "Sin", "Softmax", "Softplus", "Sqrt", "Tanh",
}  # fmt: skip
_CONVERTING_FROM_V69 = {"Elu", "Gelu", "HardSigmoid", "Pad"}


@dataclass(frozen=True, eq=False)
class Problem:
    """Types to choose from, one for each unit.

    Parameters
    ----------
    units : tuple of tuple of str
        Tensors that share a type.
    bits : tuple of int
    losses, costs : ndarrays of shape (units, bits)
        What a type loses and costs; both are added up.  A cost of infinity: not to be had.
    pairs : tuple of (int, int, ndarray of shape (bits, bits))
        A unit with weights and the one it is multiplied with: what their types cost together.
    excluded : tuple of str
        What is not to be had, and why.
    """

    units: tuple[tuple[str, ...], ...]
    bits: tuple[int, ...]
    losses: np.ndarray
    costs: np.ndarray
    pairs: tuple[tuple[int, int, np.ndarray], ...] = ()
    excluded: tuple[str, ...] = ()

    def cost(self, choice: np.ndarray) -> float:
        """Of one index into `bits` for each unit."""
        own = self.costs[np.arange(len(choice)), choice].sum()
        return float(own + sum(price[choice[i], choice[j]] for i, j, price in self.pairs))

    def plan(self, choice: np.ndarray, method: str) -> Plan:
        types = {name: self.bits[k] for unit, k in zip(self.units, choice) for name in unit}
        return Plan(types, self.cost(choice), float(self.losses[np.arange(len(choice)), choice].sum()), method)


@dataclass(frozen=True)
class Plan:
    """Bits by tensor, what they cost and lose by the tables they were chosen from, and how they were chosen."""

    types: Types
    cost: float
    loss: float
    method: str


# -- the problem -----------------------------------------------------------------------------------------------------


def groups(network: onnx.ModelProto, arch: str = "v75") -> list[tuple[str, ...]]:
    """The activations that must share a width, those that share with none alone.

    The HTP backend refuses a product (Conv, Gemm, MatMul) whose input and output differ in width; most other operators
    it takes with any mix, and these are where widths may change.  Arithmetic with a constant is kept at one width too:
    it moves the codes of its input onto another grid, where more bits would only store the rounding done before.
    """
    tensors, view = quantized_tensors(network), View(network)
    leader = {root: root for root in tensors.activations.values()}
    free = _CONVERTING if arch == "v68" else _CONVERTING | _CONVERTING_FROM_V69

    def find(root: str) -> str:
        return root if leader[root] == root else find(leader[root])

    for node in view.nodes:
        made = gives(view, node, tensors.activations)
        with_constant = node.op_type in _ARITHMETIC and any(name in view.constants for name in node.input)
        if made is None or (node.op_type in free and not with_constant):
            continue
        for name in node.input:
            if name in tensors.activations:
                leader[find(tensors.activations[name])] = find(tensors.activations[made])
    found: dict[str, list[str]] = {}
    for root in leader:
        found.setdefault(find(root), []).append(root)
    return [tuple(group) for group in found.values()]


def problem(
    table: Sensitivity,
    network: onnx.ModelProto,
    cost: Cost = "bytes",
    options: Options = _DEFAULTS,
    arch: str | None = None,
) -> Problem:
    """What `table` measured, with costs and, for an architecture, without what it refuses.

    Parameters
    ----------
    table : Sensitivity
        A tensor that it leaves out keeps the type of `options`; a type that was not tried is not to be had.
    cost : {'bytes', 'bitops', 'wide'} or mapping
        Bytes of weights and activations, each written once and read by each of its readers; multiplications times the
        bits of both factors; activations of more than 8 bits; or name to bits to anything that adds up, such
        as a predicted time.
    options : Options
    arch : str, optional
        A key of `htp.SOC_OF_ARCH`.

    Raises
    ------
    ValueError
        If a table has a name that is unknown.
    """
    tensors, view = quantized_tensors(network), View(network)
    known = {**dict.fromkeys(tensors.activations.values(), options.act_bw)}
    known |= dict.fromkeys(tensors.weights, options.weight_bw)
    named = {name for unit in table.units for name in unit}
    if odd := [name for name in (*named, *(() if isinstance(cost, str) else cost)) if name not in known]:
        raise ValueError(f"the network has no activation or weight {odd[0]!r} with a type of its own")
    fixed = [name for name in known if name not in named]
    bits = tuple(sorted({*table.bits, *(known[name] for name in fixed)} - {FLOAT}))
    units = (*table.units, *((name,) for name in fixed))
    losses = np.full((len(units), len(bits)), np.nan)
    for k, width in enumerate(bits):
        if width in table.bits:
            losses[: len(table.units), k] = table.mean[:, table.bits.index(width)]
        losses[len(table.units) :, k] = [0.0 if known[name] == width else np.nan for name in fixed]
    widths, where = np.array(bits, float), {name: i for i, unit in enumerate(units) for name in unit}
    costs, pairs, excluded = np.where(np.isnan(losses), np.inf, 0.0), [], {}
    for name, i in where.items():
        costs[i] += _alone(view, name, cost, widths)
        if arch and 4 in bits and name not in tensors.weights:
            costs[i, bits.index(4)] = np.inf
            excluded["the backend has no operators for uint4 activations"] = None
    for node in (node for node in view.nodes if node.op_type in _PRODUCTS):
        i, j = (where.get(tensors.activations.get(name, name)) for name in (node.input[1], node.input[0]))
        if i is None or j is None:
            continue
        price = np.outer(widths, widths) * (_products(view, node, tensors.weights) if cost == "bitops" else 0.0)
        if node.input[1] not in tensors.weights:
            costs[j] += np.diag(price)  # both factors are of one group
            continue
        for one, other in np.ndindex(price.shape):
            if reason := _refused(node.op_type, bits[one], bits[other], options, arch):
                price[one, other], excluded[reason] = np.inf, None
        pairs.append((i, j, price))
    return Problem(units, bits, np.nan_to_num(losses), costs, tuple(pairs), tuple(excluded))


def _alone(view: View, name: str, cost: Cost, widths: np.ndarray) -> np.ndarray:
    constant = name in view.constants
    if cost == "bytes":
        return _size(view, name) * (1 if constant else 1 + len(view.readers.get(name, ()))) * widths / 8
    if cost == "wide":
        return (widths > 8) * float(not constant)
    return (
        np.zeros(len(widths)) if cost == "bitops" else np.array([cost.get(name, {}).get(int(w), 0.0) for w in widths])
    )


def _size(view: View, name: str) -> int:
    shape = view.constants[name].dims if name in view.constants else view.shapes.get(name, ())
    return math.prod(max(1, size) for size in shape)


def _products(view: View, node: onnx.NodeProto, known: Mapping[str, int]) -> float:
    """Multiplications of a Conv, Gemm or MatMul, for a batch of one where that is free."""
    out, factor = _size(view, node.output[0]), node.input[1]
    if factor not in known:
        return float(out * max(1, view.shapes.get(node.input[0], (1,))[-1]))
    dims = view.constants[factor].dims
    if node.op_type == "ConvTranspose":
        return float(_size(view, node.input[0]) * math.prod(dims) / dims[0])
    return float(out * math.prod(dims) / dims[channel_axis(node, len(dims))])


def _refused(op: str, weight: int, activation: int, options: Options, arch: str | None) -> str | None:
    op = "Conv" if op == "ConvTranspose" else op
    fine = options.use_per_channel_quantization if op == "Conv" else options.use_per_row_quantization
    kind = capabilities.Probe(op, weight, f"uint{activation}", "channel" if fine else "tensor")
    answers = capabilities.recorded().get(kind) if arch else None
    return f"{arch} refuses {in_words(kind)}" if answers and not answers[arch].accepted else None


# -- choosing --------------------------------------------------------------------------------------------------------


def exact(problem: Problem, budget: float) -> Plan:
    """The least loss there is for a budget: an integer program, solved by HiGHS.

    A unit has one of its types; a pair, one of the pairs of types, which must be the types of both.

    Raises
    ------
    ValueError
        If nothing that is to be had costs so little.
    """
    found = _solved(problem, problem.losses, budget)
    if found is None:
        least = _solved(problem, None)
        why = (
            "no choice of types is legal" if least is None else f"the least that is legal costs {problem.cost(least):g}"
        )
        raise ValueError(f"the budget of {budget:g} cannot be met: {why}")
    return problem.plan(found, "exact")


def _solved(
    problem: Problem, losses: np.ndarray | None, budget: float = np.inf, sign: float = 1.0
) -> np.ndarray | None:
    """Indices of the best types, or None; without losses, of the cheapest, or by the sign of the dearest."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    count, n = problem.costs.shape
    prices = [problem.costs.ravel(), *(price.ravel() for _, _, price in problem.pairs)]
    price = np.concatenate(prices)
    legal, size = np.isfinite(price), len(price)
    price = np.where(legal, price, 0.0)
    # Rows: one type a unit; then, for each pair, its first and its second type.
    rows, columns, values = [np.repeat(np.arange(count), n)], [np.arange(count * n)], [np.ones(count * n)]
    for number, (i, j, _) in enumerate(problem.pairs):
        first, at = count + 2 * n * number, (count + number * n) * n
        for side, unit in enumerate((i, j)):
            lines = first + side * n + np.arange(n)
            cells = at + np.arange(n * n).reshape(n, n)
            rows += [np.repeat(lines, n), lines]
            columns += [(cells if side == 0 else cells.T).ravel(), unit * n + np.arange(n)]
            values += [np.ones(n * n), -np.ones(n)]
    total = count + 2 * n * len(problem.pairs)
    matrix = coo_array((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(total, size))
    right = np.r_[np.ones(count), np.zeros(total - count)]
    limits = [LinearConstraint(matrix.tocsr(), right, right)]
    goal = sign * price if losses is None else np.r_[losses.ravel(), np.zeros(size - losses.size)]
    goal = goal * (1e5 / (np.abs(goal).max() or 1.0))  # far above the gap at which the solver stops
    whole = np.r_[np.ones(count * n), np.zeros(size - count * n)]
    allowed = budget
    for _ in range(4):
        bound = [LinearConstraint(price[None], -np.inf, allowed)] if np.isfinite(budget) else []
        done = milp(
            goal,
            integrality=whole,
            bounds=Bounds(0, legal * 1.0),
            constraints=limits + bound,
            options={"mip_rel_gap": 0},
        )
        if done.x is None:
            return None
        choice = done.x[: count * n].reshape(count, n).argmax(1)
        if problem.cost(choice) <= budget:
            return choice
        allowed -= 2 * (problem.cost(choice) - budget)  # the solver may be off by a millionth
    return None


def greedy(problem: Problem, budget: float) -> Plan:
    """From the cheapest types on, the change that saves most loss for its cost, as long as the budget lasts.

    Raises
    ------
    ValueError
        As `exact`.
    """
    choice = _solved(problem, None)
    if choice is None or problem.cost(choice) > budget:
        return exact(problem, budget)  # says why there is none
    while True:
        now, best, found = problem.cost(choice), 0.0, None
        for i, k in np.ndindex(problem.costs.shape):
            saved = problem.losses[i, choice[i]] - problem.losses[i, k]
            if saved > 0 and np.isfinite(problem.costs[i, k]):
                other = choice.copy()
                other[i] = k
                price = problem.cost(other)
                rate = saved / max(price - now, 1e-12)
                if price <= budget and rate > best:
                    best, found = rate, other
        if found is None:
            return problem.plan(choice, "greedy")
        choice = found


def top_share(problem: Problem, share: float = 0.2, low: int = 8, high: int = 16) -> Plan:
    """All at `low` bits, but that share of the units that loses most by it at `high`, as far as that is legal."""
    few, most = problem.bits.index(low), problem.bits.index(high)
    choice, left = np.full(len(problem.units), few), round(share * len(problem.units))
    for i in np.argsort(problem.losses[:, most] - problem.losses[:, few], kind="stable"):
        other = choice.copy()
        other[i] = most
        if left and np.isfinite(problem.cost(other)):
            choice, left = other, left - 1
    return problem.plan(choice, f"top {100 * share:g} %")


def pareto(problem: Problem, points: int = 16) -> list[Plan]:
    """The best plans for budgets from the least to the most that is worth spending; cost rises, and loss falls."""
    cheapest, best = _solved(problem, None), _solved(problem, problem.losses)
    if cheapest is None or best is None:
        raise ValueError("no choice of types is legal")
    front: list[Plan] = []
    for budget in np.linspace(problem.cost(cheapest), max(problem.cost(best), problem.cost(cheapest)), points):
        plan = exact(problem, float(budget))
        if not front or plan.loss < front[-1].loss:
            front.append(plan)
    return front


# -- out -------------------------------------------------------------------------------------------------------------


def overrides(network: onnx.ModelProto, types: Types, options: Options = _DEFAULTS) -> Overrides:
    """Types as overrides for the converter: those that `options` do not give anyway.

    A constant that is no weight goes with what is computed with it.
    """
    tensors, rules = quantized_tensors(network), []
    rest = {name: max(types.get(root, options.act_bw) for root in roots) for name, roots in owners(network).items()}
    for name, bits in (types | rest).items():
        kind = "param" if name in tensors.weights or name in rest else "activation"
        if bits != (options.weight_bw if name in tensors.weights else options.act_bw):
            rules.append(Rule(name, bits, None, kind))
    return Overrides(tuple(rules))


def write_overrides(chosen: Overrides, path: Path | str) -> None:
    """A file for ``qtools convert --quantization_overrides``."""
    content: dict[str, dict[str, Any]] = {"activation_encodings": {}, "param_encodings": {}}
    for rule in chosen.rules:
        content[f"{rule.kind}_encodings"][rule.pattern] = {"dtype": f"int{rule.bits}"}
    replace_json(Path(path), content)


def apply(network: onnx.ModelProto, types: Types, calibration: Calibration, options: Options = _DEFAULTS) -> Converted:
    """The network quantized with these types."""
    return quantize_network(network, (), options, overrides(network, types, options), calibration=calibration)


# -- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """A plan, and what it was chosen from; in several rounds, from the tables of the last."""

    plan: Plan
    table: Sensitivity
    problem: Problem


def search(
    network: onnx.ModelProto,
    samples: Sequence[Any],
    calibration: Calibration,
    budget: float | str,
    *,
    cost: Cost = "bytes",
    bits: Sequence[int] = (8, 16),
    weight_bits: Sequence[int] = (8,),
    options: Options = _DEFAULTS,
    arch: str | None = None,
    metric: Metric | None = None,
    rounds: int = 3,
    hardest: int | None = None,
    subsets: int = 4,
    threads: int = 1,
    resume: Path | str | None = None,
    progress: bool = False,
) -> Search:
    """Find types for a budget: all begin at their most bits, and what costs least loss goes down.

    Roundings do not add up: behind one, a second of the same fineness costs nothing.  So the budget shrinks in rounds,
    and in each the losses are measured anew around what the last one chose.

    Parameters
    ----------
    network, samples, calibration, metric, options, subsets, threads, resume, progress
        As for `sensitivity`; `resume` gets the number of the round behind its name.
    budget : float or str
        In the unit of `cost`; "30%" is that share of the dearest choice.
    cost, arch
        As for `problem`.
    bits, weight_bits : sequence of int
        The types of activations and of weights to choose from.
    rounds : int
    hardest : int, optional
        Measure on that many samples only: those whose outputs suffer most when all have the fewest bits.

    Raises
    ------
    ValueError
        As `sensitivity`, `problem` and `exact`, or if `rounds` or `hardest` is not positive.
    """
    if rounds < 1 or (hardest is not None and hardest < 1):
        raise ValueError(f"rounds and hardest are 1 or more, got {rounds} and {hardest}")
    tensors = quantized_tensors(network)
    units = groups(network, arch or "v75") + [(name,) for name in tensors.weights if len(weight_bits) > 1]
    few = dict.fromkeys(tensors.activations.values(), min(bits)) | dict.fromkeys(tensors.weights, min(weight_bits))
    types = dict.fromkeys(tensors.weights, options.weight_bw)
    types |= {name: max(weight_bits if name in tensors.weights else bits) for unit in units for name in unit}
    measured = metric
    if hardest is not None:
        picked = _hardest(network, samples, apply(network, few, calibration, options), hardest)
        samples = [samples[i] for i in picked]
        measured = None if metric is None else lambda given, which: metric(given, picked[which])
    # Before hours are spent: can the budget be met at all?
    every = tuple(sorted({*bits, *weight_bits}))
    tried = [[width in (weight_bits if unit[0] in tensors.weights else bits) for width in every] for unit in units]
    blank = np.where(tried, 0.0, np.nan)[:, :, None]
    kinds = tuple("weight" if unit[0] in tensors.weights else "activation" for unit in units)
    task = problem(
        Sensitivity(tuple(units), kinds, every, blank, blank, "one_spared", 0.0), network, cost, options, arch
    )
    dearest = _solved(task, None, sign=-1.0)
    full = task.cost(dearest) if dearest is not None else 0.0
    exact(task, wanted := _amount(budget, full))
    shrink = wanted / full if full else 1.0
    for turn in range(1, rounds + 1):
        table = sensitivity(
            network, samples, calibration, measured, options=options, direction="one_spared", bits=bits,
            weight_bits=weight_bits, base=types, units=units, subsets=subsets, threads=threads,
            resume=resume and f"{resume}.{turn}", progress=progress,
        )  # fmt: skip
        task = problem(table, network, cost, options, arch)
        plan = exact(task, max(wanted, full * shrink ** (turn / rounds) if turn < rounds else 0.0))
        types = plan.types
    return Search(plan, table, task)


def _amount(budget: float | str, full: float) -> float:
    try:
        amount = float(budget[:-1]) / 100 * full if isinstance(budget, str) and budget.endswith("%") else float(budget)
    except ValueError:
        amount = np.nan
    if not amount >= 0:
        raise ValueError(f"a budget is a number, or a share such as 30%, got {budget!r}")
    return amount


def _hardest(network: onnx.ModelProto, samples: Sequence[Any], coarse: Converted, count: int) -> np.ndarray:
    names = outputs(network)
    runs = Runner(network, names), Runner(coarse.network, names)
    fidelity = [min(sqnr_db(*pair) for pair in zip(*(run(sample) for run in runs))) for sample in samples]
    return np.sort(np.argsort(fidelity, kind="stable")[:count])
