"""``qtools convert``: every argument does what it says, files come all or not at all, errors are one sentence."""

import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qtools import _signals, cli, encodings, observers, zoo
from qtools.affine import LPBQ, Grid, quantize
from qtools.encodings import Encoding, Encodings, Rule
from qtools.npu import capabilities, htp
from qtools.ptq import convert, graph
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options
from qtools.ptq.inputs import read_input_list

ROOT = Path(__file__).resolve().parents[1]
needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")
WEIGHTS = ["stem.weight", *(f"b{i}.{kind}.weight" for i in (1, 2, 3) for kind in ("dw", "pw"))]


def lay_out(folder: Path, model: onnx.ModelProto, samples: np.ndarray) -> None:
    """What the article's command expects to find."""
    (folder / "calibration").mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    for index, sample in enumerate(samples):
        sample[None].astype("<f4").tofile(folder / f"calibration/{index}.raw")
    text = "".join(f"{index}.raw\n" for index in range(len(samples)))
    (folder / "calibration/input_list.txt").write_text(text)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits network and eight samples, which tests only read."""
    folder = tmp_path_factory.mktemp("digits")
    lay_out(folder, zoo.digits_cnn(), zoo.digits()[0][:8])
    return folder


@pytest.fixture
def here(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an empty one where the digits network lies as ``model.onnx``."""
    for name in ("model.onnx", "calibration"):
        (tmp_path / name).symlink_to(digits / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGS = ["--input_network", "model.onnx", "--output_path", "out/qnn.cpp", "--input_dim", "input", "1,1,8,8"]
ARGS += ["--input_list", "calibration/input_list.txt"]


def run(*more: str, args: list[str] = ARGS) -> int:
    try:
        return cli.main(["convert", *args, *more])
    except SystemExit as stop:
        return stop.code


def works(capsys, *more: str, args: list[str] = ARGS) -> tuple[Encodings, onnx.ModelProto, str]:
    """What the command writes, and what it says."""
    assert run(*more, args=args) == 0, capsys.readouterr().err
    said = capsys.readouterr()
    assert said.err == ""
    stem = Path(args[args.index("--output_path") + 1]).with_suffix("")
    return encodings.read(f"{stem}.encodings"), onnx.load(f"{stem}.onnx"), said.out


def fails(capsys, *more: str, args: list[str] = ARGS, status: int = 1) -> str:
    """The one sentence with which the command fails."""
    assert run(*more, args=args) == status
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert lines[-1].startswith(("qtools convert: ", "qtools convert: error: ")) and "Traceback" not in said.err
    assert status == 2 or len(lines) == 1
    return lines[-1]


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def prepared(folder: Path) -> onnx.ModelProto:
    return convert.prepared(folder / "model.onnx", {"input": (1, 1, 8, 8)})


def samples_of(folder: Path) -> list[dict[str, np.ndarray]]:
    return [*read_input_list(folder / "calibration/input_list.txt", prepared(folder))]


# -- the article's command -------------------------------------------------------------------------------------------


def test_the_articles_command_works_on_a_real_network(tmp_path: Path, capsys, monkeypatch) -> None:
    model = zoo.efficientnet_lite0()
    model.graph.input[0].name = "input"
    for node in model.graph.node:
        node.input[:] = ["input" if name == "x" else name for name in node.input]
    pictures = np.concatenate(
        [zoo.photo_input(np.tile(np.arange(256, dtype=np.uint8), (256, 1)).T >> i) for i in (0, 1)]
    )
    lay_out(tmp_path, model, pictures)
    monkeypatch.chdir(tmp_path)
    command = """convert --input_network model.onnx --output_path model_qnn.cpp --input_dim input 1,3,224,224
        --input_list calibration/input_list.txt --act_bw 8 --weight_bw 8 --bias_bw 32 --use_per_channel_quantization"""
    assert cli.main(command.split()) == 0
    said = capsys.readouterr()
    assert said.err == "" and "note:" not in said.out
    assert sorted(os.listdir()) == ["calibration", "model.onnx", "model_qnn.encodings", "model_qnn.onnx"]
    assert said.out.endswith("wrote model_qnn.encodings\nwrote model_qnn.onnx\n")
    assert "model.onnx: 94 operators after fusion" in said.out and "SQNR of the outputs (dB): logits " in said.out
    onnx.checker.check_model(network := onnx.load("model_qnn.onnx"), full_check=True)
    found = encodings.read("model_qnn.encodings")
    assert {e.dtype for e in found.activations.values()} == {"uint8"}
    per_channel = {name for name, e in found.params.items() if e.granularity == "channel"}
    assert len(per_channel) == 49 and found.params["fc.weight"].granularity == "tensor"
    (run,) = convert.Runner(network, ["logits"])({"input": pictures[:1]})
    assert run.shape == (1, 1000)


@needs_backend
def test_with_a_chip_there_is_what_its_phone_loads(here: Path, capsys) -> None:
    works(capsys, "--soc", "SM8650", "--use_per_channel_quantization")
    there = ["qnn.dlc", "qnn.encodings", "qnn.onnx", "qnn_net.json", "qnn_sm8650.onnx", "qnn_sm8650_qnn.bin"]
    assert sorted(os.listdir("out")) == there
    assert json.loads(Path("out/qnn_net.json").read_bytes())["graph"]["nodes"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in Path("out").iterdir())
    _, _, said = works(capsys)  # another network, without a chip, over it
    left = "qnn.dlc, qnn_net.json, qnn_sm8650.onnx, qnn_sm8650_qnn.bin"
    assert f"note: of an earlier run, and not of this network: {left}" in said


@needs_backend
def test_a_network_that_the_chip_refuses_is_not_written(here: Path, capsys) -> None:
    said = fails(capsys, "--soc", "sm8350", "--weight_bw", "16")
    assert "the HTP backend (v68) does not take this graph" in said
    assert not Path("out").exists()


def test_without_a_backend_the_chips_files_are_missing_and_it_says_so(here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    _, _, said = works(capsys, "--soc", "sm8650")
    assert "note: no files for the phone: switched off by QTOOLS_HTP=0" in said
    assert sorted(os.listdir("out")) == ["qnn.encodings", "qnn.onnx"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--algorithms", "magic"], "algorithms are cle, hba, bc, seqmse, adaround, gptq; there is no 'magic'"),
        (["--algorithms", "adaround", "gptq"], "adaround and gptq both round the weights: choose one"),
        (["--soc", "sm1"], "--soc must be one of sm8350, "),
        (["--input_dim", "other", "1,1,8,x"], "--input_dim other 1,1,8,x: expected whole numbers with commas"),
        (["--input_dim", "input", "1,1,8,8"], "--input_dim input is given twice"),
        (["--percentile_calibration_value", "0"], "percentile_calibration_value: "),
        (["--quantization_overrides", "none.json"], "none.json: No such file or directory"),
        (["--input_list", "none.txt"], "none.txt: No such file or directory"),
        (["--input_list", "calibration"], "calibration: Is a directory"),
        (["--input_list", "model.onnx"], "model.onnx is not a text file"),
        (["--input_network", "none.onnx"], "no such network: none.onnx"),
        (["--input_network", "calibration"], "no such network: calibration"),
        (["--input_network", "calibration/input_list.txt"], "input_list.txt is not an ONNX network"),
        (["--output_path", "calibration"], "the output calibration is a folder: name a file in it, such as "),
        (["--output_path", "."], "the output . is a folder"),
        (["--output_path", "model.cpp"], "model.onnx would be overwritten, and it is read here: choose another output"),
    ],
)
def test_a_wrong_argument_gets_one_sentence_and_nothing_is_written(here: Path, capsys, more, message: str) -> None:
    assert message in fails(capsys, *more)
    assert sorted(os.listdir()) == ["calibration", "model.onnx"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--act_bw", "4"], "argument --act_bw/--act_bitwidth: invalid choice: 4"),
        (["--weight_bw", "eight"], "invalid int value: 'eight'"),
        (["--act_quantizer_schema", "lopsided"], "invalid choice: 'lopsided'"),
        (["--param_quantizer_calibration", "guess"], "invalid choice: 'guess'"),
        (["--act", "8"], "unrecognized arguments: --act 8"),
    ],
)
def test_a_word_that_is_none_gets_a_usage_and_status_2(here: Path, capsys, more: list[str], message: str) -> None:
    assert run(*more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_samples_or_shape_it_says_what_is_missing(here: Path, capsys) -> None:
    network = ["--input_network", "model.onnx", "-o", "out/qnn.cpp"]
    assert "--input_list is missing: without samples there is nothing" in fails(capsys, args=network)
    bare = [*network, "--input_list", "calibration/input_list.txt"]
    assert "the input 'input' has no fixed shape: give one with --input_dim input 1,3," in fails(capsys, args=bare)
    assert "the network has no input 'x'" in fails(capsys, "-d", "x", "1,1,8,8", args=bare)
    assert "has 4 axes, of positive size; got (1, 8, 8)" in fails(capsys, "-d", "input", "1,8,8", args=bare)
    assert "has a fixed size of 8, got 9" in fails(capsys, "-d", "input", "1,1,8,9", args=bare)
    assert "0.raw has 256 bytes; the input" in fails(capsys, "-d", "input", "2,1,8,8", args=bare)
    works(capsys, "-d", "input", "1x1x8x8", args=[*network[:2], "--output_path", "out/qnn.cpp", *bare[4:]])


def test_only_known_endings_are_replaced(here: Path, capsys) -> None:
    for output, stem in (("a.cpp", "a"), ("b.onnx", "b"), ("c.dlc", "c"), ("net-v1.5", "net-v1.5"), ("plain", "plain")):
        assert run(args=[*ARGS[:2], "-o", output, *ARGS[4:]]) == 0
        assert Path(f"{stem}.onnx").is_file() and Path(f"{stem}.encodings").is_file()
    capsys.readouterr()


# -- every argument --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["--act_bw", "--act_bitwidth"])
@pytest.mark.parametrize("bits", [8, 16])
def test_bits_of_activations(here: Path, capsys, name: str, bits: int) -> None:
    found, model, _ = works(capsys, name, str(bits))
    assert {e.dtype for e in found.activations.values()} == {f"uint{bits}"} and len(found.activations) == 11
    kind = {8: TensorProto.UINT8, 16: TensorProto.UINT16}[bits]
    assert constants(model)["act.zero_point"].data_type == kind


@pytest.mark.parametrize("name", ["--weight_bw", "--weights_bitwidth"])
@pytest.mark.parametrize(
    ("bits", "dtype", "kind"),
    [(4, "int4", TensorProto.INT4), (8, "uint8", TensorProto.UINT8), (16, "int16", TensorProto.INT16)],
)
def test_bits_of_weights(here: Path, capsys, name: str, bits: int, dtype: str, kind: int) -> None:
    found, model, _ = works(capsys, name, str(bits))
    assert {e.dtype for e in found.params.values()} == {dtype} and set(found.params) == {*WEIGHTS, "fc.weight"}
    codes = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert {constants(model)[codes[name]].data_type for name in found.params} == {kind}


def test_biases_are_int32_whatever_is_said(here: Path, capsys) -> None:
    note = "biases are written as int32, at the scale of their accumulator: 8 bits would not hold them"
    for more, noted in (([], True), (["--bias_bw", "8"], True), (["--bias_bitwidth", "32"], False)):
        _, model, said = works(capsys, *more)
        assert (note in said) == noted
        assert constants(model)["fc.bias.codes"].data_type == TensorProto.INT32


ZEROS = ["act.zero_point", "input.zero_point", "output.zero_point"]


def test_schemas_of_activations(here: Path, capsys) -> None:
    for schema, expected in (("asymmetric", None), ("symmetric", {128}), ("unsignedsymmetric", {0, 128})):
        found, model, said = works(capsys, "--act_quantizer_schema", schema)
        zeros = {-int(e.offset) for e in found.activations.values()}
        assert expected is None or zeros == expected
        signed, positive = found.activations["output"], found.activations["act"]
        assert (int(signed.offset) == -128) == (schema != "asymmetric")
        assert (int(positive.offset) == 0) == (schema != "symmetric")
        assert {tensor.data_type for name, tensor in constants(model).items() if name in ZEROS} == {TensorProto.UINT8}
        assert said.count("note: ") == {"asymmetric": 1, "symmetric": 2, "unsignedsymmetric": 2}[schema], said


@pytest.mark.parametrize("schema", ["asymmetric", "symmetric", "unsignedsymmetric"])
def test_schemas_of_weights(here: Path, capsys, schema: str) -> None:
    found, _, _ = works(capsys, "--param_quantizer_schema", schema)
    expected = ("uint8", False) if schema == "asymmetric" else ("int8", True)
    assert {(e.dtype, e.symmetric) for e in found.params.values()} == {expected}


CALIBRATIONS = ["min-max", "sqnr", "entropy", "mse", "percentile"]


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_calibrations_of_activations_are_the_observers_of_that_name(here: Path, capsys, method: str) -> None:
    found, _, said = works(capsys, "--act_quantizer_calibration", method, "--percentile_calibration_value", "99")
    own = method.replace("-", "_")
    calibration = calibrate(prepared(here), samples_of(here), methods=[own], percentile=99)
    for name in ("act", "b2.act2", "output"):
        expected = calibration.qparams(name, Grid(8), own)
        assert np.float32(found.activations[name].scale) == np.float32(expected.scale)
        assert found.activations[name].zero_point == expected.zero_point
    noted = "--percentile_calibration_value changed nothing: no calibration is 'percentile'"
    assert (noted in said) == (method != "percentile")


@pytest.mark.parametrize("method", CALIBRATIONS)
def test_calibrations_of_weights_are_the_observers_of_that_name(here: Path, capsys, method: str) -> None:
    found, _, _ = works(
        capsys, "--param_quantizer_calibration", method, "--percentile_calibration_value", "98", "--weight_bw", "4"
    )
    make = observers.OBSERVERS[method.replace("-", "_")]
    values = numpy_helper.to_array(constants(prepared(here))["fc.weight"])
    observer = make(98) if method == "percentile" else make()
    expected = observer.update(values).qparams(Grid(4, signed=True, symmetric=True))
    assert np.float32(found.params["fc.weight"].scale) == np.float32(expected.scale)


def test_scales_per_channel_and_per_row_go_to_different_operators(here: Path, capsys) -> None:
    def fine(*flags: str) -> set[str]:
        found, _, said = works(capsys, *flags)
        assert "changed nothing" not in said
        return {name for name, e in found.params.items() if e.granularity == "channel"}

    assert fine() == set()
    assert fine("--use_per_channel_quantization") == set(WEIGHTS)
    assert fine("--use_per_row_quantization") == {"fc.weight"}
    assert fine("--use_per_channel_quantization", "--use_per_row_quantization") == {*WEIGHTS, "fc.weight"}


def tiny(op: str = "MatMul", **attributes: int) -> onnx.ModelProto:
    """One operator with weights, ``w``, and its input ``input`` of shape (1, 1, 8, 8)."""
    shape = {"MatMul": (8, 64), "Conv": (4, 1, 3, 3), "ConvTranspose": (1, 4, 3, 3), "Relu": None}[op]
    rng, inputs, constants = np.random.default_rng(1), ["input"], []
    if shape:
        inputs, w = ["input", "w"], rng.standard_normal(shape).astype(np.float32)
        constants = [numpy_helper.from_array(w, "w")]
    node = helper.make_node(op, inputs, ["y"], name="only", **attributes)
    entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, 1, 8, 8))
    shape = {"MatMul": (1, 1, 8, 64), "Conv": (1, 4, 8, 8), "ConvTranspose": (1, 4, 10, 10), "Relu": (1, 1, 8, 8)}[op]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    graph = helper.make_graph([node], "g", [entry], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def other(model: onnx.ModelProto) -> list[str]:
    onnx.save(model, "other.onnx")
    return ["--input_network", "other.onnx", *ARGS[2:]]


def test_a_flag_that_meets_no_operator_says_so(here: Path, capsys) -> None:
    both = ["--use_per_channel_quantization", "--use_per_row_quantization"]
    _, _, said = works(capsys, *both, args=other(tiny("MatMul")))
    assert "note: --use_per_channel_quantization changed nothing: the network has no convolution with c" in said
    assert "use_per_row" not in said and "biases" not in said
    _, _, said = works(capsys, *both, args=other(tiny("ConvTranspose")))
    assert "note: --use_per_row_quantization changed nothing: the network has no MatMul or Gemm with constant" in said
    assert "use_per_channel" not in said
    _, _, said = works(capsys, "--weight_bw", "4", "--pack_4_bit_weights", args=other(tiny("Relu")))
    assert "--weight_bw changed nothing: the network has no constant weights" in said
    assert "--pack_4_bit_weights changed nothing: no weights have 4 bits" in said


def test_what_is_accepted_for_qualcomms_sake_is_kept_with_a_note(here: Path, capsys) -> None:
    more = ["--input_layout", "input", "NCHW", "-l", "y", "NHWC", "--pack_4_bit_weights", "--weight_bw", "4"]
    _, _, said = works(capsys, *more, "--ignore_encodings")
    assert "note: --input_layout input NCHW changed nothing: inputs keep the axes of the ONNX file" in said
    assert "note: --input_layout y NHWC changed nothing: the network has no such input" in said
    assert "note: --pack_4_bit_weights changed nothing: 4-bit codes always lie two to a byte" in said
    assert "note: --ignore_encodings: there are none" in said


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
def test_versions_of_encodings(here: Path, capsys, version: str) -> None:
    found, _, _ = works(capsys, "--encodings_version", version, "--use_per_channel_quantization")
    assert found.version == version and json.loads(Path("out/qnn.encodings").read_bytes())["version"] == version


def test_a_chip_that_is_none_is_told_the_others() -> None:
    with pytest.raises(ValueError, match=r"soc must be one of sm8350, .*, got 'sm1'"):
        convert.convert("model.onnx", "qnn.cpp", "list.txt", soc="SM1")


def test_options_are_checked_and_complete() -> None:
    given = {"act_bw": 7, "weight_bw": 2, "act_quantizer_calibration": "max", "param_quantizer_calibration": ""}
    given |= {"act_quantizer_schema": "sym", "param_quantizer_schema": None, "percentile_calibration_value": 101}
    given |= {"algorithms": ("magic",)}
    for name, wrong in given.items():
        with pytest.raises(ValueError, match=name):
            Options(**{name: wrong})
    flags = {field.name for field in fields(Options)} - set(given)
    assert flags == {"use_per_channel_quantization", "use_per_row_quantization"}


# -- overrides -------------------------------------------------------------------------------------------------------


def overridden(capsys, content: object, *more: str) -> tuple[Encodings, onnx.ModelProto, str]:
    Path("overrides.json").write_text(json.dumps(content))
    return works(capsys, "--quantization_overrides", "overrides.json", *more)


def test_the_articles_overrides(here: Path, capsys) -> None:
    content = {
        "activation_encodings": {"b1.*": {"dtype": "int16"}, "b1.act2": {"dtype": "int8"}, "none": {"dtype": "int8"}},
        "param_encodings": {
            "*.pw.weight": {"dtype": "int4", "is_symmetric": True, "group_size": 32},
            "fc.weight": {"dtype": "int4"},
            "stem.weight": {"dtype": "float16"},
            "fc.bias": {"dtype": "int8"},
        },
    }
    found, model, said = overridden(capsys, content)
    assert found.activations["b1.act1"].dtype == "uint16" and found.activations["b1.act2"].dtype == "uint8"
    assert found.activations["act"].dtype == "uint8"
    assert constants(model)["b1.act1.zero_point"].data_type == TensorProto.UINT16
    assert found.params["fc.weight"].dtype == "int4" and found.params["fc.weight"].granularity == "tensor"
    assert {found.params[f"b{i}.pw.weight"].block_size for i in (1, 2, 3)} == {32}
    assert found.params["b2.dw.weight"].dtype == "uint8"
    assert "stem.weight" not in found.params and constants(model)["stem.weight"].data_type == TensorProto.FLOAT
    assert "8 weights" not in said and "none, so float, for 1: stem.weight" in said
    assert "note: override 'none' matches no activation of the network" in said
    assert "note: override 'fc.bias' changes nothing: a bias is an int32" in said
    assert constants(model)["fc.bias.codes"].data_type == TensorProto.INT32


def test_a_float_entry_leaves_its_tensor_float(here: Path, capsys) -> None:
    content = {"activation_encodings": {"b2.act1": {"dtype": "float16"}}, "param_encodings": {}}
    found, model, said = overridden(capsys, content)
    assert "b2.act1" not in found.activations and "b2.act1.scale" not in constants(model)
    assert "10 activations, 8 weights and constants; none, so float, for 1: b2.act1" in said


def test_overrides_are_left_unread_when_they_are_to_be_ignored(here: Path, capsys) -> None:
    Path("overrides.json").write_text("no json")
    more = ["--quantization_overrides", "overrides.json"]
    _, _, said = works(capsys, *more, "--ignore_encodings")
    assert "note: --ignore_encodings: overrides.json was not read" in said
    fails(capsys, *more)


def test_many_overrides_that_match_nothing_are_counted(here: Path, capsys) -> None:
    content = {"activation_encodings": {f"t{i}": {"dtype": "int8"} for i in range(30)}, "param_encodings": {}}
    _, _, said = overridden(capsys, content)
    notes = [line for line in said.splitlines() if "override" in line]
    assert len(notes) == 8 and notes[-1] == "note: 23 more overrides match nothing"


@pytest.mark.parametrize(
    ("kind", "name", "entry", "message"),
    [
        ("param", "fc.weight", {"dtype": "int32"}, "what is asked for 'fc.weight' does not fit: "),
        ("activation", "act", {"dtype": "int31"}, "what is asked for 'act' does not fit: "),
        ("param", "fc.weight", {"dtype": "int3"}, "fc.weight"),
        ("activation", "act", {"dtype": "int12"}, "act"),
        (
            "param",
            "fc.weight",
            [{"bitwidth": 8, "min": -1, "max": 1}] * 3,
            "what is asked for 'fc.weight' does not fit",
        ),
        ("activation", "act", [{"bitwidth": 8, "min": -1, "max": 1}] * 2, "what is asked for 'act' does not fit"),
        ("param", "fc.weight", {"dtype": "complex"}, "a type like int4 or float16"),
    ],
)
def test_an_override_that_cannot_be_gets_one_sentence(here: Path, capsys, kind, name, entry, message: str) -> None:
    content = {"activation_encodings": {}, "param_encodings": {}}
    content[f"{kind}_encodings"][name] = entry
    Path("overrides.json").write_text(json.dumps(content))
    assert message in fails(capsys, "--quantization_overrides", "overrides.json")
    assert not Path("out").exists()


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--weight_bw", "4", "--act_bw", "16"],
        ["--use_per_channel_quantization"],
        ["--act_quantizer_schema", "symmetric", "--param_quantizer_schema", "symmetric"],
    ],
)
def test_written_encodings_as_overrides_make_the_same_network(here: Path, capsys, version: str, flags) -> None:
    _, first, _ = works(capsys, *flags, "--encodings_version", version, "--act_quantizer_calibration", "sqnr")
    os.rename("out/qnn.encodings", "mine.encodings")
    _, second, said = works(capsys, "--quantization_overrides", "mine.encodings")
    assert "matches no" not in said
    assert first.SerializeToString() == second.SerializeToString()


