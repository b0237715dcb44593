"""Well-known networks as ONNX with weights of zero: only their shapes matter, to count and to time them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

    from qtools.zoo._onnx import Chain

_EPSILON = 1e-5


class _Zeros(dict[str, np.ndarray]):
    """Parameters by name, filled while a network is built; `convolution` also makes those of the norm after it."""

    def convolution(self, name: str, norm: str, shape: tuple[int, ...]) -> None:
        self[f"{name}.weight"] = np.zeros(shape, np.float32)
        for part in ("weight", "bias", "running_mean"):
            self[f"{norm}.{part}"] = np.zeros(shape[0], np.float32)
        self[f"{norm}.running_var"] = np.ones(shape[0], np.float32)


def mobilenet_v2(size: int = 224) -> onnx.ModelProto:
    """MobileNetV2 1.0 without its weights: input ``x`` (N, 3, size, size), output ``logits`` (N, 1000).

    References
    ----------
    M. Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, arXiv 1801.04381, Table 2.
    """
    from qtools.zoo._onnx import Chain

    chain = Chain(_Zeros(), "x")
    width = _conv(chain, "stem", 3, 32, 3, stride=2)
    for factor, channels, count, first in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for number in range(count):
            name, source, wide = f"block{channels}.{number}", chain.end, factor * width
            stride = 1 if number else first
            if factor > 1:
                _conv(chain, f"{name}.expand", width, wide, 1)
            _conv(chain, f"{name}.depthwise", wide, wide, 3, stride=stride, groups=wide)
            _conv(chain, f"{name}.project", wide, channels, 1, act="")
            if number:
                chain.node("Add", f"{name}.add", source)
            width = channels
    return _finished(chain, "mobilenet_v2", _conv(chain, "head", width, 1280, 1), size)


def resnet50(size: int = 224) -> onnx.ModelProto:
    """ResNet-50, strides in the 3x3 convolutions (as torchvision has it), without its weights; see `mobilenet_v2`.

    References
    ----------
    K. He et al., Deep Residual Learning for Image Recognition, arXiv 1512.03385, Table 1.
    """
    from qtools.zoo._onnx import Chain

    chain = Chain(_Zeros(), "x")
    width = _conv(chain, "stem", 3, 64, 7, stride=2, act="Relu")
    chain.node("MaxPool", "pool1", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for stage, (channels, count) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for number in range(count):
            name, source, stride = f"layer{stage + 1}.{number}", chain.end, 2 if stage and not number else 1
            _conv(chain, f"{name}.1", width, channels, 1, act="Relu")
            _conv(chain, f"{name}.2", channels, channels, 3, stride=stride, act="Relu")
            _conv(chain, f"{name}.3", channels, 4 * channels, 1, act="")
            end = chain.end
            if not number:
                chain.end = source
                _conv(chain, f"{name}.shortcut", width, 4 * channels, 1, stride=stride, act="")
                source = chain.end
            chain.end, width = end, 4 * channels
            chain.node("Add", f"{name}.add", source)
            chain.node("Relu", f"{name}.relu")
    return _finished(chain, "resnet50", width, size)


def _conv(
    chain: Chain, name: str, depth: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, act: str = "Clip"
) -> int:
    """Append a convolution with its BatchNorm and activation; the number of its channels."""
    chain.weights.convolution(name, f"{name}.bn", (channels, depth // groups, kernel, kernel))
    chain.conv(name, (kernel // 2,) * 4, stride=stride, groups=groups)
    chain.batch_norm(f"{name}.bn", _EPSILON)
    if act:
        chain.relu6(f"{name}.act") if act == "Clip" else chain.node(act, f"{name}.act")
    return channels


def _finished(chain: Chain, name: str, width: int, size: int) -> onnx.ModelProto:
    chain.weights |= {"fc.weight": np.zeros((1000, width), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    chain.classifier("fc", "logits")
    return chain.model(name, (3, size, size), 1000)
