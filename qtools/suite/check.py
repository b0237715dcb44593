"""What the course needs on this computer, what is there, and the command that mends what is missing."""

import os
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_DISK_GB = 2
_LICENCE = "installing onnxruntime-qnn means accepting Qualcomm's AI Stack License, a PDF inside the package"


@dataclass(frozen=True)
class Line:
    """One finding: `mend` is the command or advice shown when it is not `ok`."""

    ok: bool
    text: str
    mend: str = ""
    required: bool = True

    def __str__(self) -> str:
        if self.ok:
            return f"[ok]      {self.text}"
        return f"[missing] {self.text}{'' if self.required else ' (optional)'}: {self.mend}"


def check(root: Path) -> int:
    """Print what is there and what is missing.

    Parameters
    ----------
    root : Path
        The repository: its pyproject.toml names the packages, its requirements.txt the tested versions.

    Returns
    -------
    int
        1 when something required is missing, else 0.
    """
    lines = []
    for line in _findings(root):
        print(line, flush=True)
        lines.append(line)
    missing = [line for line in lines if not line.ok and line.required]
    print(f"{len(missing)} required missing" if missing else "everything required is here")
    return 1 if missing else 0


def find_browser() -> str | None:
    """Find Chromium or Chrome on the PATH, for the browser test."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def tested_pins(root: Path) -> dict[str, str]:
    """Read the tested version of each package (by its canonical name) from requirements.txt."""
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return {canonicalize_name(name): pin for name, pin in pins}


def _findings(root: Path) -> Iterator[Line]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = tested_pins(root)
    python = f"Python {sys.version.split()[0]}"
    yield Line(sys.version_info >= (3, 11), python, "install Python 3.11 or newer, then make clean and make run")
    for name in project["dependencies"]:
        yield _package(Requirement(name), pins)
    for name in project["optional-dependencies"]["test"]:
        yield _package(Requirement(name), pins, "the tests")
    yield from _htp(Requirement(project["optional-dependencies"]["htp"][0]), pins)
    yield _font()
    yield _fetched()
    yield _browser()
    free = shutil.disk_usage(root).free / 1e9
    mend = f"free some space: a new .venv takes more than {_DISK_GB} GB"
    yield Line(free >= _DISK_GB, f"disk: {free:.0f} GB free", mend, False)


def _package(wanted: Requirement, pins: dict[str, str], extra: str = "") -> Line:
    pin = pins[canonicalize_name(wanted.name)]
    mend, label = f"{sys.executable} -m pip install {wanted.name}=={pin}", f"for {extra}" if extra else ""
    try:
        here = version(wanted.name)
    except PackageNotFoundError:
        return Line(False, f"{wanted.name} {label}".strip(), mend, not extra)
    if not wanted.specifier.contains(here, prereleases=True):
        return Line(False, f"{wanted.name} {here} is too old, {wanted.specifier} is needed", mend, not extra)
    same = here.split("+")[0] == pin  # 2.13.0+cpu is 2.13.0, built for the CPU
    return Line(True, f"{wanted.name} {here}" + ("" if same else f" (tested with {pin})"))


def _htp(wanted: Requirement, pins: dict[str, str]) -> Iterator[Line]:
    here = _package(wanted, pins, "the HTP backend")
    if os.environ.get("QTOOLS_HTP") == "0":
        yield Line(False, "HTP backend", "switched off by QTOOLS_HTP=0", False)
    elif not here.ok and not wanted.marker.evaluate():
        yield Line(False, "HTP backend", "no package for this platform; the course runs without it and says so", False)
    elif not here.ok:
        yield Line(False, here.text, f"{here.mend}; {_LICENCE}", False)
    else:
        from qtools.npu.htp import status

        found = status()
        yield Line(found.available, f"HTP backend: {here.text}", found.reason, False)
        print(f"          {_LICENCE}")


def _fetched() -> Line:
    from qtools.zoo import fetch

    try:
        states = {package: fetch.state(package) for package in fetch.choose(everything=True)}
    except fetch.FetchError as error:
        return Line(False, "networks and data from PyPI", str(error))
    missing = [one.name for one, state in states.items() if state != "fetched" and not one.optional]
    said = [f"{one.name} {state}{' (optional)' if one.optional else ''}" for one, state in states.items()]
    return Line(not missing, f"networks and data from PyPI: {', '.join(said)}", f"qtools fetch {' '.join(missing)}")


def _browser() -> Line:
    found = find_browser()
    text = f"browser for the browser test: {found}" if found else "browser for the browser test"
    return Line(bool(found), text, "install Chromium (on Debian, apt-get install chromium)", False)


def _font() -> Line:
    from matplotlib import font_manager

    try:
        font_manager.findfont("DejaVu Sans", fallback_to_default=False)
        found = True
    except ValueError:
        found = False
    return Line(found, "font DejaVu Sans", f"{sys.executable} -m pip install --force-reinstall --no-deps matplotlib")