def test_overrides_are_never_overwritten(here: Path, capsys) -> None:
    works(capsys)
    before = Path("out/qnn.encodings").read_bytes()
    said = fails(capsys, "--quantization_overrides", "out/qnn.encodings")
    assert "out/qnn.encodings would be overwritten" in said and Path("out/qnn.encodings").read_bytes() == before


def test_an_inner_tensor_and_a_group_of_activations_are_told(digits: Path) -> None:
    rules = [Rule("act", 8, None, "activation", 32), Rule("bn", 8, None, "activation")]
    done = convert.quantize_network(prepared(digits), samples_of(digits), overrides=rules)
    assert "override 'act': an activation has no groups" in done.notes
    assert any("'bn'" in note and "matches no activation" in note for note in done.notes)


@pytest.mark.parametrize(("op", "axis"), [("MatMul", 0), ("ConvTranspose", 0), ("Conv", 1)])
def test_groups_lie_along_the_input_channels(op: str, axis: int) -> None:
    shape = {"MatMul": (3, 8, 4), "ConvTranspose": (8, 4, 3, 3), "Conv": (4, 8, 3, 3)}[op]
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    channel = {"MatMul": 2, "ConvTranspose": 1, "Conv": 0}[op]
    rule = Rule("w", 4, True, "param", 4)
    qparams = convert._weight("w", values, channel, False, Options(), rule)
    inner = {"MatMul": 1}.get(op, axis)
    assert qparams.grid.block_size == tuple({inner: 4, channel: 1}.get(i, -1) for i in range(values.ndim))


