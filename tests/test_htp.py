"""Sessions on the HTP backend: every node on it, nothing printed, and clear words where it is absent."""

import subprocess
import sys

import numpy as np
import pytest

from qtools.affine import Grid, choose_qparams, quantize
from qtools.npu import htp
from qtools.qdq import quantizer_model

needs_backend = pytest.mark.skipif(not htp.status().available, reason=f"HTP backend: {htp.status().reason}")


@needs_backend
@pytest.mark.parametrize("arch", htp.SOC_OF_ARCH)
@pytest.mark.parametrize("grid", [Grid(8), Grid(16), Grid(8, True)], ids=str)
def test_codes_of_the_backend_are_within_one_of_ours(arch, grid):
    x = np.random.default_rng(0).standard_normal((1, 64, 64), dtype=np.float32)
    qparams = choose_qparams(x, grid)
    codes = htp.run(quantizer_model(qparams, x.shape), {"x": x}, arch)["q"]
    difference = np.abs(codes.astype(int) - quantize(x, qparams))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.98


@needs_backend
def test_a_refused_graph_is_named_in_one_line():
    qparams = choose_qparams(np.ones(3, np.float32), Grid(8))
    model = quantizer_model(qparams, (1, 8))
    model.graph.node[0].op_type = "Hardmax"
    del model.graph.node[0].input[1:]
    with pytest.raises(htp.HTPRefused, match=r"HTP backend \(v75\) does not take this graph.*same") as caught:
        htp.session(model)
    assert "\n" not in str(caught.value)


@needs_backend
def test_nothing_is_printed_by_the_native_library():
    program = (
        "import numpy as np; from qtools.affine import *; from qtools.npu import htp;"
        "from qtools.qdq import quantizer_model;"
        "x = np.ones((1, 8, 8), np.float32); p = choose_qparams(x, Grid(8));"
        "htp.run(quantizer_model(p, x.shape), {'x': x}); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "done\n"
    assert done.stderr == ""


@needs_backend
def test_what_is_no_model_is_not_called_a_refusal(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such ONNX file"):
        htp.session(tmp_path / "gone.onnx")
    with pytest.raises(ValueError, match="not a valid ONNX model") as caught:
        htp.session(b"garbage")
    assert not isinstance(caught.value, htp.HTPRefused)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch must be one of v68"):
        htp.session(b"", "v7")


def test_switched_off_says_so(monkeypatch):
    monkeypatch.setenv("QTOOLS_HTP", "0")
    htp._device.cache_clear()
    assert not htp.status().available
    with pytest.raises(htp.HTPUnavailable, match="switched off by QTOOLS_HTP=0"):
        htp.run(b"", {})


def test_absent_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv("QTOOLS_HTP", raising=False)
    assert "pip install onnxruntime-qnn" in htp.status().reason
