"""The ledger: verdicts follow from results, and the page holds all it needs."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qtools.cli import main
from qtools.suite import claims, ledger
from qtools.suite.results import ROOT

FOUND = ledger.entries()


def test_every_claim_of_the_file_is_judged_once_by_a_cell_that_names_it():
    assert [entry.claim.id for entry in FOUND] == sorted(claims.load(ROOT / "data/claims.yaml"))
    for entry in FOUND:
        cells = json.loads((ROOT / "notebooks" / entry.notebook).read_text())["cells"]
        (cell,) = [cell for cell in cells if cell["id"] == entry.cell]
        shown = "".join(cell["outputs"][0]["data"]["text/markdown"])
        assert f"| {entry.claim.id} |" in shown and f"**{entry.verdict}** | {entry.says} |" in shown
        assert entry.sources


def test_counts_are_of_all_kinds():
    assert list(ledger.count(FOUND)) == list(claims.KINDS) and sum(ledger.count(FOUND).values()) == len(FOUND)
    assert ledger.count([]) == dict.fromkeys(claims.KINDS, 0)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Chapter 1 alone, with the claims it judges."""
    for name in ("notebooks/01_linear_quantization.ipynb", "data/results/01.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for entry in FOUND:
        if entry.chapter == 1 and entry.claim.figure:
            shutil.copytree(ROOT / "figures", tmp_path / "figures", dirs_exist_ok=True)
    shutil.copy(ROOT / "data/claims.yaml", tmp_path / "data/claims.yaml")
    return tmp_path


def test_a_verdict_that_no_longer_follows_is_refused(copy: Path):
    path = copy / "data/results/01.json"
    content = json.loads(path.read_text())
    content["results"]["relu_mse_ratio"]["value"] = 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="C05"):
        ledger.entries(copy)
    path.unlink()
    with pytest.raises(ValueError, match="C01 is judged by chapter 1, which left no results: qtools run 1"):
        ledger.entries(copy)


def test_the_page_needs_nothing_beside_it_and_says_what_was_found(copy: Path):
    claim = (copy / "data/claims.yaml").read_text().replace("`symmetric_quantize`", "<b>bold</b>")
    (copy / "data/claims.yaml").write_text(claim.replace('"symmetric_quantize as printed"', '"<script>x</script>"'))
    page = ledger.report(copy).read_text(encoding="utf-8")
    assert ledger.report(copy) == copy / "report.html"
    for entry in ledger.entries(copy):
        assert f'id="{entry.claim.id}"' in page and f'href="{entry.link}"' in page
    assert not re.search(r'(?:src|href)="(?!data:|notebooks/)', page) and "@import" not in page
    assert "&lt;script&gt;x" in page and "<script>x" not in page
    assert page.count("data:image/png;base64,") == sum(bool(e.claim.figure) for e in ledger.entries(copy))


def test_the_command_writes_the_page_and_refuses_in_one_line(tmp_path: Path, monkeypatch, capsys):
    target = tmp_path / "ledger.html"
    assert main(["report", "-o", str(target)]) == 0 and target.stat().st_size > 100_000
    assert capsys.readouterr().out.strip() == str(target)
    monkeypatch.setattr("qtools.suite.claims.evaluate", lambda claim, results: {"verdict": "holds", "says": ""})
    assert main(["report", "-o", str(tmp_path / "other.html")]) == 1
    assert capsys.readouterr().err.startswith("qtools report: the verdict of C01 does not follow")
    assert not (tmp_path / "other.html").exists()