# -- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--weight_bw", "4", "--use_per_channel_quantization", "--act_bw", "16"]])
def test_the_files_are_valid_and_agree_with_each_other(here: Path, capsys, flags: list[str]) -> None:
    found, model, _ = works(capsys, *flags)
    onnx.checker.check_model(onnx.load("out/qnn.onnx"), full_check=True)
    assert [entry.name for entry in model.graph.input] == ["input"]
    assert [entry.name for entry in model.graph.output] == ["output"]
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 1, 8, 8]
    floats, written = prepared(here), constants(model)
    for name, encoding in found.params.items():
        values = numpy_helper.to_array(constants(floats)[name])
        qparams = encoding.qparams(values.shape, 0)
        codes = numpy_helper.to_array(written[f"{name}.codes"])
        assert np.array_equal(codes.astype(np.int64), quantize(values, qparams).astype(np.int64)), name
    for name, encoding in found.activations.items():
        assert numpy_helper.to_array(written[f"{name}.scale"]) == np.float32(encoding.scale)
        assert numpy_helper.to_array(written[f"{name}.zero_point"]) == encoding.zero_point
    sample = samples_of(here)[0]
    (first,) = convert.Runner(model, ["output"])(sample)
    (real,) = convert.Runner(floats, ["output"])(sample)
    assert np.abs(first - real).max() < 0.2 * np.abs(real).max()


