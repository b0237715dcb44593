"""The files around the code agree with each other: what is declared, pinned, ignored and promised."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qtools

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines: list[str]) -> dict[str, Requirement]:
    kept = [line.split(" #")[0].strip() for line in lines]
    parsed = [Requirement(line) for line in kept if line and not line.startswith(("#", "-"))]
    return {canonicalize_name(one.name): one for one in parsed}


def declared() -> dict[str, Requirement]:
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    return requirements(PROJECT["dependencies"] + extras)


def pinned() -> dict[str, Requirement]:
    return requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())


def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))


def conda_pip() -> list[str]:
    return next(entry["pip"] for entry in conda()["dependencies"] if isinstance(entry, dict))


def test_every_requirement_is_an_exact_pin() -> None:
    assert all(re.fullmatch(r"==[0-9][\w.]*", str(one.specifier)) for one in pinned().values())


def test_every_declared_package_is_pinned_within_its_bounds_and_for_the_same_platforms() -> None:
    pins = pinned()
    for name, wanted in declared().items():
        pin = next(iter(pins[name].specifier)).version
        assert wanted.specifier.contains(pin), f"{name}=={pin} is outside {wanted.specifier}"
        assert str(wanted.marker) == str(pins[name].marker), name


def test_the_package_itself_declares_lower_bounds_only() -> None:
    assert all(re.fullmatch(r">=[0-9.]+", str(one.specifier)) for one in declared().values())


def test_conda_installs_what_is_declared_at_the_tested_versions() -> None:
    listed = requirements(conda_pip())
    assert {name: str(one.marker) for name, one in listed.items()} == {n: str(o.marker) for n, o in declared().items()}
    assert all(not one.specifier for one in listed.values()), "versions come from the constraint"
    assert conda_pip()[0] == "--constraint requirements.txt" and conda_pip()[-1] == "--editable ."


def test_every_conda_line_says_which_chapter_needs_it() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    entries = re.findall(r"^ +- (?!conda-forge|pip:|--constraint)(.+)$", text, re.MULTILINE)
    assert entries and all("  # " in entry for entry in entries)


def test_conda_offers_the_pythons_that_are_supported() -> None:
    python = next(entry for entry in conda()["dependencies"] if entry.startswith("python"))
    assert PROJECT["requires-python"] in python


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("run", "bin/qtools run"),
        ("test", "-m pytest"),
        ("lab", "bin/jupyter lab"),
        ("bench", "-m tests.benchmarks"),
        ("clean", "rm -rf .venv"),
    ],
)
def test_make_has_its_five_targets(target: str, command: str) -> None:
    said = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert command in said


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_leaves_the_backend_out_when_asked() -> None:
    def said(*args: str) -> str:
        command = ["make", "--dry-run", "--always-make", "run", *args]
        # What the make above this test was told must not be told to this one.
        env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "HTP", "TORCH_INDEX")}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env).stdout

    assert "sed '/^onnxruntime-qnn==/d'" in said("HTP=0") and ".ready-without-htp" in said("HTP=0")
    assert "sed ''" in said("HTP=1") and ".ready-with-htp" in said("HTP=1")
    assert "--extra-index-url https://x.org/cpu" in said("TORCH_INDEX=https://x.org/cpu")


@pytest.mark.skipif(not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a git clone")
def test_what_runs_leave_behind_is_ignored() -> None:
    left = [".venv/x", "runs/notebooks/x.ipynb", ".qtools-staging-1-ab/x", "build/browser/x.png", "x/__pycache__/y.pyc"]
    left += ["figures/.01_a.png.new", "notebooks/.ipynb_checkpoints/x.ipynb", "qtools.egg-info/PKG-INFO"]
    command = ["git", "check-ignore", "--no-index", *left]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert said.split() == left


def test_the_gate_is_executable_and_runs_make_test() -> None:
    gate = ROOT / ".ci/run"
    assert gate.stat().st_mode & 0o100
    assert gate.read_text().rstrip().endswith("exec make test")


def test_the_licence_is_the_one_declared() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n" in text and "The qtools authors" in text and "[yyyy]" not in text


def test_the_package_and_its_metadata_have_one_version() -> None:
    assert qtools.__version__ == PROJECT["version"]


def test_importing_qtools_is_quick_and_loads_nothing_heavy() -> None:
    code = "import sys, time; t = time.perf_counter(); import qtools; print(time.perf_counter() - t, *sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, *loaded = said.split()
    assert float(seconds) < 0.2
    assert not {"numpy", "torch", "onnx", "onnxruntime", "numba", "matplotlib"} & set(loaded)


def test_submodules_are_loaded_when_they_are_first_used() -> None:
    assert qtools.metrics.__name__ == "qtools.metrics"
    assert {"affine", "npu", "suite"} <= set(dir(qtools))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qtools.nonsense


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
