"""What must be true of a stored chapter and what comparing its outputs with a new run would let pass.

`problems` lists, in words, all that is wrong with one notebook and its figures, results and prose.
"""

import ast
import base64
import hashlib
import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from qtools.suite import prose

TAGS = {"parameters", "htp", "nbval-ignore-output"}
IGNORE_BUDGET = 3  # cells of a chapter whose output is not compared: widgets only
LONGEST_CELL, MEDIAN_CELL = 25, 8
SILENT = {"record_all"}  # calls that end a cell and show nothing

Cell = dict[str, Any]


def problems(notebook: Path, root: Path, allowed: dict[str, int]) -> list[str]:
    """Everything wrong with a chapter; an empty list if nothing is.

    Parameters
    ----------
    notebook : path
        Of the stored chapter.
    root : path
        Of the repository, with figures/ and data/results/.
    allowed : dict
        How often each number may stand in the prose without a result behind it.
    """
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = content["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    results = json.loads((root / f"data/results/{notebook.stem[:2]}.json").read_text(encoding="utf-8"))["results"]
    return [
        *_execution(code),
        *_outputs(code),
        *_figures(code, notebook.stem[:2], root),
        *_prose(cells, results, allowed),
        *_shape(cells, code),
        *_links(cells, notebook),
        *(["widget state is stored"] if "widgets" in content["metadata"] else []),
    ]


def source(cell: Cell) -> str:
    return "".join(cell["source"])


def _execution(code: list[Cell]) -> list[str]:
    counts = [cell["execution_count"] for cell in code]
    return [] if counts == list(range(1, len(code) + 1)) else [f"execution counts are {counts}"]


def _outputs(code: list[Cell]) -> list[str]:
    found = []
    for number, cell in enumerate(code, 1):
        if _shows(source(cell)) and not cell["outputs"]:
            found.append(f"cell {number} shows something, but no output is stored")
        for output in cell["outputs"]:
            if output.get("name") == "stderr" or output["output_type"] == "error":
                found.append(f"cell {number} holds stderr or an error")
            text = _text(output)
            if re.search(r"(?<![\w/.])/(?:home|root|tmp|Users|usr|opt|work)/|[A-Z]:\\\\", text):
                found.append(f"cell {number} prints an absolute path")
            long = [word for word in re.findall(r"(?<![\w.])\d+\.\d+(?:e[-+]?\d+)?", text) if _digits(word) > 3]
            if long and "text/markdown" not in output.get("data", {}):
                found.append(f"cell {number} prints more than three significant digits: {', '.join(long)}")
    return found


def _shows(text: str) -> bool:
    """Whether a cell prints, or ends in an expression that has a value."""
    body = ast.parse(text).body
    if any(isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print" for s in body for n in _own_nodes(s)):
        return True
    last = body[-1] if body else None
    if not isinstance(last, ast.Expr):
        return False
    return not (isinstance(last.value, ast.Call) and getattr(last.value.func, "attr", "") in SILENT)


def _own_nodes(statement: ast.stmt) -> list[ast.AST]:
    return [] if isinstance(statement, ast.FunctionDef | ast.ClassDef) else list(ast.walk(statement))


def _text(output: dict[str, Any]) -> str:
    parts = [output.get("text", "")]
    parts += [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join("".join(part) for part in parts)


def _digits(number: str) -> int:
    return len(number.split("e")[0].replace(".", "").strip("0"))


def _figures(code: list[Cell], number: str, root: Path) -> list[str]:
    found, shown = [], set()
    files = {path.stem: path for path in (root / "figures").glob(f"{number}_*.png")}
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest(): name for name, path in files.items()}
    for cell in code:
        for output in cell["outputs"]:
            if (image := output.get("data", {}).get("image/png")) is not None:
                digest = hashlib.sha256(base64.b64decode("".join(image))).hexdigest()
                shown.add(hashes.get(digest, ""))
                if digest not in hashes:
                    found.append(f"the picture of cell {cell['execution_count']} equals no file of figures/")
                elif f'"{hashes[digest][3:].removeprefix("live_")}"' not in source(cell):
                    found.append(f"cell {cell['execution_count']} shows {hashes[digest]}, which it does not draw")
    for name, path in files.items():
        sidecar = path.with_suffix(".json")
        if not sidecar.is_file():
            found.append(f"{name} has no sidecar")
        elif json.loads(sidecar.read_text())["png_sha256"] != hashlib.sha256(path.read_bytes()).hexdigest():
            found.append(f"{name}.png is not the picture that its sidecar describes")
    return found + [f"{name} is shown nowhere" for name in files if name not in shown]


def _prose(cells: list[Cell], results: dict[str, Any], allowed: dict[str, int]) -> list[str]:
    found, loose = [], Counter()
    for cell in cells:
        if cell["cell_type"] != "markdown":
            continue
        text = source(cell)
        loose += prose.untied(text)
        for _, key, _ in prose.tied(text):
            if key not in results:
                found.append(f"the prose names {key!r}, which is no result")
        if not found and prose.fill(text, results) != text:
            stale = [number for number, _, _ in prose.tied(text)]
            found.append(f"a number in the prose is not its result: one of {', '.join(stale)}")
    extra, missing = loose - Counter(allowed), Counter(allowed) - loose
    found += [f"the number {n} stands in the prose {k} times more than allowed" for n, k in extra.items()]
    return found + [f"the number {n} stands in the prose {k} times less than listed" for n, k in missing.items()]


def _shape(cells: list[Cell], code: list[Cell]) -> list[str]:
    found = []
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    if unknown := set(tags) - TAGS:
        found.append(f"unknown tags: {unknown}")
    if tags.count("nbval-ignore-output") > IGNORE_BUDGET:
        found.append(f"more than {IGNORE_BUDGET} cells are not compared")
    if any("nbval-ignore-output" in cell["metadata"].get("tags", []) and ".live(" not in source(cell) for cell in code):
        found.append("only a cell that shows a widget may go uncompared")
    if "NBVAL" in "".join(source(cell) for cell in code):
        found.append("a comment switches the comparison off")
    if code[0]["metadata"].get("tags") != ["parameters"]:
        found.append("the first code cell is not the one with the parameters")
    if not source(code[-1]).rstrip().endswith(".finish()"):
        found.append("the last cell does not finish the chapter")
    if not any(".live(" in source(cell) for cell in code):
        found.append("nothing to move with the mouse")
    lengths = [source(cell).count("\n") + 1 for cell in code]
    if max(lengths) > LONGEST_CELL or statistics.median(lengths) > MEDIAN_CELL:
        found.append(f"cells are long: median {statistics.median(lengths)}, longest {max(lengths)} lines")
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    rounds = re.split(r"^## Six (?:more )?questions$", text, flags=re.M)[1:]  # a chapter of two halves has two
    if not rounds or text.count("<summary>Solution</summary>") != 3 * len(rounds):
        found.append("there are not three exercises with a solution")
    if any(len(re.findall(r"^\d\. ", part, re.M)) != 6 for part in rounds):
        found.append("there are not six questions")
    return found


def _links(cells: list[Cell], notebook: Path) -> list[str]:
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    headings = {line.lstrip("#").strip().replace(" ", "-") for line in re.findall(r"^#+ .*", text, re.M)}
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            if target[1:] not in headings:
                found.append(f"the link {target} leads to no heading")
        elif "://" not in target and not (notebook.parent / target.split("#")[0]).exists():
            found.append(f"the link {target} leads to no file")
    return found