def test_encodings_are_those_written_where_a_bias_changes_them() -> None:
    """A channel whose weights are all zero, with a large bias."""
    model = tiny("Conv", pads=[1, 1, 1, 1])
    w = numpy_helper.to_array(model.graph.initializer[0]).copy()
    w[2] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1, 500, 0], np.float32), "b"))
    model.graph.node[0].input.append("b")
    network, sample = graph.prepare(model), np.random.default_rng(0).random((1, 1, 8, 8), dtype=np.float32)
    done = convert.quantize_network(network, [sample], Options(use_per_channel_quantization=True))
    scales = numpy_helper.to_array(constants(done.network)["w.scale"])
    assert np.array_equal(done.encodings.params["w"].scale.astype(np.float32), scales)
    again = convert.quantize_network(network, [sample], overrides=done.encodings)
    assert again.network.SerializeToString() == done.network.SerializeToString()


def test_every_tensor_is_covered_and_what_only_moves_keeps_its_scale(tmp_path: Path) -> None:
    model = zoo.direction_classifier()
    samples = zoo.classifier_lines(2, 999)[0]
    lay_out(tmp_path, model, samples)
    network = convert.prepared(tmp_path / "model.onnx", {"x": (1, 3, 48, 192)})
    done = convert.quantize_network(network, [samples[:1], samples[1:]], Options(use_per_channel_quantization=True))
    assert set(done.encodings.activations) == set(done.tensors.activations)
    assert set(done.encodings.params) == {*done.tensors.weights, *done.tensors.constants}
    moved = {name: root for name, root in done.tensors.activations.items() if name != root}
    assert moved
    for name, root in moved.items():
        assert done.encodings.activations[name].scale == done.encodings.activations[root].scale
    assert set(convert.layers(done)) <= set(done.encodings.activations)


