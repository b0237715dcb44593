"""``qtools verify``: floats, simulation and the HTP backend side by side, and what it says when one is missing."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from qtools import cli, zoo
from qtools.metrics import sqnr_db
from qtools.npu import capabilities, htp
from qtools.ptq import convert, fuse, graph, verify
from qtools.ptq.convert import Options

needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")


def quantized(model: onnx.ModelProto, inputs: np.ndarray, options: Options) -> convert.Converted:
    name = model.graph.input[0].name
    network = fuse.fuse(graph.prepare(model, {name: (1, *inputs.shape[1:])}))
    return convert.quantize_network(network, [{name: x[None]} for x in inputs], options)


@pytest.fixture(scope="module")
def digits() -> tuple[convert.Converted, list[dict[str, np.ndarray]]]:
    images = zoo.digits()[0][:16]
    done = quantized(zoo.digits_cnn(), images, Options(use_per_channel_quantization=True))
    return done, [{"input": image[None]} for image in images[:4]]


@pytest.fixture
def here(digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the digits network as files, float and quantized, with an input list."""
    onnx.save(zoo.digits_cnn(), tmp_path / "model.onnx")
    for index, sample in enumerate(digits[1]):
        sample["input"].tofile(tmp_path / f"{index}.raw")
    (tmp_path / "list.txt").write_text("".join(f"{index}.raw\n" for index in range(4)))
    monkeypatch.chdir(tmp_path)
    convert.convert("model.onnx", "qnn.cpp", "list.txt", input_shapes={"input": (1, 1, 8, 8)})
    return tmp_path


def fails(capsys, *args: str) -> str:
    assert cli.main(["verify", *args]) == 1
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    return said.err


