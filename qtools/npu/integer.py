"""Integer-only inference of a network with QuantizeLinear and DequantizeLinear nodes, as a chip computes it.

Between the first codes and the last there are integers only: products of codes are summed in 32 bits (in 64, where
16-bit codes need it), multiplied back to 8 or 16 bits, and looked up in tables.  All of it follows open definitions:
ONNX's QLinear operators, and for fixed point Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, CVPR 2018 (arXiv:1712.05877), with gemmlowp, the library it describes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import onnx

_MOVES = {
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity", "DepthToSpace",
    "SpaceToDepth", "Expand", "Tile", "Pad", "MaxPool",
}  # fmt: skip
# Functions of one tensor, and of single numbers besides: looked up in a table.
_CURVES = {
    "Relu", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Sqrt", "Pow", "Exp", "Log",
    "Erf", "Gelu", "Elu", "Selu", "Celu", "Mish", "Softplus", "Softsign", "Abs", "Neg", "Reciprocal", "Floor", "Ceil",
    "Round", "Sin", "Cos", "Min", "Max", "Add", "Sub", "Mul", "Div",
}  # fmt: skip


# -- one accumulator -------------------------------------------------------------------------------------------------


def accumulate(x_codes: np.ndarray, x_zero: int, w_codes: np.ndarray, w_zero: Any) -> tuple[np.ndarray, ...]:
    """The accumulators sum((x - x_zero) (w - w_zero)) of a matrix product of codes, in the four terms to be added.

    Source: Jacob et al. 2018, section 2.3, equation 7.

    Parameters
    ----------
    x_codes, w_codes : integer ndarray, (m, k) and (k, n)
    x_zero : int
    w_zero : int, or one for each of the n columns

    Returns
    -------
    tuple of four int64 arrays
        sum(x w), -w_zero sum(x), -x_zero sum(w), k x_zero w_zero; the last two are known before any input is.

    Examples
    --------
    >>> [term.tolist() for term in accumulate(np.array([[130, 5]]), 128, np.array([[3], [-2]]), 1)]
    [[[380]], [[-135]], [-128], 256]
    """
    x, w, w_zero = np.asarray(x_codes, np.int64), np.asarray(w_codes, np.int64), np.asarray(w_zero, np.int64)
    return x @ w, -w_zero * x.sum(1, keepdims=True), -x_zero * w.sum(0), len(w) * x_zero * w_zero


def requantize_float(acc: np.ndarray, multiplier: Any, zero_point: int, low: int, high: int) -> np.ndarray:
    """Accumulators to codes low..high by ONNX's rule: times a float32, rounded half to even, then the zero point.

    Examples
    --------
    >>> requantize_float(np.array([5, 7, -900]), 0.5, 3, 0, 255).tolist()
    [5, 7, 0]
    """
    scaled = np.rint(np.asarray(acc).astype(np.float32) * np.asarray(multiplier, np.float32))
    return np.clip(scaled + zero_point, low, high).astype(np.int64)


def quantize_multiplier(real: Any) -> tuple[np.ndarray, np.ndarray]:
    """A factor as int32 ``mantissa * 2**(shift - 31)``, the mantissa 2**30 or more, below 2**31.

    Source: Jacob et al. 2018, section 2.2, equation 6.

    Raises
    ------
    ValueError
        If a factor is not finite.

    Examples
    --------
    >>> [part.item() for part in quantize_multiplier(0.75)]
    [1610612736, 0]
    """
    if not np.isfinite(real).all():
        raise ValueError(f"a multiplier must be finite, got {real}")
    mantissa, shift = np.frexp(np.asarray(real, np.float64))
    mantissa = np.rint(mantissa * 2**31)
    full = np.abs(mantissa) == 2**31  # rounded up to 1
    mantissa, shift = np.where(full, mantissa / 2, mantissa), shift + full
    # Below 2**-31 nothing is left of an accumulator.
    return np.where(shift < -31, 0, mantissa).astype(np.int32), np.clip(shift, -31, 30).astype(np.int32)


def requantize_fixed(acc: np.ndarray, mantissa: Any, shift: Any, zero_point: int, low: int, high: int) -> np.ndarray:
    """Accumulators to codes low..high in integers alone: a doubling high multiplication, then a rounding shift.

    Both round to nearest, halves up in the one and away from zero in the other.  Source: Jacob et al. 2018, section
    2.2; gemmlowp's SaturatingRoundingDoublingHighMul and RoundingDivideByPOT.

    Parameters
    ----------
    acc : integer ndarray
        Of 32 bits.
    mantissa, shift
        See `quantize_multiplier`.

    Raises
    ------
    ValueError
        If an accumulator needs more than 32 bits.

    Examples
    --------
    >>> requantize_fixed(np.array([5, -5]), *quantize_multiplier(0.5), 0, -128, 127).tolist()
    [3, -2]
    """
    from qtools.npu._integer_kernels import fixed_codes

    acc = np.asarray(acc, np.int64)
    if (np.abs(acc) >= 2**31).any():
        raise ValueError("an accumulator of more than 32 bits must be rounded to 32 first")
    return fixed_codes(acc, 0, *(np.asarray(part, np.int64) for part in (mantissa, shift, zero_point, low, high)))


def fixed_code(acc: int, before: int, mantissa: int, shift: int, zero_point: int, low: int, high: int) -> int:
    """One code, as `requantize_fixed` has it; one that needs more than 32 bits is divided by 2**before first."""
    sign = -1 if acc < 0 else 1
    acc = sign * ((abs(acc) + (1 << before >> 1)) >> before)
    product = min(max(acc << max(shift, 0), -(2**31)), 2**31 - 1) * mantissa
    upper, right = (product + 2**30) >> 31, max(-shift, 0)
    sign = -1 if upper < 0 else 1
    return min(max(sign * ((abs(upper) + (1 << right >> 1)) >> right) + zero_point, low), high)


# -- networks --------------------------------------------------------------------------------------------------------


class IntegerNetwork:
    """A QDQ network in integers; call it with a sample as a `convert.Runner`.

    Parameters
    ----------
    model : ModelProto
        Of opset 13 or newer, every operator between codes: as `write_qdq` or ONNX Runtime's ``quantize_static`` writes
        it.  Weights may be of 4, 8 or 16 bits, per tensor, per channel or in blocks.
    requantize : {'float', 'fixed'}
        The accumulators of products and averages become codes as in ONNX's QLinear operators (see `requantize_float`)
        or as in gemmlowp (see `requantize_fixed`).

    Raises
    ------
    ValueError
        Naming the node, if an operator is not known here or reads or writes floats.
    """

    def __init__(self, model: onnx.ModelProto, *, requantize: Literal["float", "fixed"] = "float") -> None:
        if requantize not in ("float", "fixed"):
            raise ValueError(f"requantize is 'float' or 'fixed', got {requantize!r}")
        self._read = Reader(model, requantize == "fixed")
        self._plans: dict[tuple[str, ...], list[tuple[_Step, list[str]]]] = {}

    def __call__(
        self, sample: Mapping[str, np.ndarray] | np.ndarray, names: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """The network's outputs, or other tensors: codes as they are in ONNX, or what they stand for in float32.

        Raises
        ------
        ValueError
            If an input is missing, unknown, of another shape or type, or holds NaN, or it does not go through a node;
            or a name is not that of codes, or of what a DequantizeLinear makes of them.
        """
        import torch

        read, names = self._read, tuple(self._read.outputs if names is None else names)
        if not isinstance(sample, Mapping):
            sample = {next(iter(read.inputs)): sample}
        if sample.keys() != read.inputs.keys():
            raise ValueError(f"the network's inputs are {', '.join(read.inputs)}; got {', '.join(sample)}")
        if names not in self._plans:
            self._plans[names] = self._plan(names)
        values = read.values | {name: _checked(name, sample[name], *read.inputs[name]) for name in sample}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # most products are small: threads would wait for each other longer than they work
        try:
            for step, done in self._plans[names]:
                made = step.run(step.table, *[values[name] for name in step.sources])
                values.update(zip(step.targets, made if isinstance(made, list) else (made,)))
                for name in done:
                    del values[name]
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{step.node}: {' '.join(str(error).split())}") from None
        finally:
            torch.set_num_threads(threads)
        return [self._shown(name, values) for name in names]

    def accumulator_bits(self) -> dict[str, int]:
        """Bits that the accumulators of each operator with weights can need, sign included, by node.

        The worst case of its weights and biases over all codes of its input; above 32 it is summed in int64 here.
        """
        return dict(self._read.bits)

    def _plan(self, names: tuple[str, ...]) -> list[tuple[_Step, list[str]]]:
        """The steps to these tensors, each with the values that nobody reads after it.

        A lookup that follows a step becomes part of it if nobody else sees what is between them.
        """
        from qtools.npu._integer_kernels import look_up

        places = {**self._read.codes, **self._read.tensors}
        unknown = [name for name in names if name not in places]
        if unknown:
            raise ValueError(f"there are no codes of {unknown[0]!r} in the network")
        wanted = {places[name][0] for name in names}
        needed, steps = set(wanted), []
        for step in reversed(self._read.steps):
            if needed & set(step.targets):
                needed |= set(step.sources)
                steps.insert(0, step)
        uses = [name for step in steps for name in step.sources] + list(wanted)
        makers = {name: index for index, step in enumerate(steps) for name in step.targets}
        for index in range(len(steps) - 1, 0, -1):
            table, source = steps[index].table, steps[index].sources[0]
            before = steps[makers.get(source, index)]
            only = steps[index].run is look_up and before is not steps[index] and uses.count(source) == 1
            if only and before.table is not None and before.table.itemsize <= table.itemsize:
                both = table[before.table.astype(np.int64) + len(table) // 2] if len(before.table) else table
                steps[makers[source]] = before._replace(table=both, targets=steps.pop(index).targets)
        last = {name: index for index, step in enumerate(steps) for name in (*step.sources, *step.targets)}
        gone = [[name for name in last if last[name] == index and name not in wanted] for index in range(len(steps))]
        return list(zip(steps, gone))

    def _shown(self, name: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
        if name in self._read.tensors:
            source, (scale, zero, _) = self._read.tensors[name]
            return np.multiply(np.subtract(values[source], zero, dtype=np.float32), scale, order="C")
        source, kind = self._read.codes[name]
        return np.add(values[source], shift_of(kind), dtype=np.int32).astype(kind, order="C")


def run_integer(
    model: onnx.ModelProto, sample: Mapping[str, np.ndarray] | np.ndarray, names: Sequence[str] = (), **options: Any
) -> dict[str, np.ndarray]:
    """`IntegerNetwork` once: its outputs, or the tensors `names`, by name."""
    network = IntegerNetwork(model, **options)
    return dict(zip(names or network._read.outputs, network(sample, names or None)))


def _checked(name: str, x: Any, kind: np.dtype, shape: list[int]) -> np.ndarray:
    """An input as it is computed with; the first axis may be of any length."""
    x = np.asarray(x)
    if x.dtype != kind or x.ndim != len(shape) or any(0 < b != a for a, b in zip(x.shape[1:], shape[1:])) or not x.size:
        raise ValueError(f"the input {name!r} is {kind} of shape {shape}, got {x.dtype} of shape {list(x.shape)}")
    return x if kind.kind == "f" else (x.astype(np.int32) - shift_of(kind)).astype(f"int{8 * kind.itemsize}")


# -- reading ---------------------------------------------------------------------------------------------------------

Made = tuple[Callable[..., Any], list[str], np.ndarray | None]  # run, sources and table of a step


class _Step(NamedTuple):
    """A call of ``run(table, *sources)``; `table` is a lookup behind it: empty for none, None where none can be."""

    node: str
    run: Callable[..., Any]
    sources: list[str]
    targets: list[str]
    table: np.ndarray | None


class Reading(NamedTuple):
    """How codes read: their ONNX type, and the zero point as in memory; of weights, arrays that broadcast."""

    scale: Any
    zero: Any
    kind: np.dtype

    @property
    def codes(self) -> np.ndarray:
        half = 1 << 8 * self.kind.itemsize - 1
        return np.arange(-half, half, dtype=f"int{8 * self.kind.itemsize}")

    @property
    def reals(self) -> np.ndarray:
        return np.subtract(self.codes, self.zero, dtype=np.float32) * self.scale

    @property
    def reach(self) -> int:
        return int(np.abs(self.codes[[0, -1]].astype(np.int64) - self.zero).max())

    def of(self, real: Any) -> np.ndarray:
        """The codes of real numbers, as QuantizeLinear has them; what is no number becomes zero."""
        with np.errstate(all="ignore"):
            codes = np.nan_to_num(np.rint(np.asarray(real, np.float32) / self.scale), posinf=1e9, neginf=-1e9)
        return np.clip(codes + self.zero, *self.codes[[0, -1]]).astype(self.codes.dtype)


class Target(NamedTuple):
    """How accumulators become the codes of a tensor; `low` and `high` are what an activation leaves of them."""

    reading: Reading
    low: int
    high: int
    fixed: bool

    @property
    def empty(self) -> np.ndarray:
        """No table."""
        return np.empty(0, self.reading.codes.dtype)

    @property
    def ends(self) -> tuple[np.float32, np.float32, np.float32]:
        return np.float32(self.reading.zero), np.float32(self.low), np.float32(self.high)

    def gain(self, factor: np.ndarray, bound: int) -> tuple[Any, ...]:
        """What accumulators up to `bound` are multiplied by: floats, or mantissas, shifts, and a shift before."""
        if not self.fixed:
            return (factor.astype(np.float32 if bound < 2**31 else np.float64),)
        before = max(0, int(bound).bit_length() - 31)
        mantissa, shift = (part.astype(np.int64) for part in quantize_multiplier(factor * np.float64(1 << before)))
        return mantissa, shift, before


class Reader:
    """The nodes of a network made into steps."""

    def __init__(self, model: onnx.ModelProto, fixed: bool) -> None:
        from onnx import helper, numpy_helper

        from qtools.npu import _integer_kernels

        if max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0) < 13:
            raise ValueError("the network must be of opset 13 or newer")
        self.operators, self.fixed, self.steps, self.bits = _integer_kernels, fixed, [], {}
        self.reals = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.weights: dict[str, tuple[np.ndarray, Reading]] = {}  # constants as codes
        self.values: dict[str, np.ndarray] = {}  # those of one scale, as operands
        self.codes: dict[str, tuple[str, np.dtype]] = {}  # under which name they are computed, and their ONNX type
        self.tensors: dict[str, tuple[str, Reading]] = {}  # what codes stand for
        self.floats: dict[str, onnx.NodeProto] = {}  # what still has to be quantized
        self.inputs, self.outputs = {}, [entry.name for entry in model.graph.output]
        for entry in model.graph.input:
            kind = np.dtype(helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type))
            if entry.name not in self.reals:
                self.inputs[entry.name] = kind, [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
                self.codes |= {} if kind.kind == "f" else {entry.name: (entry.name, kind)}
        for self.node in model.graph.node:
            try:
                self._add(self.node)
            except ValueError as error:
                raise ValueError(f"{self._label()}: {error}") from None
        for name in self.outputs:
            if name not in self.tensors and name not in self.codes:
                raise ValueError(f"the output {name!r} is a float that is never quantized")

    def _add(self, node: onnx.NodeProto) -> None:
        op, source, target = node.op_type, node.input[0] if node.input else "", node.output[0]
        if node.domain not in ("", "ai.onnx"):
            raise ValueError(f"operators of {node.domain} are not known here")
        if op == "Constant":
            self.reals[target] = reference(node, {})[0]
        elif op == "QuantizeLinear":
            self._quantize(node)
        elif op == "DequantizeLinear" and source in self.reals:
            codes, (scale, zero, kind) = self.weights[target] = self._constant(node)
            if scale.size == 1 and kind.itemsize < 4:  # not a bias
                self.tensors[target] = target, Reading(np.float32(scale.item()), int(zero.item()), kind)
                self.values[target] = codes.astype(f"int{8 * kind.itemsize}")
        elif op == "DequantizeLinear" and source in self.codes:
            self.tensors[target] = self.codes[source][0], self._reading(node, self.codes[source][1])
        elif op in _MOVES and source in self.tensors:
            name, reading = self.tensors[source]
            constants = {name: self.reals[name] for name in node.input[1:] if name in self.reals}
            self._step((self.operators.move(node, reading, constants), [name], None), list(node.output))
            self.tensors |= {name: (name, reading) for name in node.output}
        elif op in {*self.operators.MAKERS, *_CURVES, *_MOVES}:
            clamped = self.floats if op in ("Relu", "Clip") else {}
            for name in {*node.input} - {"", *self.tensors, *self.weights, *self.reals, *clamped}:
                raise ValueError(f"it reads {name!r}, a float that is not quantized")
            self.floats[target] = node
        else:
            raise ValueError("it is not known here")

    def _label(self) -> str:
        return f"{self.node.op_type} {self.node.name or self.node.output[0]!r}"

    def _step(self, made: Made, targets: list[str]) -> None:
        self.steps.append(_Step(self._label(), *made[:2], targets, made[2]))

    def _quantize(self, node: onnx.NodeProto) -> None:
        name, target, kind = node.input[0], node.output[0], self._zero(node, np.uint8).dtype
        reading = self._reading(node, kind)
        low, high = (int(end) for end in reading.codes[[0, -1]])
        while name in self.floats and self.floats[name].input[0] in self.floats:  # a Relu or Clip: one of codes
            ends = [self.real(end) if end else None for end in self.floats[name].input[1:]] + [None, None]
            lowest, highest = ends[:2] if self.floats[name].op_type == "Clip" else (0.0, None)
            low = low if lowest is None else max(low, int(reading.of(lowest)))
            high = high if highest is None else max(min(high, int(reading.of(highest))), low)
            name = self.floats[name].input[0]
        self.codes[target], out = (target, kind), Target(reading, low, high, self.fixed)
        if name in self.tensors and self.tensors[name][1] == reading:
            self.codes[target] = self.tensors[name][0], kind
        elif name in self.floats:
            node = self.node = self.floats[name]
            number = node.op_type in _CURVES and any(part in self.reals for part in node.input)
            make = self.operators.MAKERS.get(node.op_type) if not number else None
            self._step((make or self.operators.curve)(self, node, out), [target])
        elif name in self.tensors:
            source, old = self.tensors[name]
            self._step((self.operators.look_up, [source], reading.of(old.reals)), [target])
        elif name in self.inputs:
            self._step((functools.partial(self.operators.quantize, out), [name], None), [target])
        else:
            raise ValueError(f"it reads {name!r}, which is neither an input nor computed from codes")

    def _zero(self, node: onnx.NodeProto, kind: Any) -> np.ndarray:
        return self.reals[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1, kind)

    def _reading(self, node: onnx.NodeProto, kind: np.dtype) -> Reading:
        scale, zero = self.reals[node.input[1]], self._zero(node, kind)
        if scale.size != 1 or scale.dtype != np.float32 or kind not in ("int8", "uint8", "int16", "uint16"):
            raise ValueError("what is computed has one scale, of float32, and codes of 8 or 16 bits")
        return Reading(np.float32(scale.item()), int(zero.item()) - shift_of(kind), kind)

    def _constant(self, node: onnx.NodeProto) -> tuple[np.ndarray, Reading]:
        """Constants as codes; LPBQ's scales, made by another DequantizeLinear, are multiplied into them."""
        codes, axis, block = self.reals[node.input[0]], attribute(node, "axis", 1), attribute(node, "block_size", 0)
        kind, scale = codes.dtype, node.input[1]

        def spread(part: np.ndarray) -> np.ndarray:
            if part.size > 1 and block:
                return np.repeat(part, block, axis).take(range(codes.shape[axis]), axis)
            return part.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])

        zero = spread(self._zero(node, kind)).astype(np.int64) - shift_of(kind)
        codes = codes.astype(np.int64) - shift_of(kind)
        if scale not in self.weights:
            return codes, Reading(spread(self.reals[scale]), zero, kind)
        blocks, channels = self.weights[scale]
        scale = spread(np.broadcast_to(channels.scale, blocks.shape))
        return (codes - zero) * spread(blocks - channels.zero), Reading(scale, 0 * zero, kind)

    def real(self, name: str) -> np.ndarray:
        """The values of a constant."""
        if name in self.reals:
            return np.asarray(self.reals[name], np.float64)
        codes, reading = self.weights[name]
        return (codes - reading.zero) * reading.scale.astype(np.float64)

    def operands(self, node: onnx.NodeProto) -> tuple[list[str], list[Reading]]:
        """The sources of an operator's inputs, and how they read."""
        for name in node.input:
            if name not in self.tensors:
                raise ValueError(f"it reads {name!r}, which has no codes, or more scales than one")
        return tuple(map(list, zip(*(self.tensors[name] for name in node.input))))


def shift_of(kind: np.dtype) -> int:
    """How far codes of a type lie above those in memory, which are signed."""
    return {"uint4": 8, "uint8": 128, "uint16": 32768}.get(kind.name, 0)


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    value = next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)
    return value.decode() if isinstance(value, bytes) else value


def reference(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(node).run(None, dict(feeds))