def test_suspicious_scales_are_noted() -> None:
    w = np.zeros((8, 64), np.float32)
    model = tiny("MatMul")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(w, "w"))
    rule = Rule("w", 8, True, "param", None, Encoding(8, scale=2.0**-23))
    done = convert.quantize_network(graph.prepare(model), [np.ones((1, 1, 8, 8), np.float32)], overrides=[rule])
    assert any(note.startswith("w: the scale of 1 of 1 is the smallest") for note in done.notes), done.notes


@pytest.mark.parametrize("options", [Options(), Options(16, 16), Options(8, 16), Options(16, 4)])
def test_legality_is_what_the_table_says(digits: Path, options: Options) -> None:
    fine = replace(options, use_per_channel_quantization=True)
    done = convert.quantize_network(prepared(digits), samples_of(digits)[:1], fine)
    table, notes = capabilities.recorded(), convert.legality(done, list(htp.SOC_OF_ARCH))
    asked = {
        "Conv": capabilities.Probe("Conv", options.weight_bw, f"uint{options.act_bw}", "channel"),
        "Gemm": capabilities.Probe("Gemm", options.weight_bw, f"uint{options.act_bw}", "tensor"),
    }
    for op, probe in asked.items():
        refusing = [arch for arch in htp.SOC_OF_ARCH if not table[probe][arch].accepted]
        nodes = "7 nodes, stem the first" if op == "Conv" else "1 nodes, fc the first"
        line = f"{', '.join(refusing)} refuse {convert.in_words(probe)}: {nodes}"
        assert (line in notes) == bool(refusing)
    assert set(convert.kinds(done.network)) == {name.removesuffix(".weight") for name in [*WEIGHTS, "fc.weight"]}


