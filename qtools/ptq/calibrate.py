"""Calibration: samples go through a float network once, and every tensor's range can then be chosen in many ways.

Every range is, bit for bit, what the observer of that name chooses after the same tensors (see `observers.Tally`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qtools.affine import Grid, QParams
from qtools.observers import OBSERVERS, Observer, PercentileObserver, Tally, described
from qtools.ptq.graph import copy_of
from qtools.ptq.write import quantized_tensors

if TYPE_CHECKING:
    import onnx

_FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)")


def calibrate(
    model: onnx.ModelProto,
    samples: Iterable[Mapping[str, np.ndarray] | np.ndarray],
    tensors: Sequence[str] | None = None,
    *,
    methods: Sequence[str] = tuple(OBSERVERS),
    percentile: float = 99.99,
    progress: bool = False,
    threads: int | None = None,
) -> Calibration:
    """Run samples through a float network, and watch the ranges of its tensors.

    The network runs as it is written (ONNX Runtime on the CPU, nothing optimized away), one sample after the other; no
    activation outlives its sample, and what is kept does not grow with the number of samples.

    Parameters
    ----------
    model : ModelProto
    samples : iterable
        Of mappings from the name of every input to an array; of arrays, where there is one input.  Shapes may differ
        along dynamic axes.  Floats are brought to the precision of the input.
    tensors : sequence of str, optional
        By default those that `write.quantized_tensors` wants encodings for.  A sample in which a tensor is empty
        does not count for it.
    methods : sequence of str
        Of `observers.OBSERVERS`: the ways in which ranges may be chosen later.
    percentile : float
        Default of the method 'percentile'; any other can be asked for later.
    progress : bool
        Show a bar on stderr.
    threads : int, optional
        By default one for each core that this process may use.

    Raises
    ------
    ValueError
        If the network, a tensor, a method or a sample does not fit, if an activation is NaN or infinite, or if there
        is no sample, or none in which some tensor holds a number.
    """
    from tqdm import tqdm

    PercentileObserver(percentile)  # complains if it is none
    unknown = [method for method in methods if method not in OBSERVERS]
    if unknown or not methods:
        raise ValueError(f"methods must be some of {tuple(OBSERVERS)}, got {unknown[0] if unknown else methods!r}")
    threads = _cores() if threads is None else threads
    network = Network(model, tensors, threads)
    tallies = {name: Tally(methods) for name in network.tensors}
    count = 0
    with ThreadPoolExecutor(threads, "calibrate") as pool:
        shown = tqdm(samples, "calibrating", unit=" samples", file=sys.stderr, disable=not progress)
        for sample in shown:
            _observe(pool, threads, tallies, network.run(count, sample), count)
            count += 1
    empty = [name for name, tally in tallies.items() if tally.dtype is None]
    if empty:
        why = f"the tensor {empty[0]!r} was empty in every sample: leave it out of tensors"
        raise ValueError(why if count else "there are no samples to calibrate with")
    return Calibration(fingerprint(model), tuple(methods), percentile, count, tallies)


class Calibration:
    """What `calibrate` saw; made by it, or by `load`.

    Attributes
    ----------
    samples : int
        How many there were.
    tensors, methods : tuple of str
    percentile : float
    fingerprint : str
        Of the network, see `fingerprint`.
    """

    def __init__(
        self, fingerprint: str, methods: tuple[str, ...], percentile: float, samples: int, tallies: dict[str, Tally]
    ) -> None:
        self.fingerprint, self.methods, self.percentile, self.samples = fingerprint, methods, percentile, samples
        self.tensors, self._tallies = tuple(tallies), tallies

    def observer(self, name: str, method: str = "min_max", **settings: Any) -> Observer:
        """The observer of a tensor, as if it had been updated with every sample.

        Parameters
        ----------
        name : str
        method : str
            One of `methods`.
        settings
            Of the observer (see `qtools.observers`): what changes nothing in what it keeps of its data, such as
            ``percentile``, ``tails``, ``p``, ``gamma``, ``levels``, or fewer ``bins`` for 'mse' and 'percentile'.

        Raises
        ------
        ValueError
            If the tensor or the method was not calibrated, or a setting would have had to be known then.
        """
        if name not in self._tallies:
            raise ValueError(f"the tensor {name!r} was not calibrated")
        if method not in self.methods:
            raise ValueError(f"the method {method!r} was not calibrated, only {', '.join(self.methods)}")
        defaults = {"percentile": self.percentile} if method == "percentile" else {}
        return self._tallies[name].lend(OBSERVERS[method](**defaults | settings))

    def range(
        self, name: str, method: str = "min_max", grid: Grid | None = None, **settings: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Both ends of the range that `grid` (by default 8 bits) should cover, as `Observer.range` gives them."""
        return self.observer(name, method, **settings).range(grid or Grid())

    def qparams(self, name: str, grid: Grid, method: str = "min_max", **options: Any) -> QParams:
        """Scale and zero point of a tensor on a grid (per tensor).

        `options` are ``symmetric_scale`` and ``eps`` as in `Observer.qparams`, all others as in `observer`.
        """
        rounding = {key: options.pop(key) for key in ("symmetric_scale", "eps") if key in options}
        return self.observer(name, method, **options).qparams(grid, **rounding)

    def save(self, path: Path | str) -> None:
        """Write an ``.npz`` file, all or nothing, from which `load` makes the same calibration again."""
        from qtools._files import replace_file

        kept = [tally.arrays() for tally in self._tallies.values()]
        arrays = {key: np.stack([entry[key] for entry in kept]) for key in kept[0]}
        arrays["double"] = np.array([tally.dtype == np.float64 for tally in self._tallies.values()])
        meta = {"model": self.fingerprint, "percentile": self.percentile, "samples": self.samples}
        meta |= {"methods": _described(self.methods), "tensors": self.tensors}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, qtools_calibration=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
        replace_file(Path(path), buffer.getvalue())

    @classmethod
    def load(
        cls, path: Path | str, model: onnx.ModelProto | None = None, *, methods: Sequence[str] = ()
    ) -> Calibration:
        """Read what `save` wrote.

        Parameters
        ----------
        path : path
        model : ModelProto, optional
            The network that it must have been made with.
        methods : sequence of str
            Those that it must offer.

        Raises
        ------
        FileNotFoundError
        ValueError
            If it is damaged or no such file, or made with another network, other methods or other observers.
        """
        content = Path(path).read_bytes()
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            meta, double = json.loads(arrays.pop("qtools_calibration").tobytes()), arrays.pop("double")
            made_with, kept = meta["model"], meta["methods"]
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration, or damaged ({type(error).__name__})") from None
        if model is not None and fingerprint(model) != made_with:
            raise ValueError(f"{path} was made with another network: calibrate this one")
        if missing := set(methods) - set(kept):
            raise ValueError(f"{path} has no method {sorted(missing)[0]!r}, only {', '.join(kept)}")
        if kept != _described(kept):
            raise ValueError(f"{path} was made by another version of the observers: calibrate again")
        tallies = {}
        for i, name in enumerate(meta["tensors"]):
            dtype = np.float64 if double[i] else np.float32
            tallies[name] = Tally(kept).restore(dtype, {key: values[i] for key, values in arrays.items()})
        return cls(made_with, tuple(kept), meta["percentile"], meta["samples"], tallies)


