"""Networks written as ONNX straight from the tensors of a checkpoint, BatchNorm unfolded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET, IR_VERSION = 21, 10  # the first with 16-bit and 4-bit codes and blocked scales


class Chain:
    """A network under construction: every node reads what the node before it wrote.

    A node is called after its module in the checkpoint, its output like the node, and a parameter like its tensor in
    the checkpoint (``b1.dw`` reads ``b1.dw.weight``), so that names mean the same in torch and in ONNX.

    Parameters
    ----------
    weights : mapping of str to ndarray
        The checkpoint, float32; only what the nodes name is written.
    source : str
        Name of the network's input.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], source: str) -> None:
        self.weights, self.source, self.end = weights, source, source
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}

    def node(self, op: str, name: str, *inputs: str, output: str | None = None, **attributes: Any) -> None:
        """Append a node that reads the end of the chain, then `inputs`; its output becomes the end."""
        reads = [self.end, *inputs]
        self.end = output or name
        self._nodes.append(helper.make_node(op, reads, [self.end], name=name, **attributes))

    def conv(self, name: str, pads: tuple[int, int, int, int], *, stride: int = 1, groups: int = 1) -> None:
        """Append a convolution without bias; `pads` are rows and columns before, then rows and columns after."""
        kernel = self.weights[f"{name}.weight"].shape[2:]
        strides = [stride, stride]
        weight = self._tensor(f"{name}.weight")
        self.node("Conv", name, weight, kernel_shape=kernel, strides=strides, pads=pads, group=groups)

    def batch_norm(self, name: str, epsilon: float) -> None:
        """Append a BatchNorm as it is at inference."""
        parameters = [self._tensor(f"{name}.{one}") for one in ("weight", "bias", "running_mean", "running_var")]
        self.node("BatchNormalization", name, *parameters, epsilon=epsilon)

    def relu6(self, name: str) -> None:
        """Append a Clip to 0..6; all of them share their two limits."""
        self._constants |= {"relu6.min": np.float32(0), "relu6.max": np.float32(6)}
        self.node("Clip", name, "relu6.min", "relu6.max")

    def classifier(self, name: str, output: str) -> None:
        """Append the mean over rows and columns and a linear layer that writes `output`."""
        self.node("GlobalAveragePool", "pool")
        self.node("Flatten", "flatten")
        parameters = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        self.node("Gemm", name, *parameters, output=output, transB=1)

    def model(self, name: str, input_shape: tuple[int, ...], outputs: int) -> onnx.ModelProto:
        """The finished network, checked, with all shapes; input (N, *input_shape), output (N, outputs), N free."""
        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info(self.source, TensorProto.FLOAT, ["N", *input_shape])],
            [helper.make_tensor_value_info(self.end, TensorProto.FLOAT, ["N", outputs])],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in self._constants.items()],
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="qtools")
        onnx.checker.check_model(model)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)

    def _tensor(self, key: str) -> str:
        self._constants[key] = self.weights[key]
        return key