def test_blocks_and_lpbq_are_recognized_in_what_is_written(digits: Path) -> None:
    samples = samples_of(digits)[:1]
    blocks = [Rule("b2.pw.weight", 4, True, "param", 32), Rule("b3.pw.weight", 4, True, "param", 64)]
    done = convert.quantize_network(prepared(digits), samples, Options(16), blocks)
    kinds = convert.kinds(done.network)
    assert kinds["b2.pw"].granularity == "block 32" and kinds["b3.pw"].granularity == "block 32"
    assert kinds["fc"] == capabilities.Probe("Gemm", 8, "uint16", "tensor")
    values = numpy_helper.to_array(constants(prepared(digits))["b3.pw.weight"])
    from qtools.affine import choose_lpbq

    lpbq = choose_lpbq(values, Grid(4, signed=True, symmetric=True, block_size=(1, 32, 1, 1)))
    assert isinstance(lpbq, LPBQ)
    rules = Encodings(params={"b3.pw.weight": Encoding.from_qparams(lpbq)})
    done = convert.quantize_network(prepared(digits), samples, Options(16), rules)
    assert convert.kinds(done.network)["b3.pw"].granularity == "LPBQ 32"


# -- how good it is --------------------------------------------------------------------------------------------------


def test_sqnr_is_what_numpy_computes_and_the_summary_names_outputs_and_layers(here: Path, capsys) -> None:
    _, model, said = works(capsys, "--use_per_channel_quantization")
    real, rounded = prepared(here), model
    names = ["b1.act1", "b3.act2", "output"]
    runs = [
        [
            np.concatenate(parts)
            for parts in zip(*(convert.Runner(one, names)(sample) for sample in samples_of(here)[:4]))
        ]
        for one in (real, rounded)
    ]
    expected = {
        name: 10 * np.log10(np.sum(np.float64(x) ** 2) / np.sum((np.float64(x) - y) ** 2))
        for name, x, y in zip(names, *runs)
    }
    assert f"SQNR of the outputs (dB): output {expected['output']:.1f}\n" in said
    (worst,) = re.findall(r"after the operators with weights, the worst: (.+)", said)
    shown = dict(pair.rsplit(" ", 1) for pair in worst.split(", "))
    assert len(shown) == 5 and list(map(float, shown.values())) == sorted(map(float, shown.values()))
    assert set(shown) <= {"act", "output", *(f"b{i}.act{j}" for i in (1, 2, 3) for j in (1, 2))}
    done = convert.Converted(real, rounded, encodings.read("out/qnn.encodings"), None)
    found = convert.layer_sqnr(done, samples_of(here)[:4])
    for name in names:
        assert found[name] == pytest.approx(expected[name], abs=1e-9)


def test_sqnr_holds_for_nearly_exact_and_for_silent_tensors() -> None:
    assert convert._ratio_db(1e6, 1e-30) == pytest.approx(360)
    assert convert._ratio_db(1.0, 0.0) == np.inf and convert._ratio_db(0.0, 1.0) == -np.inf


