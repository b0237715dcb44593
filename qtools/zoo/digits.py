"""Handwritten digits, and the two small networks that are bundled for them."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx
    import torch

DATA = Path(__file__).resolve().parents[2] / "data"
_VARIANTS = ("mini", "skew")
_BLOCKS = (("b1", 32, 64, 1), ("b2", 64, 128, 2), ("b3", 128, 128, 1))  # name, channels in and out, stride
_EPSILON = 1e-5  # of every BatchNorm


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels in 0..1, split once and for all.

    Returns
    -------
    train_images, train_labels, test_images, test_labels
        Images are float32 of shape (n, 1, 8, 8), labels int64 of shape (n,); 1,257 train, 540 test.

    References
    ----------
    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images / 16).astype(np.float32)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1257], order[1257:]
    return images[train], bunch.target[train], images[test], bunch.target[test]


def digits_module(variant: str = "mini", *, trained: bool = True) -> torch.nn.Module:
    """A MobileNet-style network for `digits` as a torch module in eval mode; 535 of the 540 test digits right.

    A convolution 1 to 32 and three depthwise-separable blocks 32 to 64, 64 to 128 (stride 2), 128 to 128, each
    convolution followed by BatchNorm and an activation; mean over the picture; a linear layer.  31,370 parameters.

    Parameters
    ----------
    variant : {'mini', 'skew'}
        'mini' has ReLU6.  'skew' is the same network with ReLU instead and its channels rescaled by up to 8 either
        way, which the next layer undoes: nearly the same logits from weights that are hard to quantize.
    trained : bool
        Whether to load the bundled weights; otherwise they are torch's own, drawn anew.

    Returns
    -------
    torch.nn.Module
        Maps images (N, 1, 8, 8) to logits (N, 10).

    Raises
    ------
    ValueError
        If there is no such variant.
    """
    import torch
    from torch import nn

    _check(variant)
    act = nn.ReLU6 if variant == "mini" else nn.ReLU
    stem = [("stem", nn.Conv2d(1, 32, 3, padding=1, bias=False)), ("bn", nn.BatchNorm2d(32, _EPSILON)), ("act", act())]
    blocks = [(name, _block(c_in, c_out, stride, act)) for name, c_in, c_out, stride in _BLOCKS]
    head = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(128, 10))]
    network = nn.Sequential(OrderedDict([*stem, *blocks, *head]))
    if trained:
        network.load_state_dict({key: torch.from_numpy(value) for key, value in _weights(variant).items()})
    return network.eval()


def digits_cnn(variant: str = "mini") -> onnx.ModelProto:
    """The network of `digits_module` in ONNX: Conv, BatchNormalization and Clip or Relu nodes, nothing folded.

    Parameters
    ----------
    variant : {'mini', 'skew'}
        As for `digits_module`.

    Returns
    -------
    onnx.ModelProto
        Input ``input`` (N, 1, 8, 8), output ``output`` (N, 10); nodes and initializers have torch's names
        (``b1.dw``, ``b1.dw.weight``).

    Raises
    ------
    ValueError
        If there is no such variant.
    """
    from qtools.zoo._onnx import Chain

    _check(variant)
    chain = Chain(_weights(variant), "input")

    def layer(conv: str, norm: str, act: str, **options: int) -> None:
        padding = chain.weights[f"{conv}.weight"].shape[-1] // 2
        chain.conv(conv, (padding,) * 4, **options)
        chain.batch_norm(norm, _EPSILON)
        chain.relu6(act) if variant == "mini" else chain.node("Relu", act)

    layer("stem", "bn", "act")
    for name, channels, _, stride in _BLOCKS:
        layer(f"{name}.dw", f"{name}.bn1", f"{name}.act1", stride=stride, groups=channels)
        layer(f"{name}.pw", f"{name}.bn2", f"{name}.act2")
    chain.classifier("fc", "output")
    return chain.model(f"digits_{variant}", (1, 8, 8), 10)


def _block(c_in: int, c_out: int, stride: int, act: type[torch.nn.Module]) -> torch.nn.Module:
    from torch import nn

    return nn.Sequential(
        OrderedDict(
            dw=nn.Conv2d(c_in, c_in, 3, stride, padding=1, groups=c_in, bias=False),
            bn1=nn.BatchNorm2d(c_in, _EPSILON),
            act1=act(),
            pw=nn.Conv2d(c_in, c_out, 1, bias=False),
            bn2=nn.BatchNorm2d(c_out, _EPSILON),
            act2=act(),
        )
    )


def _weights(variant: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(DATA / f"digits_{variant}.safetensors")


def _check(variant: str) -> None:
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be 'mini' or 'skew', got {variant!r}")
