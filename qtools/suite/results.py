"""What a chapter leaves behind: results with their source, figures with their numbers, verdicts.

A notebook makes one `Chapter` and hands it every number worth keeping.  Read in JupyterLab that changes nothing on
disk.  Under ``qtools run`` the environment variable ``QTOOLS_OUT`` names a folder, and everything is written there;
under the tests ``QTOOLS_CHECK=1`` makes every call compare with what is committed, so that a changed number fails in
the very cell that made it.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from qtools._files import replace_file

ROOT = Path(__file__).resolve().parents[2]
Source = Literal["computed", "simulated", "HTP backend (emulated)", "published", "measured here"]
HTP: Source = "HTP backend (emulated)"


class Chapter:
    """The results of one chapter.

    Parameters
    ----------
    number : int
        Of the chapter, 1 to 99; files are named after it.
    root : path, optional
        Repository with the committed results; by default the one this package lies in.
    """

    def __init__(self, number: int, root: Path | str = ROOT) -> None:
        self.number = number
        self.root = Path(root)
        self.results: dict[str, dict[str, Any]] = {}
        self.verdicts: dict[str, dict[str, str]] = {}
        self.figures: list[str] = []
        self._out = Path(os.environ["QTOOLS_OUT"]) if os.environ.get("QTOOLS_OUT") else None
        self._check = os.environ.get("QTOOLS_CHECK") == "1"
        self._committed: dict[str, Any] = _read_json(self.root / self._path) or {"results": {}, "verdicts": {}}

    @property
    def _path(self) -> str:
        return f"data/results/{self.number:02d}.json"

    def record(
        self, key: str, value: float, *, source: Source = "computed", rtol: float | None = None, atol: float = 0.0
    ) -> float:
        """Keep a number under a name, with where it comes from and how far another machine may be off.

        Without a tolerance a whole number must come out the same, any other number within one part in a thousand.

        Returns
        -------
        float
            `value`, so that the call can stand in an expression.

        Raises
        ------
        ValueError
            If the key is taken or malformed, the source unknown, or the value not a finite number.
        AssertionError
            Under the tests, if the committed value is another one.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key):
            raise ValueError(f"a result's name is lower_case_with_underscores, got {key!r}")
        if key in self.results:
            raise ValueError(f"result {key!r} is recorded twice")
        if source not in get_args(Source):
            raise ValueError(f"source must be one of {get_args(Source)}, got {source!r}")
        number = _plain_number(key, value)
        if rtol is None:
            rtol = 0.0 if isinstance(number, int) else 1e-3
        entry = {"value": number, "source": source, "rtol": rtol} | ({"atol": atol} if atol else {})
        self.results[key] = entry
        if self._check:
            self._compare(key, entry)
        return value

    def record_all(self, values: Mapping[str, float], **options: Any) -> None:
        """`record` several numbers that share source and tolerance."""
        for key, value in values.items():
            self.record(key, value, **options)

    def on_htp(
        self, measure: Callable[[], Mapping[str, float]], *, rtol: float | None = None, atol: float = 0.0
    ) -> dict[str, float]:
        """Numbers from the HTP backend; where it is absent, those of the committed run, with a line that says so.

        Parameters
        ----------
        measure : callable
            Returns result names and numbers; its name marks the group they are kept under.
        rtol, atol : float
            See `record`.

        Raises
        ------
        RuntimeError
            If the backend is absent and nothing is committed: no number is made up.
        """
        from qtools.npu import htp

        found, group = htp.status(), measure.__name__
        if found.available:
            values = {key: float(value) for key, value in measure().items()}
            for key, value in values.items():
                self.record(key, value, source=HTP, rtol=rtol, atol=atol)
                self.results[key] |= {"group": group, "with": found.reason}
            return values
        kept = {k: e for k, e in self._committed["results"].items() if e.get("group") == group}
        if not kept:
            raise RuntimeError(f"{found.reason}, and no earlier run of {group!r} is committed")
        self.results |= kept
        version = next(iter(kept.values()))["with"]
        print(
            f"HTP backend: {found.reason}. Not verified here; shown is what {version} gave when the chapter was made."
        )
        return {key: entry["value"] for key, entry in kept.items()}

    def measured(
        self,
        name: str,
        measure: Callable[[], Mapping[str, float]],
        *,
        again: bool = False,
        source: Source = "measured here",
    ) -> dict[str, Any]:
        """Timings of one computer, or what takes too long to do each time: read from ``data/results/measured``.

        If `again`, taken anew and written there.

        Returns
        -------
        dict
            ``values`` (name to number), ``cpu``, ``date``.
        """
        path = f"data/results/measured/{self.number:02d}_{name}.json"
        if again:
            taken = {"values": dict(measure()), "cpu": _cpu(), "date": datetime.date.today().isoformat()}
            self._write(path, _json(taken))
        else:
            taken = _read_json(self.root / path)
            if taken is None:
                raise FileNotFoundError(f"{path} is not there: run the chapter once with -p MEASURE=1")
        for key, value in taken["values"].items():
            self.results[key] = {"value": value, "source": source}
            if self._check and self.results[key] != self._committed["results"].get(key):
                raise AssertionError(
                    f"{path} has {key} = {value}, the committed results another: run the chapter again"
                )
        return taken

    def figure(self, figure: Any, name: str, alt: str = "") -> Any:
        """Show a matplotlib figure, and keep it as PNG beside the numbers it plots.

        Returns
        -------
        IPython.display.Image
            Exactly the bytes of the file.

        Raises
        ------
        ValueError
            If an axis has no label or the figure no title.
        AssertionError
            Under the tests, if the plotted numbers are not the committed ones.
        """
        from IPython.display import Image

        from qtools.suite import figures

        png, plotted = self._keep(figure, name, alt)
        return Image(data=png, alt=plotted["alt"], width=figures.WIDTH)

    def live(self, name: str, draw: Callable[..., None], alt: str = "", **controls: Any) -> Any:
        """A figure with sliders: ``draw(figure, **values)`` is called again whenever one moves.

        Where no kernel runs (the committed notebook, a web page) the first picture stands in for it.
        """
        from qtools.suite import figures

        widget = figures.Live(draw, controls)
        widget.picture = self._keep(widget.figure, f"live_{name}", alt)[0]
        return widget

    def article(self, identity: str) -> dict[str, float]:
        """The numbers that the article prints for a claim, from ``data/claims.yaml``."""
        from qtools.suite import claims

        return claims.load(self.root / "data/claims.yaml")[identity].article

    def judge(self, *ids: str) -> Any:
        """Evaluate claims of ``data/claims.yaml`` on the results so far; a table of verdicts."""
        from qtools.suite import claims

        known = claims.load(self.root / "data/claims.yaml")
        values = {key: entry["value"] for key, entry in self.results.items()}
        for identity in ids:
            self.verdicts[identity] = claims.evaluate(known[identity], values)
            if self._check and self.verdicts[identity] != self._committed["verdicts"].get(identity):
                raise AssertionError(f"verdict of {identity} differs from the committed one: {self.verdicts[identity]}")
        return claims.table([known[i] for i in ids], self.verdicts)

    def finish(self) -> None:
        """Write the results; under the tests, fail if a committed result, verdict or figure was not made again."""
        if self._check:
            missing = set(self._committed["results"]) - set(self.results)
            missing |= set(self._committed["verdicts"]) - set(self.verdicts)
            drawn = {path.stem for path in (self.root / "figures").glob(f"{self.number:02d}_*.json")}
            missing |= drawn - set(self.figures)
            if missing:
                raise AssertionError(f"committed, but not made by this run: {', '.join(sorted(missing))}")
        kept = {"chapter": self.number, "results": self.results, "verdicts": self.verdicts}
        self._write(self._path, _json(kept))
        print(f"{len(self.results)} results, {len(self.figures)} figures, {len(self.verdicts)} verdicts")

    def _keep(self, figure: Any, name: str, alt: str) -> tuple[bytes, dict[str, Any]]:
        from qtools.suite import figures

        stem = f"{self.number:02d}_{name}"
        if stem in self.figures:
            raise ValueError(f"figure {stem!r} is drawn twice")
        png, plotted = figures.render(figure, alt)
        self.figures.append(stem)
        if self._check:
            figures.compare(plotted, _read_json(self.root / f"figures/{stem}.json"), stem)
        self._write(f"figures/{stem}.png", png)
        self._write(f"figures/{stem}.json", _json(plotted))
        return png, plotted

    def _compare(self, key: str, entry: dict[str, Any]) -> None:
        committed = self._committed["results"].get(key)
        if committed is None:
            raise AssertionError(f"result {key!r} is not in the committed {self._path}")
        for name in ("source", "rtol", "atol"):
            if entry.get(name) != committed.get(name):
                raise AssertionError(
                    f"result {key!r}: {name} is {entry.get(name)!r}, committed as {committed.get(name)!r}"
                )
        new, old = entry["value"], committed["value"]
        if abs(new - old) > entry.get("atol", 0) + entry["rtol"] * abs(old):
            raise AssertionError(f"result {key!r} is {new!r}, committed as {old!r} (rtol {entry['rtol']})")

    def _write(self, path: str, content: bytes) -> None:
        if self._out is not None:
            replace_file(self._out / path, content)


def _plain_number(key: str, value: Any) -> float | int:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"result {key!r} must be a finite number, got {value!r}")
    # Eight digits are more than any tolerance here asks for, and keep the files free of last-bit noise.
    return number if isinstance(number, int) else float(f"{number:.8g}")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.is_file() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