def test_the_inside_of_a_layer_norm_is_judged_rightly_and_not_listed(tmp_path: Path) -> None:
    """The recognizer has LayerNorms written out; what they square loses most, and no one reads it as a layer."""
    inputs = zoo.recognizer_lines(2, 999)[0]
    lay_out(tmp_path, zoo.text_recognizer(), inputs)
    network = convert.prepared(tmp_path / "model.onnx", {"x": (1, *inputs.shape[1:])})
    samples = [inputs[:1], inputs[1:]]
    done = convert.quantize_network(network, samples, Options(use_per_channel_quantization=True))
    found = convert.layer_sqnr(done, samples)
    makers = {name: node for node in network.graph.node for name in node.output}
    squared = next(name for name in found if makers[name].op_type == "Pow")
    centred = makers[squared].input[0]
    runs = [convert.Runner(one, [centred, squared]) for one in (done.float_network, done.network)]
    (real, real_squared), (_, rounded) = (run(samples[0]) for run in runs)
    assert np.allclose(real_squared, real**2, rtol=1e-5)
    both = [[run(sample)[1].astype(np.float64) for sample in samples] for run in runs]
    noise = sum(np.sum((x - y) ** 2) for x, y in zip(*both))
    power = sum(np.sum(x**2) for x in both[0])
    assert found[squared] == pytest.approx(10 * np.log10(power / noise), abs=1e-6)
    assert squared not in convert.layers(done) and convert.outputs(network)[0] in found
    assert rounded.shape == real.shape


# -- all or nothing --------------------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


def test_an_interruption_at_any_moment_leaves_the_old_files_or_the_new_ones(here: Path, capsys) -> None:
    soc = ["--soc", "sm8650"] if htp.status().available else []
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from qtools import cli; print('ready', flush=True); sys.exit(cli.main({['convert', *ARGS, *soc]!r}))"

    def started() -> "subprocess.Popen[str]":
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command, pipe = [sys.executable, "-c", code], subprocess.PIPE
        process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
        assert process.stdout.readline() == "ready\n"
        return process

    began = time.monotonic()
    with started() as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    seconds, new = time.monotonic() - began, snapshot(here / "out")
    works(capsys, *soc, "--act_bw", "16")
    ends = []
    for i in range(12):
        old = snapshot(here / "out")
        with started() as process:
            time.sleep(seconds * (0.02 + 0.08 * i))
            process.send_signal((signal.SIGINT, signal.SIGTERM)[i % 2])
            out, err = process.communicate(timeout=60)
        ends.append(process.returncode)
        now = snapshot(here / "out")
        assert sorted(os.listdir("out")) == sorted(new), ends
        if now != old:
            assert all(now[name][0] != old[name][0] for name in now)
            assert now["qnn.onnx"][1] == new["qnn.onnx"][1] and now["qnn.encodings"][1] == new["qnn.encodings"][1]
        if process.returncode == 130:
            assert out == "" and re.fullmatch(r"qtools convert: interrupted: [^\n]+\n|interrupted: [^\n]+\n", err), err
            assert now == old or "the new files are all there" in err
    assert ends.count(130) >= 6 and set(ends) <= {0, 130, -signal.SIGINT, -signal.SIGTERM}, ends
    assert sorted(path.name for path in here.iterdir()) == ["calibration", "model.onnx", "out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_files_are_moved_waits_until_all_are(here: Path, capsys, monkeypatch, number: int) -> None:
    works(capsys, "--act_bw", "16")
    old, moves, replace_ = snapshot(here / "out"), [], os.replace

    def move(source, target) -> None:
        if Path(target).parent.name == "out":
            moves.append(target)
            signal.raise_signal(number)
        replace_(source, target)

    monkeypatch.setattr("os.replace", move)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr()
    assert said.err == "qtools convert: interrupted: the new files are all there, and whole\n" and said.out == ""
    now = snapshot(here / "out")
    assert len(moves) == 2 and set(now) == set(old) and all(now[name] != old[name] for name in now)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_the_tidying_up_short(here: Path, capsys, monkeypatch, number: int) -> None:
    def write(*_: object) -> None:
        signal.raise_signal(number)

    def tidy(folder: Path, rmtree=convert.shutil.rmtree, **more: object) -> None:
        signal.raise_signal(number)
        rmtree(folder, **more)

    monkeypatch.setattr(convert, "_write", write)
    monkeypatch.setattr("shutil.rmtree", tidy)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = "qtools convert: interrupted: what was there before stays as it was\n"
    assert capsys.readouterr().err == said
    assert sorted(os.listdir()) == ["calibration", "model.onnx"]


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with _signals.collected() as caught:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
            with _signals.collected() as inner:
                assert inner is caught or not isinstance(signal.getsignal(signal.SIGINT), _signals.Caught)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_swallowed_is_raised_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), _signals.collected() as caught, caught.at_once():
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        before = "the end"
    assert before == "the end" and caught == [signal.SIGTERM]


def test_in_another_thread_it_works_without_signals(here: Path) -> None:
    done: list[int] = []
    with warnings.catch_warnings():
        thread = threading.Thread(target=lambda: done.append(run()))
        thread.start()
        thread.join()
    assert done == [0]


