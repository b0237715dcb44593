"""Every stored chapter is whole, and every way of spoiling one that a new run would not notice is noticed."""

import base64
import configparser
import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from qtools import affine, metrics
from qtools.suite import plots, prose
from qtools.suite.exercises import exercise
from tests.guards import problems, source

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ALLOWED = json.loads((ROOT / "tests/prose_numbers.json").read_text())
ALLOWED_PER_CHAPTER = 160  # loose numbers; the list is to stay short
SANITIZER = ROOT / "tests/nbval_sanitize.cfg"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_nothing_is_wrong_with_the_stored_chapter(chapter):
    assert problems(chapter, ROOT, ALLOWED[chapter.stem]) == []


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_the_list_of_loose_numbers_stays_short(chapter):
    assert sum(ALLOWED[chapter.stem].values()) <= ALLOWED_PER_CHAPTER


def test_numbers_and_code_of_the_readme_are_right():
    readme = (ROOT / "README.md").read_text()
    results = {}
    for file in (ROOT / "data/results").glob("[0-9][0-9].json"):
        results |= json.loads(file.read_text())["results"]
    assert len(prose.tied(readme)) >= 4
    assert prose.fill(readme, results) == readme
    for code in re.findall(r"```python\n(.*?)```", readme, re.S):
        exec(code, {})


def test_the_readme_gives_every_verdict_as_it_was_computed():
    rows = dict(
        re.findall(
            r"^\| (C\d\d) .*?\| (holds when|holds|fails|needs a phone)\b", (ROOT / "README.md").read_text(), re.M
        )
    )
    verdicts = {}
    for file in (ROOT / "data/results").glob("[0-9][0-9].json"):
        verdicts |= {key: entry["verdict"] for key, entry in json.loads(file.read_text())["verdicts"].items()}
    assert rows == verdicts


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_solutions_solve_the_exercises_and_nothing_else_does(chapter):
    cells = json.loads(chapter.read_text())["cells"]
    markdown = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    solutions = re.findall(r"<summary>Solution</summary>\s*```python\n(.*?)```", markdown, re.S)
    numbers = re.findall(
        r'exercise\("([\d.]+)", (\w+)\)', "\n".join(source(c) for c in cells if c["cell_type"] == "code")
    )
    assert len(solutions) == len(numbers) and len(numbers) in (3, 6)
    for solution, (number, name) in zip(solutions, numbers, strict=True):
        scope = {"np": np, "plots": plots, "metrics": metrics} | vars(affine)
        exec(solution, scope)
        solve = scope[name]
        assert exercise(number, solve) == f"Exercise {number}: right!"
        assert exercise(number, lambda *given: None) == f"Exercise {number}: waiting for your code."
        assert "not yet" in exercise(number, lambda *given, solve=solve: _wrong(solve(*given)))
        assert "stopped with ZeroDivisionError" in exercise(number, lambda *given: 1 / 0)


def _wrong(answer):
    return (answer[0] * 1.1, answer[1]) if isinstance(answer, tuple) else answer * 3 + 1


