"""A network cut into pieces that run one after another, so that a change costs only what stands behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qtools.ptq.fuse import View, names_inside, with_shapes
from qtools.ptq.graph import copy_of

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

State = dict[str, np.ndarray]
"""The tensors that the rest of a network still needs, and the cut that was just reached."""


class Stages:
    """The pieces of a network between some of its tensors, run by ONNX Runtime with its optimizations off.

    Piece ``i`` computes ``cuts[i]`` and all that leads to it beyond the earlier cuts; the last one, ``len(cuts)``, the
    outputs.

    Parameters
    ----------
    network : ModelProto
        Prepared, float or with QuantizeLinear and DequantizeLinear nodes.
    cuts : sequence of str
        Names of computed tensors, in an order in which the network can compute them.
    fed : collection of str
        Initializers that are not part of the pieces but given at every run, as tensors of the state: weights on trial.
    threads : int
        Of each session; 0 lets ONNX Runtime choose.

    Raises
    ------
    ValueError
        If a cut is no computed tensor, or is needed before the one ahead of it.
    """

    def __init__(
        self, network: onnx.ModelProto, cuts: Sequence[str], fed: Collection[str] = (), threads: int = 0
    ) -> None:
        self._network, self._threads = with_shapes(copy_of(network)), threads
        self.cuts, self.fed = tuple(cuts), frozenset(fed)
        view = View(self._network)
        if unknown := [cut for cut in cuts if cut not in view.makers]:
            raise ValueError(f"the network computes no tensor {unknown[0]!r}")
        self._pieces = self._assigned(view)
        self._constants = {name: tensor for name, tensor in view.constants.items() if name not in self.fed}
        self._entries = {
            entry.name: entry
            for entry in (*self._network.graph.value_info, *self._network.graph.input, *self._network.graph.output)
        }
        self._tensors = {name: view.constants[name] for name in self.fed if name in view.constants}
        self._sessions: dict[tuple[int, int], tuple[ort.InferenceSession, list[str], list[str]]] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def sizes(self) -> list[int]:
        """How many operators each piece has."""
        return [len(nodes) for nodes in self._pieces]

    def _assigned(self, view: View) -> list[list[onnx.NodeProto]]:
        index = {id(node): number for number, node in enumerate(view.nodes)}
        left, pieces = set(index.values()), []
        for cut in self.cuts:
            wanted, waiting = set(), [cut]
            while waiting:
                node = view.makers.get(waiting.pop())
                if node is not None and (number := index[id(node)]) in left and number not in wanted:
                    wanted.add(number)
                    waiting += _read(node)
            if not wanted:
                raise ValueError(f"the cut {cut!r} is computed on the way to an earlier one")
            left -= wanted
            pieces.append([view.nodes[number] for number in sorted(wanted)])
        return [*pieces, [view.nodes[number] for number in sorted(left)]]

    def needed(self, piece: int) -> set[str]:
        """The tensors that `piece` and those behind it read, and the outputs of the network: all a state must hold."""
        names = {output.name for output in self._network.graph.output}
        made: set[str] = set()
        for nodes in self._pieces[piece:]:
            for node in nodes:
                names |= {name for name in _read(node) if name and name not in self._constants}
                made |= set(node.output)
        return names - made

    def run(self, piece: int, state: Mapping[str, np.ndarray], to: int | None = None) -> State:
        """Run the pieces from `piece` up to, and not with, `to` (by default one piece) in one session.

        Parameters
        ----------
        piece : int
        state : mapping of str to ndarray
            At the beginning the network's inputs; later what `run` gave, and what is `fed`.
        to : int, optional
            ``len(stages)`` for all that is left.
        """
        to = piece + 1 if to is None else to
        session, given, found = self.session(piece, to)
        results = session.run(found, {name: state[name] for name in given})
        keep = {name: state[name] for name in self.needed(to) if name in state}
        return {**keep, **dict(zip(found, results))}

    def session(self, piece: int, to: int) -> tuple[ort.InferenceSession, list[str], list[str]]:
        """The session of some pieces, with the names that it takes and gives; made once."""
        if (piece, to) not in self._sessions:
            import onnxruntime as ort

            model, given, found = self.model(piece, to)
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.log_severity_level, options.intra_op_num_threads = 4, self._threads
            content = model.SerializeToString()
            session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self._sessions[piece, to] = session, given, found
        return self._sessions[piece, to]

    def model(self, piece: int, to: int) -> tuple[onnx.ModelProto, list[str], list[str]]:
        """Some pieces as a network of their own, with the names of its inputs and outputs."""
        from onnx import helper

        nodes = [node for part in self._pieces[piece:to] for node in part]
        made = {name for node in nodes for name in node.output if name}
        read = dict.fromkeys(name for node in nodes for name in _read(node) if name)
        given = [name for name in read if name not in made and name not in self._constants]
        wanted = self.needed(to) | set(self.cuts[piece:to])
        found = [name for node in nodes for name in node.output if name in wanted]
        graph = helper.make_graph(
            nodes,
            f"pieces {piece} to {to}",
            [self._entry(name) for name in given],
            [self._entries.get(name) or helper.make_empty_tensor_value_info(name) for name in found],
            [self._constants[name] for name in read if name in self._constants],
        )
        opsets, version = self._network.opset_import, self._network.ir_version
        return helper.make_model(graph, opset_imports=opsets, ir_version=version), given, found

    def _entry(self, name: str) -> onnx.ValueInfoProto:
        from onnx import helper

        if name in self._tensors:
            return helper.make_tensor_value_info(name, self._tensors[name].data_type, self._tensors[name].dims)
        return self._entries[name]


def _read(node: onnx.NodeProto) -> list[str]:
    return [*node.input, *names_inside(node)]