def test_an_interruption_that_native_code_turns_into_an_error_is_one(here: Path, capsys, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise ImportError("initialization failed")

    monkeypatch.setattr(convert, "_converted", fail)
    assert run() == 130
    assert capsys.readouterr().err == "qtools convert: interrupted: what was there before stays as it was\n"


@pytest.mark.parametrize("at", ["write", "move", "scratch"])
def test_a_full_disk_leaves_the_old_files(here: Path, capsys, monkeypatch, at: str) -> None:
    works(capsys, "--act_bw", "16")
    old, calls, replace_ = snapshot(here / "out"), itertools.count(), os.replace

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def move(source, target) -> None:
        if Path(target).parent.name == "out" and next(calls) == 1:  # the first file is in its place by then
            full()
        replace_(source, target)

    if at == "move":
        monkeypatch.setattr("os.replace", move)
    else:
        monkeypatch.setattr(*{"write": (Path, "write_bytes", full), "scratch": ("tempfile.mkdtemp", full)}[at])
    assert fails(capsys) == "qtools convert: out: the disk is full, and nothing was written"
    monkeypatch.undo()
    assert snapshot(here / "out") == old and len(os.listdir(here / "out")) == 2


def test_a_folder_that_may_not_be_written_to(here: Path, capsys) -> None:
    Path("out").mkdir(mode=0o555)
    user = os.geteuid()
    here.chmod(0o777)
    for folder in (here.parent, here.parent.parent):
        folder.chmod(folder.stat().st_mode | 0o055)
    try:
        with suppress(PermissionError):
            os.seteuid(user or 65534)  # root may write anywhere
        if os.access("out", os.W_OK, effective_ids=True):
            pytest.skip("this user may write anywhere")
        said = fails(capsys)
    finally:
        os.seteuid(user)
    assert said == "qtools convert: out: cannot be written to (Permission denied)" or "Permission denied" in said
    assert os.listdir("out") == []


def test_an_output_folder_that_is_a_file_and_a_file_that_is_a_folder(here: Path, capsys) -> None:
    Path("out").write_text("a file")
    assert fails(capsys) == "qtools convert: out: it is a file or lies in one, and should be a folder"
    assert Path("out").read_text() == "a file"
    Path("out").unlink()
    works(capsys)
    old = snapshot(here / "out")
    Path("out/qnn.onnx").unlink()
    Path("out/qnn.onnx").mkdir()
    assert fails(capsys) == "qtools convert: out: there is a folder qnn.onnx, where a file is to go"
    assert Path("out/qnn.encodings").stat().st_ino == old["qnn.encodings"][0]
    assert sorted(os.listdir("out")) == ["qnn.encodings", "qnn.onnx"]


# -- damaged networks ------------------------------------------------------------------------------------------------


def mutants(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Truncated, flipped, overwritten and shortened; all but the first kind mostly outside of weights."""
    rng, free = np.random.default_rng(seed), np.ones(len(content), bool)
    model = onnx.load_from_string(content)
    tensors = [*model.graph.initializer, *(entry.t for node in model.graph.node for entry in node.attribute)]
    for raw in (tensor.raw_data for tensor in tensors if len(tensor.raw_data) > 32):
        start = content.find(raw)
        free[start : start + len(raw)] = False
    places = np.flatnonzero(free)
    for i in range(count):
        changed = bytearray(content)
        if i % 4 == 0:
            del changed[rng.integers(len(content)) :]
        elif i % 4 == 1:
            changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
        for at in rng.choice(places, rng.integers(1, 4)) if i % 4 > 1 else ():
            if i % 4 == 2:
                changed[at] = rng.integers(256)
            else:
                del changed[at : at + rng.integers(1, 9)]
        yield bytes(changed)


@pytest.fixture(scope="module")
def networks(digits: Path) -> dict[str, tuple[bytes, dict[str, tuple[int, ...]]]]:
    return {
        "digits": ((digits / "model.onnx").read_bytes(), {"input": (1, 1, 8, 8)}),
        "classifier": (zoo.direction_classifier().SerializeToString(), {"x": (1, 3, 48, 192)}),
    }


@pytest.mark.parametrize(("name", "count"), [("digits", 780), ("classifier", 200)])
def test_a_damaged_network_works_or_gets_one_sentence(networks, tmp_path: Path, name: str, count: int) -> None:
    content, shapes = networks[name]
    path, ends = tmp_path / "damaged.onnx", {True: 0, False: 0}
    for damaged in mutants(content, count, seed=0):
        path.write_bytes(damaged)
        try:
            convert.prepared(path, shapes)
        except ValueError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
            ends[False] += 1
        else:
            ends[True] += 1
    assert os.listdir(tmp_path) == ["damaged.onnx"]
    assert ends[True] > count / 10 and ends[False] > count / 3, ends


def test_damaged_networks_through_the_command_itself(networks, here: Path) -> None:
    content, _ = networks["digits"]
    (here / "two.txt").write_text("calibration/0.raw\ncalibration/1.raw\n")

    def converted(item: tuple[int, bytes]) -> tuple[int, str, list[str]]:
        number, damaged = item
        (folder := here / f"run{number}").mkdir()
        (folder / "model.onnx").write_bytes(damaged)
        args = ["--input_network", str(folder / "model.onnx"), "-o", str(folder / "qnn.cpp"), *ARGS[4:], "--input_list"]
        command = [sys.executable, "-m", "qtools.cli", "convert", *args, "two.txt"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr, sorted(os.listdir(folder))

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(converted, enumerate(mutants(content, 20, seed=1))))
    for status, said, there in ends:
        assert status in (0, 1), said
        assert there == ["model.onnx", *([] if status else ["qnn.encodings", "qnn.onnx"])]
        assert len(said.splitlines()) == status and (not status or said.startswith("qtools convert: "))
    assert {status for status, _, _ in ends} == {0, 1}