def fingerprint(model: onnx.ModelProto) -> str:
    """SHA-256 of the serialized graph, in hexadecimal."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


# -- running the network ---------------------------------------------------------------------------------------------


class Network:
    """A float network as an ONNX Runtime session that gives out the wanted tensors."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str] | None, threads: int) -> None:
        from onnx import helper

        constants = {tensor.name for tensor in model.graph.initializer}
        self.inputs = {entry.name: _expected(entry) for entry in model.graph.input if entry.name not in constants}
        wanted = quantized_tensors(model).activations.values() if tensors is None else tensors
        self.tensors = tuple(dict.fromkeys(wanted))
        made = {name for node in model.graph.node for name in node.output}
        unknown = [name for name in self.tensors if name not in made | set(self.inputs)]
        if unknown or not self.tensors:
            raise ValueError(f"the network computes no tensor {unknown[0]!r}" if unknown else "no tensor to calibrate")
        self._made = [name for name in self.tensors if name in made]
        model, have = copy_of(model), {output.name for output in model.graph.output}
        model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in self._made if name not in have)
        self._session = _or_sentence("ONNX Runtime cannot load the network", lambda: _session(model, threads))
        types = {one.name: one.type for one in (*self._session.get_outputs(), *self._session.get_inputs())}
        for name in self.tensors:
            if types[name] not in _FLOATS:
                raise ValueError(f"the tensor {name!r} is a {types[name]}: only floats have a range")

    def run(self, number: int, sample: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, np.ndarray]:
        """The wanted tensors of a sample."""
        if isinstance(sample, np.ndarray) and len(self.inputs) == 1:
            sample = dict.fromkeys(self.inputs, sample)
        if not isinstance(sample, Mapping) or set(sample) != set(self.inputs):
            got = ", ".join(map(repr, sample)) if isinstance(sample, Mapping) else type(sample).__name__
            raise ValueError(f"sample {number}: expected an array for {', '.join(map(repr, self.inputs))}, got {got}")
        feeds = {name: _fitting(number, name, sample[name], *self.inputs[name]) for name in self.inputs}
        what = f"sample {number}: ONNX Runtime cannot run the network"
        # Asked for nothing, ONNX Runtime gives everything.
        values = _or_sentence(what, lambda: self._session.run(self._made, feeds)) if self._made else []
        found = feeds | dict(zip(self._made, values, strict=True))
        return {name: found[name] for name in self.tensors}


