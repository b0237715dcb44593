"""A notebook as a file: what it takes, how far it has run, where it failed, and how it looks when it is stored."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from qtools.suite import prose

# What papermill leaves, and what nbstripout's own command strips besides: how a notebook happened to be on the screen.
_EXTRA_KEYS = [
    *(f"metadata.{name}" for name in ("papermill", "signature", "widgets", "language_info.version")),
    *(f"cell.metadata.{name}" for name in ("papermill", "execution", "ExecuteTime", "collapsed", "hidden", "scrolled")),
]
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_TAIL_LINES = 8


class Failure(Exception):
    """A chapter did not succeed; the message says where and why."""


def parameters_of(path: Path) -> set[str]:
    """List the names that the notebook's cell tagged ``parameters`` sets."""
    cells = _read(path).cells
    source = "\n".join(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
    return set(re.findall(r"^(\w+)\s*(?::[^=\n]+)?=(?!=)", source, re.MULTILINE))


def reads_results(path: Path) -> bool:
    """Whether it reads what other chapters leave: its metadata say ``{"qtools": {"reads_results": true}}``."""
    return bool(_read(path).metadata.get("qtools", {}).get("reads_results"))


def code_cells(path: Path) -> int:
    """Count the cells that will be executed."""
    return sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in _read(path).cells)


def cells_done(path: Path, known: int = 0) -> int:
    """Count the cells executed so far; `known` when the file is just being written."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError):
        return known
    return sum(cell.get("execution_count") is not None for cell in cells if cell["cell_type"] == "code")


def failure(path: Path, log: Path) -> Failure:
    """Say which cell failed, with its source and the last lines of the error."""
    try:
        cells = [cell for cell in _read(path).cells if cell.cell_type == "code"]
    except (OSError, ValueError):  # killed while it was being written, or before
        cells = []
    for cell in cells:
        state = cell.metadata.get("papermill", {})
        if state.get("exception") or state.get("status") == "running":
            errors = [output for output in cell.outputs if output.output_type == "error"]
            lines = "\n".join(errors[-1].traceback).splitlines() if errors else _lines(log)
            number = cell.execution_count or sum(bool(c.execution_count) for c in cells) + 1
            return Failure(f"cell In [{number}] failed\n{_indented(cell.source)}\n{_last(lines)}")
    return Failure(f"papermill failed\n{_last(_lines(log))}")


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _last(lines: list[str]) -> str:
    return "\n".join(_ANSI.sub("", line) for line in lines[-_TAIL_LINES:])


def _indented(source: str) -> str:
    return "\n".join(f"    {line}" for line in source.splitlines())


def tidy(path: Path, results: Path, root: Path | None) -> None:
    """Rewrite an executed notebook as it is stored: the same bytes whenever the same things were computed.

    Removes what papermill and widgets left, joins the pieces of a stream, and fills the prose from the results.

    Parameters
    ----------
    path : Path
        The executed notebook, rewritten in place.
    results : Path
        The chapter's fresh results; need not exist where the prose names none.
    root : Path or None
        The repository, for a notebook that will be committed: its outputs may then hold no path of this computer.

    Raises
    ------
    Failure
        The prose names a result that is not there, or an output would differ on another computer.
    """
    from nbstripout import strip_output

    notebook = strip_output(_read(path), keep_output=True, keep_count=True, keep_id=True, extra_keys=_EXTRA_KEYS)
    values = json.loads(results.read_text(encoding="utf-8"))["results"] if results.exists() else {}
    for number, cell in enumerate(notebook.cells, 1):
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]  # papermill's empty list
        if cell.cell_type == "markdown":
            cell.source = _filled(cell.source, values, f"cell {number}")
        elif cell.cell_type == "code":
            cell.outputs = _joined([_without_view(output) for output in cell.outputs])
            if root:
                _check_portable(cell, root)
    nbformat.validate(notebook)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        nbformat.write(notebook, file)


def _read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def _filled(source: str, values: dict[str, Any], where: str) -> str:
    try:
        return prose.fill(source, values)
    except (KeyError, ValueError) as error:
        raise Failure(f"{where}: {error.args[0]}") from None


def _without_view(output: NotebookNode) -> NotebookNode:
    # Widget state is not stored, so a view would show nothing: the picture and text beside it do.
    output.get("data", {}).pop(_WIDGET_VIEW, None)
    return output


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Join neighbouring pieces of one stream: where the kernel cut it is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == "stream" and joined[-1].get("name") == output.name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _check_portable(cell: NotebookNode, root: Path) -> None:
    folders = "|".join(re.escape(f"{folder}") for folder in (root, sys.prefix, Path.home()) if len(f"{folder}") > 1)
    for text in _texts(cell.outputs):
        if found := re.search(rf"(?:{folders})[/\\]\S*|\bat 0x[0-9a-f]{{6,}}|/tmp/ipykernel_\S*", text):
            raise Failure(f"cell In [{cell.execution_count}] prints '{found[0]}', which differs on another computer")


def _texts(outputs: list[NotebookNode]) -> Iterator[str]:
    for output in outputs:
        yield output.get("text", "")
        yield from output.get("traceback", [])
        yield from (str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))
