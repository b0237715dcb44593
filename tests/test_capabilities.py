"""The table of what each architecture takes: sound questions, the backend's own answers, the same when asked again."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qtools.affine import Grid, choose_and_quantize, choose_qparams, dequantize, quantize
from qtools.npu import capabilities, htp
from qtools.npu.capabilities import Answer, Probe
from qtools.qdq import operator_model

needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")
ALL = list(capabilities.probes())


def test_the_table_asks_every_question_of_every_architecture():
    recorded = capabilities.recorded()
    assert list(recorded) == ALL and len({str(probe) for probe in ALL}) == len(ALL) == 117
    assert all(list(answers) == list(htp.SOC_OF_ARCH) for answers in recorded.values())


@needs_backend
def test_asked_again_every_architecture_answers_the_same():
    assert capabilities.table() == capabilities.recorded_file()


@pytest.mark.parametrize("probe", ALL, ids=str)
def test_every_writing_is_a_valid_network_that_runs_in_onnx_runtime(probe):
    """So no refusal can be put down to how the question was written; and the writings of one probe mean the same."""
    inputs = capabilities._inputs(probe)
    outputs = []
    for model, _, _ in capabilities.writings(probe):
        onnx.checker.check_model(model, full_check=True)
        outputs.append(capabilities._on_cpu(model, inputs))
    assert all(np.array_equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("probe", ALL[:: len(ALL) // 12], ids=str)
def test_onnx_reference_agrees_with_onnx_runtime(probe):
    model, _, _ = next(capabilities.writings(probe))
    inputs = capabilities._inputs(probe)
    ours, reference = capabilities._on_cpu(model, inputs), ReferenceEvaluator(model).run(None, inputs)[0]
    np.testing.assert_allclose(ours.astype(float), reference.astype(float), atol=1 if ours.dtype.kind == "u" else 1e-3)


def test_the_weights_of_a_probe_have_the_blocks_it_names():
    for granularity, scales in (("tensor", 1), ("channel", 32), ("block 128", 64), ("block 32", 256)):
        for op in capabilities.OPS:
            _, encoding = capabilities._weights(Probe(op, 4, "uint8", granularity))
            assert encoding.scale.size == scales


@needs_backend
def test_a_refusal_says_who_refused():
    assert capabilities.ask(Probe("Conv", 16, "uint8", "channel"), "v75") == Answer(False, refused_by="library")
    assert capabilities.ask(Probe("MatMul", 8, "float32", "channel"), "v75") == Answer(False, refused_by="provider")


@needs_backend
def test_lpbq_in_a_gemm_is_taken_in_one_of_its_writings_only():
    probe = Probe("Gemm", 4, "uint8", "LPBQ 32")
    taken = []
    for model, options, _ in capabilities.writings(probe):
        try:
            htp.session(model, "v75", options)
        except htp.HTPRefused:
            taken.append(False)
        else:
            taken.append(True)
    assert taken == [False, True, False]
    assert capabilities.ask(probe, "v75").accepted


def test_a_question_that_onnx_runtime_cannot_run_is_an_error_not_a_refusal(monkeypatch):
    monkeypatch.setattr("qtools.qdq.weight_nodes", lambda *args: ([], []))
    with pytest.raises(Exception, match="w"):
        capabilities.ask(Probe("MatMul", 8, "uint8", "tensor"), "v75")


def test_the_printed_table_has_a_row_for_every_question_and_says_what_its_signs_mean():
    text = capabilities.show(capabilities.recorded())
    lines = text.splitlines()
    assert sum(line.startswith(("int4", "int8", "int16")) for line in lines) == len(ALL)
    assert "v68" in lines[1] and "refused" in text
    row = next(line for line in lines if line.startswith("int4") and "uint16" in line and "block 128" in line)
    assert row.split()[-6:] == ["--", *(f"{a.worst}" for a in _answers("Conv", 4, "uint16", "block 128")[1:])]


def _answers(*fields):
    return list(capabilities.recorded()[Probe(*fields)].values())


def test_an_answer_keeps_only_what_was_said():
    assert dataclasses.asdict(Answer(True)) == dict(
        accepted=True, worst=None, equal_percent=None, sqnr_db=None, refused_by=None, float_bias=False
    )


# -- without the backend: what `ask` makes of what a backend says -----------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """A backend of our own: give it what to do with each writing in turn."""

    def install(*acts):
        turns = iter(acts)

        def run(model, inputs, arch, options=None):
            act = next(turns)
            if isinstance(act, str):
                raise htp.HTPRefused("no", act)
            return {"y": act(capabilities._on_cpu(model, inputs))}

        monkeypatch.setattr(htp, "run", run)

    return install


def test_codes_are_compared_with_those_of_the_cpu(stub):
    def off(codes):
        codes = codes.copy()
        codes.ravel()[:5] = np.where(codes.ravel()[:5] > 100, codes.ravel()[:5] - 7, codes.ravel()[:5] + 7)
        return codes

    stub(off)
    assert capabilities.ask(Probe("MatMul", 8, "uint8", "channel"), "v75") == Answer(True, 7, 99.0)


def test_floats_are_compared_by_sqnr(stub):
    stub(lambda y: y * np.float32(1.001))
    assert capabilities.ask(Probe("Conv", 8, "float32", "tensor"), "v75") == Answer(True, sqnr_db=60.0)


@pytest.mark.parametrize(("acts", "by"), [(("provider", "provider"), "provider"), (("provider", "library"), "library")])
def test_all_writings_are_tried_before_it_is_a_refusal(stub, acts, by):
    stub(*acts)
    assert capabilities.ask(Probe("MatMul", 4, "uint8", "LPBQ 32"), "v75") == Answer(False, refused_by=by)
    stub("library", lambda y: y)
    assert capabilities.ask(Probe("MatMul", 4, "uint8", "LPBQ 32"), "v75") == Answer(True, 0, 100.0)


def test_what_is_taken_beside_a_float_bias_only_has_no_number(stub):
    stub("provider", lambda y: y)
    assert capabilities.ask(Probe("Gemm", 4, "uint8", "LPBQ 32"), "v75") == Answer(True, float_bias=True)


def test_no_architecture_is_no_question():
    with pytest.raises(ValueError, match="name at least one"):
        capabilities.table([])


def test_the_operator_of_a_probe_is_the_product_it_is_said_to_be():
    """Against NumPy: the weights dequantized by hand, the activations at their two different scales, a bias too."""
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    w = np.random.default_rng(2).standard_normal((7, 64)).astype(np.float32)
    codes, qparams = choose_and_quantize(w, Grid(8, True, True, block_size=(1, 16)))
    bias = np.arange(7, dtype=np.float32)
    real = x @ dequantize(codes, qparams).T + bias
    ends = choose_qparams(x, Grid(8)), choose_qparams(real, Grid(16))
    model = operator_model("Gemm", codes, qparams, x.shape, activations=ends, bias=bias)
    given = capabilities._on_cpu(model, {"x": quantize(x, ends[0])})
    expected = dequantize(quantize(x, ends[0]), ends[0]) @ dequantize(codes, qparams).T + bias
    assert np.abs(given.astype(int) - quantize(expected, ends[1])).max() <= 1
    for wrong in ({"op": "Add"}, {"op": "MatMul", "bias": bias}):
        with pytest.raises(ValueError, match="op is one of Conv, MatMul, Gemm"):
            operator_model(**({"op": "Gemm", "codes": codes, "encoding": qparams, "input_shape": x.shape} | wrong))