def _session(model: onnx.ModelProto, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    # The tensors are those of the network as written, whichever of them are asked for.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # Its idle threads would hold the cores that count.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _or_sentence(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # ONNX Runtime's exceptions have no base class of their own
        raise ValueError(f"{what}: {str(error).strip().splitlines()[0]}") from None


def _expected(entry: onnx.ValueInfoProto) -> tuple[np.dtype, list[int | None] | None]:
    """Dtype and shape of an input; None for a dynamic axis, and for a shape of any rank."""
    from onnx import helper

    kind = entry.type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim] if kind.HasField("shape") else None
    return helper.tensor_dtype_to_np_dtype(kind.elem_type), dims


def _fitting(number: int, name: str, x: Any, dtype: np.dtype, dims: list[int | None] | None) -> np.ndarray:
    """An array as the network takes it."""
    is_array = isinstance(x, np.ndarray)
    right_kind = is_array and (x.dtype == dtype or x.dtype.kind == dtype.kind == "f")
    if right_kind and (dims is None or (len(dims) == x.ndim and all(d in (None, n) for d, n in zip(dims, x.shape)))):
        with np.errstate(over="ignore"):  # what becomes infinite is found where ranges are taken
            return np.asarray(x, dtype, order="C")
    shape = "" if dims is None else f" of shape ({', '.join('?' if d is None else str(d) for d in dims)})"
    got = f"{x.dtype} of shape {x.shape}" if is_array else type(x).__name__
    raise ValueError(f"sample {number}: the input {name!r} takes {dtype}{shape}, got {got}")


def _observe(
    pool: ThreadPoolExecutor, threads: int, tallies: dict[str, Tally], values: dict[str, np.ndarray], number: int
) -> None:
    """Hand every tensor to its tally, on all threads."""
    waiting = iter(tallies)  # shared: every thread takes the next tensor there is

    def work(_: int) -> list[str]:
        return [name for name in waiting if not tallies[name].take(values[name])]

    bad = {name for names in pool.map(work, range(threads)) for name in names}
    if bad:
        first = next(name for name in tallies if name in bad)
        raise ValueError(f"sample {number}: the tensor {first!r} holds NaN or infinity")


def _described(methods: Iterable[str]) -> dict[str, Any]:
    return {method: described(OBSERVERS[method]()) if method in OBSERVERS else None for method in methods}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
