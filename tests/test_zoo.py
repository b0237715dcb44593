"""The bundled network and data are what they are said to be."""

import hashlib

import numpy as np
import onnxruntime as ort

from qtools import zoo


def test_the_digit_network_reads_535_of_540():
    train, train_labels, test, labels = zoo.digits()
    assert train.shape == (1257, 1, 8, 8) and test.shape == (540, 1, 8, 8) and train.dtype == np.float32
    assert len(train_labels) == 1257 and test.min() == 0 and test.max() == 1
    session = ort.InferenceSession(zoo.digits_cnn().SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": test})[0]
    assert (logits.argmax(1) == labels).sum() == 535


def test_the_digit_network_is_the_file_that_the_readme_names():
    digest = hashlib.sha256((zoo._DATA / "digits_cnn.onnx").read_bytes()).hexdigest()
    readme = (zoo._DATA / "README.md").read_text()
    assert f"{digest[:8]}…{digest[-7:]}" in readme