@pytest.fixture
def copied(tmp_path):
    """A copy of chapter 1 and what belongs to it, and a way to spoil its notebook."""
    chapter = CHAPTERS[0]
    for folder in ("figures", "data/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "notebooks").mkdir()
    original = json.loads(chapter.read_text())

    def problems_after(spoil) -> list[str]:
        content = copy.deepcopy(original)
        spoil(content, [cell for cell in content["cells"] if cell["cell_type"] == "code"])
        path = tmp_path / "notebooks" / chapter.name
        path.write_text(json.dumps(content))
        for linked in (ROOT / "notebooks").iterdir():
            if linked.is_file() and linked.name != chapter.name:
                shutil.copy(linked, path.parent)
        return problems(path, tmp_path, ALLOWED[chapter.stem])

    assert problems_after(lambda content, code: None) == []
    problems_after.root = tmp_path
    return problems_after


def _pictures(code):
    return [o["data"] for cell in code for o in cell["outputs"] if "image/png" in o.get("data", {})]


def swap_two_figures(content, code):
    first, second = _pictures(code)[:2]
    first["image/png"], second["image/png"] = second["image/png"], first["image/png"]


def paste_another_figure(content, code):
    _pictures(code)[0]["image/png"] = base64.b64encode(b"another picture").decode()


def strip_all_outputs(content, code):
    for cell in code:
        cell["outputs"] = []


def strip_one_output(content, code):
    next(cell for cell in code if "print(" in source(cell))["outputs"] = []


def never_run_a_cell(content, code):
    code[3]["execution_count"] = None


def run_out_of_order(content, code):
    code[3]["execution_count"], code[4]["execution_count"] = 5, 4


def add_stderr(content, code):
    code[5]["outputs"].append({"output_type": "stream", "name": "stderr", "text": ["warning"]})


def edit_a_tied_number(content, code):
    _edit(content, r"\d(?=<!--=)")


def edit_a_loose_number(content, code):
    _edit(content, r"(?<=\b25)6(?= codes)")


def tie_to_an_unknown_result(content, code):
    _edit(content, r"(?<=<!--=)\w", "9")


def _edit(content, pattern, new="7"):
    for cell in content["cells"]:
        text = source(cell)
        if cell["cell_type"] == "markdown" and re.search(pattern, text):
            old = re.search(pattern, text)[0]
            cell["source"] = re.sub(pattern, "8" if old == new else new, text, count=1)
            return
    raise AssertionError(f"nothing to edit: {pattern}")


def ignore_another_cell(content, code):
    code[4]["metadata"]["tags"] = ["nbval-ignore-output"]


def skip_a_cell(content, code):
    code[4]["metadata"]["tags"] = ["nbval-skip"]


def ignore_by_comment(content, code):
    code[4]["source"] = ["# NBVAL_IGNORE_OUTPUT\n", *code[4]["source"]]


def print_a_path(content, code):
    code[5]["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["/home/me/course"]})


def print_too_many_digits(content, code):
    code[5]["outputs"].append({"output_type": "stream", "name": "stdout", "text": ["0.12345"]})


def store_widget_state(content, code):
    content["metadata"]["widgets"] = {"state": {}}


def break_a_link(content, code):
    content["cells"][0]["source"] = [*content["cells"][0]["source"], "\n[gone](99_nowhere.ipynb)"]


def drop_the_last_cell(content, code):
    content["cells"].remove(code[-1])


@pytest.mark.parametrize(
    "spoil",
    [
        swap_two_figures, paste_another_figure, strip_all_outputs, strip_one_output, never_run_a_cell, run_out_of_order,
        add_stderr, edit_a_tied_number, edit_a_loose_number, tie_to_an_unknown_result, ignore_another_cell, skip_a_cell,
        ignore_by_comment, print_a_path, print_too_many_digits, store_widget_state, break_a_link, drop_the_last_cell,
    ],
)  # fmt: skip
def test_a_spoilt_notebook_is_noticed(copied, spoil):
    assert copied(spoil) != []


def test_a_spoilt_figure_file_is_noticed(copied):
    first, second, *_ = sorted((copied.root / "figures").glob("01_*.png"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert any("sidecar" in problem for problem in copied(lambda content, code: None))


def test_the_sanitizer_file_does_what_it_says():
    # A blank line or trailing blank inside a pair would switch the pair off without a word.
    lines = SANITIZER.read_text().splitlines()
    assert all(line == line.rstrip() for line in lines)
    parser = configparser.RawConfigParser()
    parser.read(SANITIZER)
    assert parser.sections() == ["memory addresses"]
    for section in parser.sections():
        assert set(parser[section]) == {"regex", "replace"}
    pair = parser["memory addresses"]
    assert re.sub(pair["regex"], pair["replace"], "<object at 0x7f61aa00ffee>") == "<object at ADDRESS>"
    assert re.sub(pair["regex"], pair["replace"], "0xff") == "0xff"


def test_figures_refuse_to_go_without_title_or_label():
    from qtools.suite import figures

    figure, ax = figures.new()
    ax.plot([1, 2])
    with pytest.raises(ValueError, match="title"):
        figures.render(figure)
    ax.set(title="a finding", xlabel="time (s)")
    with pytest.raises(ValueError, match="label"):
        figures.render(figure)
    ax.set_ylabel("length (m)")
    ax.set_title("a finding so long that it does not fit above the picture, " * 3)
    with pytest.raises(ValueError, match="wider than its picture"):
        figures.render(figure)
    ax.set_title("a finding")
    png, sidecar = figures.render(figure)
    assert png.startswith(b"\x89PNG")
    assert sidecar["axes"][0]["lines"][0]["xy"] == [[0, 1], [1, 2]]
    assert sidecar["axes"][0]["x"]["label"] == "time (s)"


CHANGES = {
    "line": lambda ax, v: ax.plot([1, v]),
    "bar": lambda ax, v: ax.bar([0, 1], [1, v]),
    "bar's foot": lambda ax, v: ax.bar([0, 1], [1, 1], bottom=[0, v]),
    "lying bar": lambda ax, v: ax.barh([0, v], [1, 1]),
    "image": lambda ax, v: ax.imshow([[1, v]]),
    "colour scale": lambda ax, v: ax.imshow([[1, 2]], vmax=v),
    "area": lambda ax, v: ax.fill_between([0, 1], [1, v]),
    "steps": lambda ax, v: ax.stairs([1, v]),
    "edge": lambda ax, v: ax.stairs([1, 2], [0, 1, v]),
    "point": lambda ax, v: ax.scatter([0, 1], [1, v]),
    "point's colour": lambda ax, v: ax.scatter([0, 1], [1, 1], c=[0, v]),
    "text": lambda ax, v: ax.text(0, 0, f"{v}"),
    "text's place": lambda ax, v: ax.text(0, v, "here"),
    "tick label": lambda ax, v: ax.set_xticks([0, 1], ["a", f"{v}"]),
    "limit": lambda ax, v: ax.set_ylim(0, v),
    "scale": lambda ax, v: ax.set_yscale("log" if v > 2 else "linear"),
    "label": lambda ax, v: ax.set_xlabel(f"{v}"),
    "colour": lambda ax, v: ax.plot([0, 1], color="red" if v > 2 else "blue"),
    "small beside large": lambda ax, v: ax.plot([0, 1e6], [0.5, v / 10]),
    "legend": lambda ax, v: (ax.plot([0, 1], label=f"{v}"), ax.legend()),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_figure_is_noticed(kind):
    from qtools.suite import figures

    def sidecar(value):
        figure, ax = figures.new()
        ax.set(title="t", xlabel="x", ylabel="y")
        CHANGES[kind](ax, value)
        return json.loads(json.dumps(figures.render(figure)[1], allow_nan=False))

    figures.compare(sidecar(2.0), sidecar(2.0), "same")
    with pytest.raises(AssertionError, match="figure other"):
        figures.compare(sidecar(2.05), sidecar(2.0), "other")
    with pytest.raises(AssertionError, match="not committed"):
        figures.compare(sidecar(2.0), None, "new")


def test_a_slider_draws_the_figure_again():
    import ipywidgets

    from qtools.suite import figures

    def draw(figure, n):
        figure.subplots().set(title=f"{n}", xlabel="x", ylabel="y")

    live = figures.Live(draw, {"n": ipywidgets.IntSlider(1, 0, 5)})
    before = live.image.value
    live.controls["n"].value = 3
    assert live.image.value != before
    with contextlib.redirect_stdout(io.StringIO()):
        assert "image/png" in live._repr_mimebundle_()[0]
