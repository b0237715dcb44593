"""The runner: it renews what is committed when a whole chapter succeeded, and only then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from qtools.suite.notebook import Failure, parameters_of, tidy
from qtools.suite.run import UsageError, find_chapters, publish, run

# What a chapter does when it runs under the runner: one figure with its numbers, one result.
WRITES = """
import json, os, pathlib
if os.environ.get("QTOOLS_OUT"):
    out = pathlib.Path(os.environ["QTOOLS_OUT"])
    for name, text in {{
        "figures/{n}_plot.png": "png", "figures/{n}_plot.json": "[1]",
        "data/results/{n}.json": json.dumps({{"results": {{"half": {{"value": N / 2}}}}}}),
        **({{"data/results/measured/{n}_time.json": "{{}}"}} if MEASURE else {{}}),
    }}.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
"""
PIECES = """
import sys, time
for word in ("a", "b", "c"):
    print(word, end=" ", flush=True)
    time.sleep(0.2)
print(sorted(os.listdir("."))[0])
"""


def write_notebook(path: Path, *sources: str, prose: str = "") -> Path:
    cells = [new_code_cell("N = 9\nMEASURE = 0\n", id="c0", metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source.strip(), id=f"c{i}") for i, source in enumerate(sources, 1)]
    cells += [new_markdown_cell(prose, id="p0")] if prose else []
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, dict[str, bytes], dict[str, bytes]]:
    """Three chapters, the second of which fails after its figure: root, status, files before and after."""
    root = tmp_path_factory.mktemp("repo")
    half = "half is 0<!--=half:.1f-->"
    write_notebook(root / "notebooks/01_one.ipynb", WRITES.format(n="01"), PIECES, prose=half)
    write_notebook(root / "notebooks/02_two.ipynb", WRITES.format(n="02"), "before = 1\nbefore / 0", prose=half)
    write_notebook(root / "notebooks/03_three.ipynb", WRITES.format(n="03"))
    for name in ("01_old.png", "01_old.json", "02_plot.png", "10_plot.png"):
        (root / "figures").mkdir(exist_ok=True)
        (root / "figures" / name).write_text("old")
    before = contents(root)
    return root, run(root, jobs=2), before, contents(root)


def test_a_failing_chapter_makes_the_status_1_and_the_others_continue(ran) -> None:
    _, status, before, after = ran
    assert status == 1
    assert after["notebooks/01_one.ipynb"] != before["notebooks/01_one.ipynb"]
    assert after["notebooks/03_three.ipynb"] != before["notebooks/03_three.ipynb"]


def test_a_failing_chapter_leaves_its_files_as_they_were(ran) -> None:
    _, _, before, after = ran
    own = [name for name in before | after if "/02" in name]
    assert own and all(before.get(name) == after.get(name) for name in own)


def test_figures_and_results_land_and_those_no_longer_made_go(ran) -> None:
    _, _, _, after = ran
    assert after["figures/01_plot.png"] == b"png"
    assert "data/results/03.json" in after
    assert "figures/01_old.png" not in after and "figures/01_old.json" not in after
    assert after["figures/10_plot.png"] == b"old"
    assert not [name for name in after if "measured" in name]


def test_nothing_of_the_run_stays_behind(ran) -> None:
    _, _, _, after = ran
    assert not [name for name in after if name.split("/")[0] not in ("notebooks", "figures", "data")]
    assert not [name for name in after if name.endswith(".new")]


def test_the_stored_notebook_is_executed_and_free_of_traces(ran) -> None:
    root, *_ = ran
    notebook = nbformat.read(root / "notebooks/01_one.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3]
    assert [output.text for output in code[2].outputs] == ["a b c 01_one.ipynb\n"]  # one piece, run in notebooks/
    assert "papermill" not in json.dumps(notebook) and "version" not in notebook.metadata.language_info
    assert [cell.metadata for cell in notebook.cells] == [{"tags": ["parameters"]}, {}, {}, {}]
    assert notebook.cells[-1].source == "half is 4.5<!--=half:.1f-->"


def test_a_second_run_touches_no_file(ran) -> None:
    root, *_ = ran
    before = {name: (root / name).stat().st_mtime_ns for name in contents(root)}
    assert run(root, ["1"]) == 0
    assert {name: (root / name).stat().st_mtime_ns for name in contents(root)} == before


def test_parameters_go_to_runs_and_measurements_to_their_place(ran) -> None:
    root, *_ = ran
    before = contents(root)
    assert run(root, ["03_three"], {"N": "12", "MEASURE": "1"}) == 0
    new = {name: text for name, text in contents(root).items() if before.get(name) != text}
    assert json.loads(new["runs/data/results/03.json"])["results"]["half"]["value"] == 6.0
    assert set(new) == {
        "data/results/measured/03_time.json",
        *(f"runs/{name}" for name in ("data/results/03.json", "figures/03_plot.json", "figures/03_plot.png")),
        "runs/notebooks/03_three.ipynb",
    }


def test_output_takes_everything_elsewhere(ran, tmp_path: Path) -> None:
    root, *_ = ran
    before = contents(root)
    assert run(root, ["03"], output=tmp_path) == 0
    assert contents(root) == before
    figures = {"figures/03_plot.png", "figures/03_plot.json"}
    assert set(contents(tmp_path)) == {"notebooks/03_three.ipynb", "data/results/03.json", *figures}


def test_a_failure_shows_chapter_cell_source_and_error(ran, capfd: pytest.CaptureFixture[str]) -> None:
    root, *_ = ran
    assert run(root, ["2"]) == 1
    said = capfd.readouterr()
    assert "02_two: cell In [3] failed" in said.err
    assert "    before / 0" in said.err and "ZeroDivisionError: division by zero" in said.err
    assert "\x1b" not in said.err
    assert said.out.splitlines()[0].split() == ["chapter", "seconds", "cells", "figures", "result"]
    assert said.out.splitlines()[1].split()[-1] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_kernels_and_leaves_the_files(number: signal.Signals, tmp_path: Path) -> None:
    source = write_notebook(
        tmp_path / "repo/notebooks/01_long.ipynb",
        WRITES.format(n="01"),
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))",
        "import time; time.sleep(120)",
    )
    before = contents(tmp_path / "repo")
    repo = str(tmp_path / "repo")
    # Where the tests run in the background, a shell has them ignore Ctrl-C, and their children would too.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heed}; import sys, pathlib; from qtools.suite.run import run; sys.exit(run(pathlib.Path({repo!r})))"
    runner = subprocess.Popen(
        [sys.executable, "-c", command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = psutil.Process(int((tmp_path / "pid").read_text()))
    os.kill(runner.pid, number)
    assert "interrupted" in runner.communicate(timeout=30)[1]
    assert runner.returncode == 130
    assert not kernel.is_running()
    assert contents(tmp_path / "repo") == before
    assert source.exists() and not list((tmp_path / "repo").glob(".qtools-staging-*"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_notebook(tmp_path / "notebooks/01_one.ipynb", "pass")
    write_notebook(tmp_path / "notebooks/12_twelve.ipynb", "pass")
    (tmp_path / "notebooks/scratch.ipynb").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ["1", "01", "01_one", "01_one.ipynb", "notebooks/01_one.ipynb"])
def test_a_chapter_has_five_names(name: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    assert [path.stem for path in find_chapters(small, [name, "1"])] == ["01_one"]
    assert [path.stem for path in find_chapters(small)] == ["01_one", "12_twelve"]


@pytest.mark.parametrize("name", ["2", "1_one", "scratch", "", "../x", "-1"])
def test_an_unknown_chapter_is_refused_with_the_known_ones(name: str, small: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown chapter '.*': choose from 01_one, 12_twelve"):
        run(small, [name])


def test_an_unknown_parameter_is_refused_with_the_known_ones(small: Path) -> None:
    with pytest.raises(UsageError, match="unknown parameter 'M': the chapters take MEASURE, N"):
        run(small, ["1"], {"M": "1"})


def test_output_into_the_repository_itself_is_refused(small: Path) -> None:
    with pytest.raises(UsageError, match="repository itself"):
        run(small, output=small)


def test_a_folder_without_chapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no numbered notebooks"):
        run(tmp_path)


def test_parameters_are_read_from_the_tagged_cell_only(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "x.ipynb", "OTHER = 1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "A = 1\nB: int = 2  # C = 3\nif A == 1:\n    D = 4\nA == 2"
    nbformat.write(notebook, path)
    assert parameters_of(path) == {"A", "B"}


def stage(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "stage" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stage" / name).write_text("new")
    return folder / "stage"


def test_a_chapter_of_the_others_results_runs_when_all_have_ended(tmp_path: Path) -> None:
    waits = "import time, pathlib; time.sleep(2)\n" + WRITES.format(n="02")
    path = write_notebook(tmp_path / "notebooks/01_one.ipynb", "open('../data/results/02.json').read()")
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["qtools"] = {"reads_results": True}
    nbformat.write(notebook, path)
    write_notebook(tmp_path / "notebooks/02_two.ipynb", waits)
    assert run(tmp_path, jobs=2) == 0


def test_a_file_of_another_chapter_is_refused_before_anything_moves(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"figures/02_x\.png"):
        publish(stage(tmp_path, "figures/01_x.png", "figures/02_x.png"), "01_one", tmp_path / "repo", tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_files_move_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, place: Path) -> None:
        if "b.png" in str(place):
            raise OSError("No space left on device")
        Path(place).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        publish(stage(tmp_path, "figures/01_a.png", "figures/01_b.png"), "01_one", tmp_path / "repo", tmp_path)
    assert contents(tmp_path / "repo") == {}


def tidied(tmp_path: Path, *outputs: nbformat.NotebookNode, prose: str = "", root: Path | None = None) -> list:
    path = tmp_path / "x.ipynb"
    cell = new_code_cell("1", id="c0", outputs=list(outputs), execution_count=1)
    nbformat.write(new_notebook(cells=[cell, new_markdown_cell(prose, id="p0")]), path)
    tidy(path, tmp_path / "none.json", root)
    return nbformat.read(path, as_version=4).cells[0].outputs


def test_a_widget_keeps_its_picture_and_loses_its_view(tmp_path: Path) -> None:
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "image/png": "AAAA", "text/plain": "w"}
    outputs = tidied(tmp_path, new_output("display_data", data=view))
    assert dict(outputs[0].data) == {"image/png": "AAAA", "text/plain": "w"}


def test_streams_of_two_kinds_stay_apart(tmp_path: Path) -> None:
    pieces = [("stdout", "a"), ("stdout", "b"), ("stderr", "c"), ("stdout", "d")]
    outputs = tidied(tmp_path, *(new_output("stream", name=name, text=text) for name, text in pieces))
    assert [(output.name, output.text) for output in outputs] == [("stdout", "ab"), ("stderr", "c"), ("stdout", "d")]


@pytest.mark.parametrize("text", ["{root}/data/x", "{home}/model", "{prefix}/lib/x.py:3", "<f at 0x7f12abcd>"])
def test_an_output_that_differs_elsewhere_is_refused(text: str, tmp_path: Path) -> None:
    text = text.format(root=tmp_path, home=Path.home(), prefix=sys.prefix)
    with pytest.raises(Failure, match=r"cell In \[1\] prints"):
        tidied(tmp_path, new_output("stream", name="stdout", text=text), root=tmp_path)
    tidied(tmp_path, new_output("stream", name="stdout", text=text))  # a run that is not committed may


def test_prose_that_names_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cell 2: the prose names the result 'gone'"):
        tidied(tmp_path, prose="1<!--=gone:.1f-->")


def test_a_chapter_that_leaves_without_an_error_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_notebook(tmp_path / "notebooks/04_exit.ipynb", "import sys\nsys.exit(0)", "print('never')")
    write_notebook(tmp_path / "notebooks/05_silent.ipynb", "print('no results')")
    (tmp_path / "data/results").mkdir(parents=True)
    (tmp_path / "data/results/05.json").write_text("{}")
    before = contents(tmp_path)
    assert run(tmp_path, jobs=2) == 1
    assert contents(tmp_path) == before
    said = capsys.readouterr().err
    assert "04_exit: stopped after" in said and "05_silent: wrote no data/results/05.json" in said


def test_files_already_moved_are_put_back_when_one_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, root = tmp_path / "stage", tmp_path / "root"
    for folder, text in ((stage, "new"), (root, "old")):
        for name in ("figures/01_a.png", "figures/01_b.png", "notebooks/01_x.ipynb"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    (stage / "figures/01_c.png").write_text("new")
    before, move = contents(root), os.replace

    def third_fails(source: Path, target: Path) -> None:
        if Path(target).name == "01_x.ipynb":
            raise PermissionError("not this one")
        move(source, target)

    monkeypatch.setattr(os, "replace", third_fails)
    with pytest.raises(PermissionError):
        publish(stage, "01_x", root, root)
    assert contents(root) == before
