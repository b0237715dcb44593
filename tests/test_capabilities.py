"""The table of what each architecture takes: sound questions, the backend's own answers, the same when asked again."""

import dataclasses

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from qtools.npu import capabilities, htp
from qtools.npu.capabilities import Answer, Probe

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
