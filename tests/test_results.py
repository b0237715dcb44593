"""The numbers a chapter keeps, their comparison under test, and the verdicts that follow from them."""

import json

import pytest

from qtools._files import replace_file
from qtools.suite import claims
from qtools.suite.results import ROOT, Chapter


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository whose chapter 3 has results a = 1.0 and b = 2 (from the HTP backend)."""
    monkeypatch.delenv("QTOOLS_CHECK", raising=False)
    monkeypatch.setenv("QTOOLS_OUT", str(tmp_path))
    monkeypatch.setattr("qtools.npu.htp.status", lambda: type("S", (), {"available": True, "reason": "backend 1.0"}))
    chapter = Chapter(3, tmp_path)
    chapter.record("a", 1.0, source="simulated", rtol=0.01)
    chapter.on_htp(backend)
    chapter.finish()
    monkeypatch.setenv("QTOOLS_CHECK", "1")
    return tmp_path


def backend():
    return {"b": 2}


def test_a_result_within_its_tolerance_passes(root):
    chapter = Chapter(3, root)
    assert chapter.record("a", 1.009, source="simulated", rtol=0.01) == 1.009


@pytest.mark.parametrize(
    ("key", "value", "source", "message"),
    [
        ("a", 1.02, "simulated", "committed as 1.0"),
        ("a", 1.0, "computed", "source is 'computed'"),
        ("new", 1.0, "simulated", "not in the committed"),
    ],
)
def test_a_changed_result_fails_in_its_cell(root, key, value, source, message):
    with pytest.raises(AssertionError, match=message):
        Chapter(3, root).record(key, value, source=source, rtol=0.01)


def test_a_changed_tolerance_fails_too(root):
    with pytest.raises(AssertionError, match=r"rtol is 5, committed as 0\.01"):
        Chapter(3, root).record("a", 1.0, source="simulated", rtol=5)


def test_a_result_that_is_no_longer_made_fails_at_the_end(root):
    chapter = Chapter(3, root)
    chapter.on_htp(backend)
    with pytest.raises(AssertionError, match="not made by this run: a"):
        chapter.finish()


def test_without_the_backend_the_committed_numbers_stand_and_say_so(root, monkeypatch, capsys):
    monkeypatch.setattr("qtools.npu.htp.status", lambda: type("S", (), {"available": False, "reason": "not installed"}))
    chapter = Chapter(3, root)
    assert chapter.on_htp(backend) == {"b": 2}
    assert "not installed. Not verified here; shown is what backend 1.0 gave" in capsys.readouterr().out

    def never_run():
        return {"c": 1}

    with pytest.raises(RuntimeError, match="no earlier run of 'never_run'"):
        chapter.on_htp(never_run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", True, None, 1j])
def test_only_finite_numbers_are_results(root, value):
    with pytest.raises(ValueError, match="must be a finite number"):
        Chapter(3, root).record("a", value, source="simulated")


def test_malformed_records_are_refused(root):
    chapter = Chapter(3, root)
    with pytest.raises(ValueError, match="lower_case"):
        chapter.record("A b", 1)
    with pytest.raises(ValueError, match="source must be one of"):
        chapter.record("a", 1, source="guessed")
    chapter.record("a", 1.0, source="simulated", rtol=0.01)
    with pytest.raises(ValueError, match="twice"):
        chapter.record("a", 1.0, source="simulated", rtol=0.01)


def test_reading_a_chapter_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("QTOOLS_OUT", raising=False)
    monkeypatch.delenv("QTOOLS_CHECK", raising=False)
    chapter = Chapter(4, tmp_path)
    chapter.record("a", 1)
    chapter.finish()
    assert list(tmp_path.iterdir()) == []


def test_timings_are_read_unless_measured_again(root, monkeypatch):
    monkeypatch.delenv("QTOOLS_CHECK")
    chapter = Chapter(3, root)
    with pytest.raises(FileNotFoundError, match="MEASURE=1"):
        chapter.measured("speed", lambda: {"ratio": 1.5})
    chapter.measured("speed", lambda: {"ratio": 1.5}, again=True)
    taken = Chapter(3, root).measured("speed", lambda: {"ratio": 9.9})
    assert taken["values"] == {"ratio": 1.5} and taken["cpu"] and taken["date"]
    monkeypatch.setenv("QTOOLS_CHECK", "1")
    with pytest.raises(AssertionError, match="committed results another"):
        Chapter(3, root).measured("speed", lambda: {"ratio": 1.5})


@pytest.mark.parametrize("file", sorted((ROOT / "data").rglob("*.json")) + sorted((ROOT / "figures").glob("*.json")))
def test_stored_files_are_json_that_every_reader_takes(file):
    def refuse(word):
        raise ValueError(word)

    json.loads(file.read_text(), parse_constant=refuse)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    replace_file(path, b"old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# -- verdicts --------------------------------------------------------------------------------------------------------


def committed_results() -> dict[str, float]:
    files = (ROOT / "data/results").glob("[0-9][0-9].json")
    return {k: e["value"] for file in files for k, e in json.loads(file.read_text())["results"].items()}


CLAIMS = claims.load(ROOT / "data/claims.yaml")


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_every_verdict_is_the_one_its_numbers_give(claim):
    results = committed_results()
    stored = [
        verdicts[claim.id]
        for file in (ROOT / "data/results").glob("[0-9][0-9].json")
        if claim.id in (verdicts := json.loads(file.read_text())["verdicts"])
    ]
    assert stored == [claims.evaluate(claim, results)]


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=lambda claim: claim.id)
def test_every_verdict_could_have_been_another(claim):
    # Somewhere within a factor of a thousand of today's numbers, the present condition is false.
    results = committed_results()
    verdict = claims.evaluate(claim, results)

    def verdict_if(factor: float) -> object:
        try:
            return claims.evaluate(claim, {key: value * factor + 0.1 * (factor - 1) for key, value in results.items()})
        except ValueError:
            return None

    assert any(verdict_if(factor) != verdict for factor in (0.0, 1e-3, 0.1, 10.0, 1e3))


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "a.b", "[1]", "'text'", "a if b else c", "open(a)", "lambda: 1", "a[0]"]
)
def test_a_condition_is_arithmetic_only(expression):
    with pytest.raises(ValueError, match=r"may not contain|no chapter recorded"):
        claims.condition(expression, {"a": 1.0, "b": 1.0, "c": 1.0})


def test_a_claim_without_a_true_condition_or_with_an_unknown_result_is_an_error():
    claim = claims.Claim(
        id="C99", section="1", claim="x", verdicts=[{"when": "a > 1", "verdict": "holds", "says": "s"}]
    )
    with pytest.raises(ValueError, match="no verdict"):
        claims.evaluate(claim, {"a": 0})
    with pytest.raises(ValueError, match="no chapter recorded"):
        claims.evaluate(claim, {})
    says = claims.Claim(
        id="C99", section="1", claim="x", verdicts=[{"when": "a > 1", "verdict": "holds", "says": "{b:.1f}"}]
    )
    with pytest.raises(ValueError, match="a claim names 'b', and no chapter recorded it"):
        claims.evaluate(says, {"a": 2})


@pytest.mark.parametrize(
    "text",
    ["{}", "- id: C1\n", "- {id: C01, section: '1', claim: x, verdicts: []}", "- {id: C01, nonsense: 1}",
     "- {id: C01, section: '1', claim: x, verdicts: [{when: a, verdict: maybe, says: s}]}"],
)  # fmt: skip
def test_a_malformed_ledger_is_refused(tmp_path, text):
    path = tmp_path / "claims.yaml"
    path.write_text(text)
    with pytest.raises(ValueError):
        claims.load(path)