def test_outputs_are_compared_as_metrics_define_it(digits, monkeypatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    done, samples = digits
    found = verify.verify(done.network, samples, done.float_network)
    assert found.reason == "switched off by QTOOLS_HTP=0" and found.samples == 4
    assert found.layers == [] and found.refused == {} and found.parts_at is None
    real, ours = (
        np.concatenate([convert.Runner(one, ["output"])(sample)[0] for sample in samples])
        for one in (done.float_network, done.network)
    )
    (output,) = found.outputs
    assert output["simulated_db"] == sqnr_db(real, ours) and output["simulated_agreement"] == 100
    assert output["htp_db"] is None and output["htp_to_simulated_agreement"] is None
    (alone,) = verify.verify(done.network, samples).outputs
    assert alone["simulated_db"] is None


@needs_backend
def test_the_backend_computes_nearly_what_the_simulation_does(digits) -> None:
    done, samples = digits
    found = verify.verify(done.network, samples, done.float_network, others=["v68", "v81"])
    assert found.reason == "" and found.refused == {}
    assert [layer.name for layer in found.layers][:2] == ["input", "act"] and len(found.layers) == 11
    first, second, *_ = found.layers
    assert first.equal_percent > 90  # a pixel of 8/16 lies halfway between two codes, and rounds either way
    assert max(first.worst, second.worst) <= 1  # further on, differences add up
    assert max(layer.worst for layer in found.layers) <= 8
    (output,) = found.outputs
    assert output["htp_to_simulated_db"] > 35 and output["htp_agreement"] == 100
    assert abs(output["htp_db"] - output["simulated_db"]) < 3


@needs_backend
def test_a_network_of_more_tensors_than_the_backend_gives_out_at_once() -> None:
    inputs = zoo.classifier_lines(2, 999)[0]
    done = quantized(zoo.direction_classifier(), inputs, Options(use_per_channel_quantization=True))
    found = verify.verify(done.network, [{"x": x[None]} for x in inputs], done.float_network)
    codes = [node.output[0] for node in done.network.graph.node if node.op_type == "QuantizeLinear"]
    assert len(codes) > verify._AT_ONCE
    assert [f"{layer.name}.codes" for layer in found.layers] == codes
    assert found.outputs[0]["htp_agreement"] == 100 and found.outputs[0]["htp_db"] > 20
    assert found.parts_at is not None and found.parts_at.worst > 1


@needs_backend
def test_chunks_of_any_size_find_the_same(digits, monkeypatch) -> None:
    done, samples = digits
    whole = verify.verify(done.network, samples)
    monkeypatch.setattr(verify, "_AT_ONCE", 5)
    assert verify.verify(done.network, samples) == whole


@needs_backend
def test_what_each_architecture_refuses_is_said_in_words() -> None:
    images = zoo.digits()[0][:2]
    samples = [{"input": images[:1]}]
    done = quantized(zoo.digits_cnn(), images, Options(act_bw=16, weight_bw=16))
    found = verify.verify(done.network, samples, done.float_network, others=["v68", "v69", "v73"])
    assert set(found.refused) == {"v68", "v69"} and found.layers
    assert found.refused["v68"] == (
        "it takes no Conv of uint16 with int16 weights (a scale per tensor): stem, b1.dw, b1.pw, b2.dw and 3 more; "
        "it takes no Gemm of uint16 with int16 weights (a scale per tensor): fc"
    )
    table = capabilities.recorded()
    for arch in ("v68", "v69", "v73", "v75"):
        refusing = not all(table[probe][arch].accepted for probe in convert.kinds(done.network).values())
        assert refusing == (arch in found.refused)
    text = cli_report(found)
    assert "HTP v68, v69 (emulated): it takes no Conv" in text


def cli_report(found: verify.Verification) -> str:
    from qtools.ptq.commands import report

    return report(found, "v75", random=False)


@needs_backend
def test_a_network_refused_where_it_should_run_is_still_simulated() -> None:
    images = zoo.digits()[0][:2]
    done = quantized(zoo.digits_cnn(), images, Options(act_bw=8, weight_bw=16))
    found = verify.verify(done.network, [{"input": images[:1]}], done.float_network)
    assert list(found.refused) == ["v75"] and found.layers == []
    assert found.outputs[0]["simulated_db"] > 30 and found.outputs[0]["htp_db"] is None


def test_what_the_table_does_not_know_is_said_with_the_backends_words() -> None:
    model = onnx.ModelProto()
    words = "the HTP backend (v75) does not take this graph: { name: top_token_3, type: TopK }: its library refuses "
    refused = htp.HTPRefused(words + "TopK with error 3110 (why)", "library")
    assert verify._why(model, refused, "v75") == "top: its library says TopK with error 3110"
    refused = htp.HTPRefused("... graph: { name: a, type: X }{ name: b, type: X }: its execution provider", "provider")
    assert verify._why(model, refused, "v75") == "a, b: its execution provider cannot translate them"
    refused = htp.HTPRefused("the backend made 2 graphs", "provider")
    assert verify._why(model, refused, "v75") == "the backend made 2 graphs"


def test_a_backend_that_does_not_start_is_one_that_is_not_there(digits, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise htp.HTPUnavailable("the HTP backend does not start: no library")

    monkeypatch.setattr(htp, "status", lambda: htp.Status(True, "here", "1"))
    monkeypatch.setattr(htp, "session", fail)
    done, samples = digits
    found = verify.verify(done.network, samples, done.float_network, others=["v68"])
    assert found.reason == "the HTP backend does not start: no library" and found.outputs[0]["simulated_db"] > 30


def test_what_does_not_fit_together_gets_one_sentence(digits) -> None:
    done, samples = digits
    with pytest.raises(ValueError, match=r"this is a float network: qtools convert makes a quantized one of it"):
        verify.verify(done.float_network, samples)
    with pytest.raises(ValueError, match=r"there is no sample to verify with"):
        verify.verify(done.network, [])
    for wrong in ({"input": np.zeros((1, 1, 9, 9), np.float32)}, {"x": samples[0]["input"]}, {}):
        with pytest.raises(ValueError, match=r"^ONNX Runtime does not take this: [^\n]+$"):
            verify.verify(done.network, [wrong])
    other = graph.prepare(zoo.direction_classifier(), {"x": (1, 3, 48, 192)})
    with pytest.raises(ValueError, match=r"the float network is another one: its inputs are x, those of the quant"):
        verify.verify(done.network, samples, other)


def test_the_command_finds_the_float_network_and_reads_the_list(here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    assert cli.main(["verify", "qnn.onnx", "--input_list", "list.txt", "--samples", "3"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "3 samples, from the list",
        "HTP backend: switched off by QTOOLS_HTP=0; nothing below is verified on it",
    ]
    assert said[2] == "output output" and said[3].startswith("  simulated: ") and "same argmax 100.0 %" in said[3]
    (here / "model.onnx").rename(here / "moved.onnx")
    assert cli.main(["verify", "qnn.onnx", "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 samples, random numbers (give --input_list for real ones)\n")
    assert "no float network to compare with: --float_network names one" in said
    assert cli.main(["verify", "qnn.onnx", "--float_network", "moved.onnx"]) == 0
    assert "  simulated: " in capsys.readouterr().out


@needs_backend
def test_the_command_reports_the_backend(here: Path, capsys) -> None:
    assert cli.main(["verify", "qnn.onnx", "--input_list", "list.txt", "--soc", "SM8550"]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "HTP v73 (emulated): " in said.out and "HTP against simulated: " in said.out
    assert "tensors within one code" in said.out or "simulation and backend part at " in said.out


def test_a_wrong_command_gets_one_sentence(here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    assert "model.onnx is a float network: qtools convert makes" in fails(capsys, "model.onnx")
    assert "no such network: none.onnx" in fails(capsys, "none.onnx")
    assert "list.txt is not an ONNX network" in fails(capsys, "list.txt")
    assert "--soc must be one of sm8350" in fails(capsys, "qnn.onnx", "--soc", "sm1")
    assert "--samples must be at least 1, got 0" in fails(capsys, "qnn.onnx", "--samples", "0")
    assert "none.txt: No such file" in fails(capsys, "qnn.onnx", "--input_list", "none.txt")
    assert "no such network: none.onnx" in fails(capsys, "qnn.onnx", "--float_network", "none.onnx")
    (here / "0.raw").write_bytes(b"1234")
    assert "0.raw has 4 bytes" in fails(capsys, "qnn.onnx", "--input_list", "list.txt")
    content = (here / "qnn.onnx").read_bytes()
    (here / "cut.onnx").write_bytes(content[: len(content) // 2])
    assert "cut.onnx is not an ONNX network" in fails(capsys, "cut.onnx")
