"""``qtools llm eval`` and ``predict``: what they print is what the functions give, and errors are one sentence."""

import json
import re

import pytest
import torch

from qtools import cli
from qtools.llm import decode, evaluate, kv_cache, llama
from qtools.npu import soc
from qtools.suite.results import ROOT

SMALL = ROOT / "data/small_llama"


def said(capsys, *args, status=0):
    assert cli.main(["llm", *map(str, args)]) == status
    out, err = capsys.readouterr()
    assert err.count("\n") == bool(status), err
    return out if not status else err


def test_eval_prints_the_perplexity_of_what_was_asked_for(capsys):
    out = said(capsys, "eval", SMALL, "--weights", 4, "--group", 128, "--cache", 4, "--windows", 2, "--length", 64)
    base, found = (float(number) for number in re.findall(r"perplexity ([\d.]+)", out))
    model = llama.load(SMALL)
    ids = torch.tensor(model.tokenizer.encode((SMALL / "validation.txt").read_text(encoding="utf-8")).ids)
    windows = evaluate.windows(ids, 2, 64)
    grid = evaluate.Grid(4, signed=True, symmetric=True, block_size=(1, 128))
    scheme = kv_cache.Scheme(4)
    wanted = evaluate.perplexity(evaluate.quantized(model, grid), windows, kv_cache.taps(scheme, scheme))
    assert base == pytest.approx(evaluate.perplexity(model, windows), abs=1e-3)
    assert found == pytest.approx(wanted, abs=1e-3) and found > base


def test_eval_takes_packed_weights_as_they_were_written(tmp_path, capsys):
    assert cli.main(["llm", "quantize", str(SMALL), str(tmp_path / "packed"), "--scheme", "w4"]) == 0
    capsys.readouterr()
    out = said(capsys, "eval", SMALL, "--packed", tmp_path / "packed", "--windows", 1, "--length", 32)
    assert "with packed" in out and len(re.findall(r"perplexity [\d.]+", out)) == 2


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["/nonexistent"], "cannot be read"),
        ([SMALL, "--weights", 99], "bits must be 2 to 16"),
        ([SMALL, "--cache", 3], "16, 8, 4 or 2 bits"),
        ([SMALL, "--length", 10**6], "more than"),
        ([SMALL, "--text", "/nonexistent"], "No such file"),
        ([SMALL, "--weights", 4, "--packed", "/x"], "either those of --packed or rounded"),
    ],
)
def test_what_eval_cannot_do_is_one_sentence(args, word, capsys):
    assert word in said(capsys, "eval", *args, status=1)


def test_predict_prints_the_time_model_and_the_floor(tmp_path, capsys):
    out = said(capsys, "predict", "--soc", "sm8650")
    rates = soc.rates("sm8650", "w4a16")
    first, token = decode.seconds(decode.LLAMA2_7B, rates, 1024, 1024)
    least = decode.floor(decode.LLAMA2_7B, rates.bandwidth, 1024)
    numbers = [float(number) for number in out.splitlines()[-1].split("Gen 3")[1].split()]
    assert numbers == pytest.approx([1e3 * token, 1 / token, 1e3 * least, first], abs=0.06)
    assert said(capsys, "predict", SMALL, "--context", 64, "--prompt", 8).count("Snapdragon") == 4
    config = json.loads((SMALL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": -1}))
    for args, word in (
        ([tmp_path], "no config.json of the Llama architecture"), (["--soc", "x"], "unknown SoC 'x'"),
        (["--prompt", 9, "--context", 8], "between 1 and the context's 8"), (["--weights", 0], "bits are positive"),
    ):  # fmt: skip
        assert word in said(capsys, "predict", *args, status=1)
