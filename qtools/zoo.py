"""Real networks and labelled data that need no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

_DATA = Path(__file__).resolve().parents[1] / "data"


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


def digits_cnn() -> onnx.ModelProto:
    """A trained MobileNet-style network for `digits`: input ``input`` (n, 1, 8, 8), output ``output`` (n, 10).

    One convolution and three depthwise-separable blocks with ReLU6, BatchNorm folded, then a linear layer; 31,370
    parameters before folding; 535 of the 540 test digits right.  See data/README.md for how it was trained.
    """
    import onnx

    return onnx.load(_DATA / "digits_cnn.onnx")
