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


def _entry(when: str, results: dict[str, float], article: dict[str, float] | None = None) -> ledger.Entry:
    """A claim that holds under one condition, and otherwise fails if a > 0."""
    possible = [
        {"when": when, "verdict": "holds", "says": "{a}"},
        {"when": "a > 0", "verdict": "fails", "says": "{a}"},
    ]
    claim = claims.Claim(id="C99", section="9.9", claim="?", article=article or {}, verdicts=possible)
    return ledger.Entry(claim, "holds", "", results, ("computed",), 1, "01_x.ipynb", "c00")


def _walked(entry: ledger.Entry, key: str, step: float) -> float:
    """The nearest turning factor in one direction, found by walking there in small steps."""
    factors = (step**count for count in range(1, 10_000))
    return next(f for f in factors if ledger.verdict_with(entry, {key: entry.results[key] * f}) != entry.verdict)


@pytest.mark.parametrize(
    ("when", "results", "key", "factors"),
    [
        ("a < 2 * b", {"a": 1.0, "b": 1.0}, "a", [(2.0, "fails")]),
        ("a < 2 * b", {"a": 1.0, "b": 1.0}, "b", [(0.5, "fails")]),
        ("abs(a - 4) < 1", {"a": 4.5}, "a", [(10 / 9, "fails"), (2 / 3, "fails")]),
        ("a < article_a", {"a": 1.0}, "a", [(1.02, "fails")]),
        ("a < 1 and b < 500", {"a": 0.5, "b": 1.0}, "b", [(500.0, "fails")]),
        ("b < 1001", {"a": 0.5, "b": 1.0}, "b", []),  # further than the furthest
        ("b < 5", {"a": 0.5, "b": 0.0}, "b", []),  # whatever times nothing
        ("b == 5 and b < 6", {"a": 0.5, "b": 5.0}, "b", []),  # an answer, not a size
        ("c > 1 and a < 0", {"a": -1.0, "c": 2.0}, "c", [(0.5, "none")]),  # nothing is true any more
    ],
)
def test_a_verdict_is_as_firm_as_its_nearest_turning_point(when, results, key, factors):
    margins = ledger.margins(_entry(when, results, {"a": 1.02}))
    assert margins == sorted(margins, key=lambda one: max(one.factor, 1 / one.factor))
    found = [one for one in margins if one.key == key]
    assert [one.verdict for one in found] == [verdict for _, verdict in factors]
    assert [one.factor for one in found] == pytest.approx([factor for factor, _ in factors], rel=0.01)
    for one in found:  # just beyond, never just before
        assert ledger.verdict_with(_entry(when, results, {"a": 1.02}), {key: results[key] * one.factor}) == one.verdict


@pytest.mark.parametrize("identity", ["C06", "C16", "C22"])
def test_margins_are_those_of_a_walk_in_small_steps(identity):
    (entry,) = [entry for entry in FOUND if entry.claim.id == identity]
    margins = ledger.margins(entry)
    assert margins
    for one in margins[:2]:
        assert one.factor == pytest.approx(_walked(entry, one.key, 1.001 if one.factor > 1 else 0.999), rel=0.003)


def test_every_stored_verdict_stands_with_its_own_results():
    for entry in FOUND:
        assert ledger.verdict_with(entry, {}) == entry.verdict
        assert all(one.verdict != entry.verdict and one.key in entry.results for one in ledger.margins(entry))


def test_every_kind_of_verdict_has_a_sign_of_its_own():
    assert set(ledger.SIGNS) == set(claims.KINDS) and len(set(ledger.SIGNS.values())) == len(claims.KINDS)
