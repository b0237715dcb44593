"""The ledger: every claim with its verdict, evaluated anew from what all chapters left; and as a page."""

from __future__ import annotations

import ast
import base64
import json
import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from qtools._files import replace_file
from qtools.suite import claims
from qtools.suite.results import ROOT

REPORT = "report.html"
SIGNS = {"holds": "✓", "holds when": "◐", "fails": "✗", "needs a phone": "?"}
FURTHEST = 1000.0  # a verdict that stands when a result is so many times larger or smaller hangs on something else


@dataclass(frozen=True)
class Entry:
    """One claim, the verdict that follows from its chapter's results, and the cell that pronounces it."""

    claim: claims.Claim
    verdict: str
    says: str
    results: Mapping[str, float]
    sources: tuple[str, ...]
    chapter: int
    notebook: str
    cell: str

    @property
    def link(self) -> str:
        """Address of the cell, from the repository's folder; JupyterLab scrolls there."""
        return f"notebooks/{self.notebook}#cell-id={self.cell}"


def entries(root: Path = ROOT) -> list[Entry]:
    """Every claim that a chapter judges, in the claims' order.

    Raises
    ------
    ValueError
        If a stored verdict no longer follows from its chapter's results, or a chapter judged without leaving results.
    """
    known, found = claims.load(root / "data/claims.yaml"), {}
    for notebook in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        for identity, cell in _judging(notebook):
            found[identity] = _entry(known[identity], notebook, cell, root)
    return [found[identity] for identity in sorted(found)]


def _judging(notebook: Path) -> list[tuple[str, str]]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}
    return [
        (identity, cell)
        for cell, source in sources.items()
        for call in re.findall(r"chapter\.judge\(([^)]*)\)", source)
        for identity in re.findall(r"C\d\d", call)
    ]


def _entry(claim: claims.Claim, notebook: Path, cell: str, root: Path) -> Entry:
    number = int(notebook.name[:2])
    path = root / f"data/results/{number:02d}.json"
    if not path.is_file():
        raise ValueError(f"{claim.id} is judged by chapter {number}, which left no results: qtools run {number}")
    stored = json.loads(path.read_text(encoding="utf-8"))
    values = {key: entry["value"] for key, entry in stored["results"].items()}
    verdict = claims.evaluate(claim, values)
    if verdict != stored["verdicts"].get(claim.id):
        raise ValueError(
            f"the verdict of {claim.id} does not follow from chapter {number}'s results: qtools run {number}"
        )
    sources = {stored["results"][key]["source"] for key in _named(claim) if key in stored["results"]}
    where = {"chapter": number, "notebook": notebook.name, "cell": cell}
    return Entry(claim, **verdict, results=values, sources=tuple(sorted(sources)), **where)


def _named(claim: claims.Claim) -> set[str]:
    """Every result that the claim's conditions or sentences name."""
    names: set[str] = set()
    for possible in claim.verdicts:
        names |= {node.id for node in ast.walk(ast.parse(possible.when)) if isinstance(node, ast.Name)}
        names |= {field for _, field, _, _ in string.Formatter().parse(possible.says) if field}
    return names


def count(found: Sequence[Entry]) -> dict[str, int]:
    """How many claims got each verdict, all kinds listed."""
    return {kind: sum(entry.verdict == kind for entry in found) for kind in claims.KINDS}


class Margin(NamedTuple):
    """The factor on one result, the others staying as they are, at which a verdict becomes another one."""

    key: str
    factor: float
    verdict: str


def margins(entry: Entry) -> list[Margin]:
    """How firm a verdict is: for each result that its conditions weigh, the factors that turn it, nearest first.

    Results that a condition compares with ``==`` or ``!=`` are answers, not sizes, and stay.  An empty list means that
    no factor up to `FURTHEST` turns the verdict.  Found in steps of 1.6 times the logarithm, then by halving: what
    turns and turns back within one step is overlooked.
    """
    keys = sorted(_weighed(entry.claim) & entry.results.keys())
    found = [_turning(entry, key, sign) for key in keys for sign in (1, -1)]
    return sorted((one for one in found if one), key=lambda one: abs(math.log(one.factor)))


def verdict_with(entry: Entry, changed: Mapping[str, float]) -> str:
    """The verdict if some results were other numbers; ``"none"`` where no condition would be true."""
    try:
        return claims.evaluate(entry.claim, {**entry.results, **changed})["verdict"]
    except ValueError:
        return "none"


def _weighed(claim: claims.Claim) -> set[str]:
    sizes: set[str] = set()
    answers: set[str] = set()
    for possible in claim.verdicts:
        for node in ast.walk(ast.parse(possible.when)):
            if isinstance(node, ast.Compare):
                names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
                (answers if any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops) else sizes).update(names)
    return sizes - answers


def _turning(entry: Entry, key: str, sign: int) -> Margin | None:
    def verdict(log: float) -> str:
        return verdict_with(entry, {key: entry.results[key] * math.exp(sign * log)})

    near, far = 0.0, 1e-3
    while verdict(far) == entry.verdict:
        if far >= math.log(FURTHEST):
            return None
        near, far = far, min(1.6 * far, math.log(FURTHEST))
    while far - near > 1e-3 * far:
        middle = (near + far) / 2
        near, far = (middle, far) if verdict(middle) == entry.verdict else (near, middle)
    return Margin(key, math.exp(sign * far), verdict(far))


def report(root: Path = ROOT, path: Path | None = None) -> Path:
    """Write the ledger as one HTML file that needs nothing beside it, and return its path.

    Raises
    ------
    ValueError
        As `entries`.
    """
    import jinja2

    found = entries(root)
    templates = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = templates.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    pictures = {entry.claim.id: _picture(root, entry) for entry in found}
    page = template.render(entries=found, counts=count(found), titles=_titles(root), pictures=pictures, signs=SIGNS)
    target = path or root / REPORT
    replace_file(target, page.encode())
    return target


def _titles(root: Path) -> dict[int, str]:
    found = {}
    for notebook in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
        found[int(notebook.name[:2])] = re.sub(r"^# \d+ · ", "", first.splitlines()[0])
    return found


def _picture(root: Path, entry: Entry) -> dict[str, Any] | None:
    """The figure that shows why, as data; its numbers' sidecar has the text that stands for it."""
    if entry.claim.figure is None:
        return None
    stem = root / f"figures/{entry.claim.figure}"
    alt = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["alt"]
    return {"data": base64.b64encode(stem.with_suffix(".png").read_bytes()).decode(), "alt": alt}
