"""``qtools convert --algorithms``: what repairs a network works, on the networks that other tools report on."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from qtools import cli, zoo
from qtools.affine import LPBQ, dequantize
from qtools.metrics import sqnr_db
from qtools.ptq import convert, fuse, graph, rounding
from qtools.ptq.calibrate import calibrate
from qtools.ptq.convert import Options, Runner, quantize_network

ROOT = Path(__file__).resolve().parents[1]
TRAIN, _, IMAGES, LABELS = zoo.digits()
SAMPLES = [{"input": TRAIN[np.random.default_rng(1000).choice(1257, 256, replace=False)]}]
TENSOR = Options(param_quantizer_schema="symmetric")
CHANNEL = Options(use_per_channel_quantization=True, use_per_row_quantization=True)


@pytest.fixture(scope="module")
def networks() -> dict[str, onnx.ModelProto]:
    return {variant: fuse.fuse(graph.prepare(zoo.digits_cnn(variant))) for variant in ("mini", "skew")}


def worth(networks, variant: str, options: Options, **changes) -> tuple[float, float]:
    """Accuracy (percent) and SQNR of the logits against float (dB)."""
    reference = Runner(networks[variant], ["output"])({"input": IMAGES})[0]
    done = quantize_network(networks[variant], SAMPLES, replace(options, **changes))
    out = Runner(done.network, ["output"])({"input": IMAGES})[0]
    return 100 * float(np.mean(out.argmax(1) == LABELS)), sqnr_db(reference, out)


@pytest.mark.parametrize(
    ("variant", "options", "bits", "algorithms", "right", "db"),
    [
        ("skew", TENSOR, 8, ("cle",), 98.55, 32.5),  # AIMET with its CLE: 98.95 % and 32.8 dB; without it 41 and 0
        ("skew", TENSOR, 8, ("cle", "hba", "bc"), 98.55, 36.5),
        ("mini", TENSOR, 8, ("bc",), 98.6, 35),
        ("mini", CHANNEL, 4, ("gptq",), 98.6, 22.9),  # AIMET's AdaRound: 98.95 % and 22.9 dB
        ("mini", TENSOR, 4, ("seqmse", "gptq"), 98.6, 20.5),  # 98.7 % and 19.9 dB
        ("skew", TENSOR, 4, ("cle", "gptq"), 98.5, 21.4),  # 99.07 % and 21.4 dB
    ],
)
def test_repairs_reach_what_the_best_tool_reports(networks, variant, options, bits, algorithms, right, db) -> None:
    accuracy, sqnr = worth(networks, variant, options, weight_bw=bits, algorithms=algorithms)
    assert accuracy >= right and sqnr >= db


def test_the_order_of_the_names_does_not_matter(networks) -> None:
    one, other = (
        quantize_network(networks["skew"], SAMPLES, Options(algorithms=names)).network.SerializeToString()
        for names in (("cle", "bc"), ("bc", "cle"))
    )
    assert one == other


def test_rounded_weights_lie_on_the_grid_that_is_written(networks) -> None:
    done = quantize_network(networks["mini"], SAMPLES, Options(weight_bw=4, algorithms=("seqmse", "gptq")))
    constants = fuse.View(done.network)
    for name, weight in graph.weights(networks["mini"]).items():
        encoding = done.encodings.params[weight.name].qparams(weight.values.shape)
        assert not isinstance(encoding, LPBQ)
        codes = constants.value(f"{weight.name}.codes").astype(np.int8)
        scale = np.ravel(constants.value(f"{weight.name}.scale"))[0]
        assert scale == encoding.scale.ravel()[0], name
        assert np.abs(dequantize(codes, encoding) - weight.values).max() < 16 * scale


def test_equalization_refuses_the_ranges_of_another_network(networks) -> None:
    watched = calibrate(networks["skew"], SAMPLES)
    with pytest.raises(ValueError, match="cle and hba change the ranges: give samples"):
        quantize_network(networks["skew"], SAMPLES, Options(algorithms=("cle",)), calibration=watched)
    with pytest.raises(ValueError, match="the algorithms bc need samples"):
        quantize_network(networks["skew"], (), Options(algorithms=("bc",)), calibration=watched)


def test_what_was_left_alone_is_said(networks) -> None:
    notes = "\n".join(quantize_network(networks["mini"], SAMPLES, Options(algorithms=("cle", "bc", "gptq"))).notes)
    assert "cle: 5 pairs of layers equalized" in notes and "cle left alone stem: " in notes
    assert "bc changed nothing: where weights are rounded anew, biases are fitted too" in notes


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(zoo.digits_cnn("skew"), tmp_path / "model.onnx")
    for index, image in enumerate(TRAIN[:32]):
        image[None].astype("<f4").tofile(tmp_path / f"{index}.raw")
    (tmp_path / "list.txt").write_text("".join(f"{index}.raw\n" for index in range(32)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGS = ["--input_network", "model.onnx", "--output_path", "out/qnn.cpp", "--input_dim", "input", "1,1,8,8"]
ARGS += ["--input_list", "list.txt", "--weight_bw", "4"]


def test_the_articles_flag_works_from_the_shell(here: Path, capsys) -> None:
    assert cli.main(["convert", *ARGS, "--algorithms", "cle", "gptq"]) == 0
    said = capsys.readouterr().out
    assert "note: cle: " in said and " pairs of layers equalized" in said
    assert sorted(os.listdir("out")) == ["qnn.encodings", "qnn.onnx"]
    out = Runner(onnx.load("out/qnn.onnx"), ["output"])
    agree = [out({"input": image[None]})[0].argmax() == label for image, label in zip(IMAGES[:100], LABELS[:100])]
    assert np.mean(agree) > 0.9  # 10 % without


def test_an_interrupted_rounding_goes_on_to_the_same_files(here: Path, capsys, monkeypatch) -> None:
    assert cli.main(["convert", *ARGS, "--algorithms", "gptq"]) == 0
    whole = {name: Path("out", name).read_bytes() for name in os.listdir("out")}
    for name in whole:
        Path("out", name).unlink()
    solve, solved = rounding.Descent.__call__, []

    def interrupted(self, problem):
        if len(solved) == 3:
            raise KeyboardInterrupt
        solved.append(problem)
        return solve(self, problem)

    with monkeypatch.context() as patch:
        patch.setattr(rounding.Descent, "__call__", interrupted)
        assert cli.main(["convert", *ARGS, "--algorithms", "gptq"]) == 130
    assert os.listdir("out") == [".qnn.rounding"] and len(solved) == 3
    counted = []
    monkeypatch.setattr(rounding.Descent, "__call__", lambda self, p: counted.append(p) or solve(self, p))
    assert cli.main(["convert", *ARGS, "--algorithms", "gptq"]) == 0
    assert len(counted) == len(graph.weights(zoo.digits_cnn("skew"))) - 3
    assert {name: Path("out", name).read_bytes() for name in os.listdir("out")} == whole


def test_options_are_checked() -> None:
    for algorithms, message in ((("magic",), "there is no 'magic'"), (("adaround", "gptq"), "choose one")):
        with pytest.raises(ValueError, match=message):
            Options(algorithms=algorithms)
    assert set(convert.ALGORITHMS) == {"cle", "hba", "bc", "seqmse", "adaround", "gptq"}


PEERS = {  # the best that AIMET 2.42 and ONNX Runtime 1.32 reach with weights and activations of so many bits: %, dB
    "mini_w8a8_channel": (98.89, 36.2), "mini_w8a8_tensor": (99.07, 33.9), "mini_w8a16_channel": (98.89, 39.0),
    "mini_w8a16_tensor": (99.07, 34.1), "mini_w4a16_channel": (99.07, 13.7), "mini_w4a16_tensor": (97.04, 9.6),
    "mini_w4a8_channel": (99.07, 23.9), "mini_w4a8_tensor": (99.07, 21.7), "mini_w3a8_channel": (98.46, 16.3),
    "mini_w3a8_tensor": (98.89, 14.4), "mini_w4a4_channel": (97.84, 9.7), "mini_w4a4_tensor": (94.81, 7.3),
    "skew_w8a8_channel": (98.95, 33.5), "skew_w8a8_tensor": (98.95, 32.8), "skew_w8a16_channel": (98.89, 24.0),
    "skew_w4a8_channel": (98.52, 13.7), "skew_w4a8_tensor": (99.07, 21.4), "skew_w3a8_channel": (92.04, 5.5),
    "skew_w3a8_tensor": (85.49, 5.6),
}  # fmt: skip


@pytest.mark.parametrize("scheme", PEERS)
def test_the_recorded_figures_are_not_behind_those_of_other_tools(scheme: str) -> None:
    values = json.loads((ROOT / "data/results/measured/03_rounding.json").read_text())["values"]
    variant, rest = scheme.split("_", 1)
    keys = [key for key in values if key.endswith("_db") and key.startswith((f"{scheme}_", f"{variant}_cle_{rest}_"))]
    found = [(values[key.removesuffix("db") + "right"], values[key]) for key in keys]
    right, db = PEERS[scheme]
    assert len(found) >= 10 and any(one >= right - 0.4 and sqnr >= db - 0.3 for one, sqnr in found)


def test_adaround_takes_its_2000_iterations_in_time() -> None:
    values = json.loads((ROOT / "data/results/measured/03_rounding.json").read_text())["values"]
    for scheme, db in (("w4a8", 22.6), ("w3a8", 15.5)):
        assert values[f"mini_{scheme}_channel_adaround_db"] >= db
        assert values[f"mini_{scheme}_channel_adaround_seconds"] <= 45
