"""Run chapters headless, and renew what is committed only when a whole chapter has succeeded.

Each chapter runs in papermill, from the committed notebook into a staging folder that ``QTOOLS_OUT`` names; there the
notebook leaves its figures and results too. A chapter that succeeded is tidied and moved over the committed files.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
from tqdm import tqdm

from qtools._signals import collected
from qtools.suite import ledger
from qtools.suite.notebook import Failure, cells_done, code_cells, failure, parameters_of, reads_results, tidy
from qtools.zoo.fetch import fetch_required

STAGING = ".qtools-staging-"
_POLL_SECONDS = 0.2


class UsageError(ValueError):
    """What was asked for does not exist; the message says what does."""


@dataclass
class Task:
    """One chapter on its way from the committed notebook to the renewed one."""

    source: Path
    stage: Path
    params: Mapping[str, str]
    cells: int
    last: bool = False
    done: int = 0
    seconds: float = 0.0
    figures: int = 0
    result: str = "not run"
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def out(self) -> Path:
        """The folder that ``QTOOLS_OUT`` names, laid out like the repository."""
        return self.stage / "out"

    @property
    def notebook(self) -> Path:
        """The notebook while it runs."""
        return self.out / "notebooks" / self.source.name

    @property
    def log(self) -> Path:
        """What papermill itself says."""
        return self.stage / "log.txt"


def run(
    root: Path,
    chapters: Sequence[str] = (),
    params: Mapping[str, str] | None = None,
    jobs: int = 2,
    output: Path | None = None,
) -> int:
    """Run chapters and renew their outputs, figures and results.

    Parameters
    ----------
    root : Path
        The repository: it holds notebooks/, figures/ and data/results/.
    chapters : sequence of str
        ``1``, ``01``, ``01_linear_quantization`` or a path; none for all.
    params : mapping
        Values for the cell tagged ``parameters``. Such a run is not the committed one: it goes to ``runs/``.
    jobs : int
        Chapters at a time. Measuring (``MEASURE=1``) is done one at a time.
    output : Path, optional
        Where everything goes instead of over the committed files.

    Returns
    -------
    int
        0 when every chapter succeeded, 1 when one failed, 130 when interrupted.

    Raises
    ------
    UsageError
        An unknown chapter or parameter, or an ``output`` that is the repository itself.
    FetchError
        A network or data that chapters use is neither in the cache nor to be had.
    """
    root, params = root.resolve(), dict(params or {})
    sources = find_chapters(root, chapters)
    known = {source: parameters_of(source) for source in sources}
    _check_params(params, known)
    target = output.resolve() if output else root / "runs" if params else root
    if output and target == root:
        raise UsageError(f"--output {output} is the repository itself: leave --output out to renew its files")
    fetch_required()
    with _staging(root) as staging, collected() as caught:  # a chapter's files are never moved by half
        tasks = [_task(source, staging, params, known[source]) for source in sources]
        measuring = params.get("MEASURE", "0").lower() not in ("0", "false")
        _run_all(tasks, 1 if measuring else jobs, partial(_finish, root=root, target=target), caught)
    _print_table(tasks)
    if caught:
        print("interrupted: the chapters that had not finished stay as they were", file=sys.stderr)
        return 130
    if target == root and (root / "data/claims.yaml").is_file():
        _print_ledger(root)
    return 0 if all(task.result == "ok" for task in tasks) else 1


def find_chapters(root: Path, names: Sequence[str] = ()) -> list[Path]:
    """Find the numbered notebooks that `names` ask for, in order; all of them when it is empty.

    Raises
    ------
    UsageError
        There is no such chapter, or no chapter at all.
    """
    every = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise UsageError(f"no numbered notebooks in {root / 'notebooks'}: install with pip install -e . from a clone")
    return sorted({_chapter(name, every) for name in names}) if names else every


def _chapter(name: str, every: list[Path]) -> Path:
    number = name.zfill(2) if name.isdecimal() else None
    for source in every:
        if name in (source.stem, source.name) or number == source.name[:2] or Path(name).resolve() == source:
            return source
    raise UsageError(f"unknown chapter '{name}': choose from {', '.join(source.stem for source in every)}")


def _check_params(params: Mapping[str, str], known: Mapping[Path, set[str]]) -> None:
    # A name must mean something to one chapter at least: chapters that do not take it run as they are.
    names = set().union(*known.values())
    for name in params:
        if name not in names:
            raise UsageError(f"unknown parameter '{name}': the chapters take {', '.join(sorted(names)) or 'none'}")


def _task(source: Path, staging: Path, params: Mapping[str, str], known: set[str]) -> Task:
    own = {name: value for name, value in params.items() if name in known}
    return Task(source, staging / source.stem, own, code_cells(source), reads_results(source))


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    for old in root.glob(f"{STAGING}*-*"):  # left by a run that was killed outright
        pid = old.name.removeprefix(STAGING).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{STAGING}{os.getpid()}-", dir=root))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_all(tasks: list[Task], jobs: int, finish: "partial[None]", caught: list[int]) -> None:
    waiting, running = sorted(tasks, key=lambda task: task.last), []  # a chapter of the others' results waits for them
    bar = tqdm(total=sum(task.cells for task in tasks), unit="cell", disable=None, leave=False)
    try:
        while (waiting or running) and not caught:
            while waiting and len(running) < jobs and not (waiting[0].last and running):
                running.append(_start(waiting.pop(0)))
            time.sleep(_POLL_SECONDS)
            for task in [task for task in running if task.process.poll() is not None]:
                running.remove(task)
                finish(task)
                bar.write(f"{task.source.stem}: {task.result}, {task.seconds:.1f} s", file=sys.stderr)
            _show_progress(bar, tasks, running)
    finally:
        for task in running:
            _end(task)
        bar.close()


def _show_progress(bar: tqdm, tasks: list[Task], running: list[Task]) -> None:
    for task in running:
        task.done = cells_done(task.notebook, task.done)
    bar.set_description(", ".join(task.source.stem[:2] for task in running), refresh=False)
    bar.update(sum(task.done for task in tasks) - bar.n)


def _start(task: Task) -> Task:
    task.notebook.parent.mkdir(parents=True)
    own = {"IPYTHONDIR": "ipython", "JUPYTER_RUNTIME_DIR": "runtime", "QTOOLS_OUT": "out"}
    env = os.environ | {name: str(task.stage / folder) for name, folder in own.items()}
    # This environment's kernel before the user's; the debugger's remark on frozen modules is no output.
    env |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    env.pop("MPLBACKEND", None)  # or the figures would not reach the notebook
    command = [sys.executable, "-m", "papermill", str(task.source), str(task.notebook)]
    command += ["--cwd", str(task.source.parent), "-k", "python3"]
    command += ["--no-progress-bar", "--request-save-on-cell-execute", "--autosave-cell-every", "0"]
    for name, value in task.params.items():
        command += ["-p", name, value]
    with task.log.open("wb") as log:
        task.started = time.monotonic()
        task.process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    return task


def _end(task: Task) -> None:
    # A kernel lives in a session of its own, so a signal to papermill's group would miss it; papermill is held
    # still while its children are listed, or it might start one more.
    task.result, task.seconds = "interrupted", time.monotonic() - task.started
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        head = psutil.Process(task.process.pid)
        head.suspend()
        family = [*head.children(recursive=True), head]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)
    task.process.wait()


def _finish(task: Task, root: Path, target: Path) -> None:
    task.seconds = time.monotonic() - task.started
    try:
        if task.process.returncode:
            raise failure(task.notebook, task.log)
        _check_finished(task, root)
        tidy(task.notebook, task.out / f"data/results/{task.source.stem[:2]}.json", root if target == root else None)
        publish(task.out, task.source.stem, target, root)
    except Exception as error:  # whatever it was, the other chapters go on
        task.result = "failed"
        kind = "" if isinstance(error, Failure | OSError) else f"{type(error).__name__}: "
        tqdm.write(f"\n{task.source.stem}: {kind}{error}\n", file=sys.stderr)
        return
    task.result, task.done = "ok", task.cells
    task.figures = len(list((task.out / "figures").glob("*.png")))


def _check_finished(task: Task, root: Path) -> None:
    # A kernel may leave without an error (sys.exit), and a chapter without its results.
    if (done := cells_done(task.notebook)) < task.cells:
        raise Failure(f"stopped after {done} of {task.cells} cells, without an error")
    results = f"data/results/{task.source.stem[:2]}.json"
    if (root / results).exists() and not (task.out / results).exists():
        raise Failure(f"wrote no {results}: its last cell must finish the chapter")


def publish(stage: Path, chapter: str, target: Path, root: Path) -> None:
    """Move a chapter's fresh files from `stage` to the same places under `target`, all or none.

    Files with the same bytes are not touched, figures and results that are no longer made are removed, and recorded
    measurements go to the repository `root` whatever the target is.

    Raises
    ------
    Failure
        The chapter wrote a file that is not its own.
    """
    number, moves = chapter[:2], {}
    own = re.compile(rf"notebooks/{chapter}\.ipynb|figures/{number}_[^/]+|data/results/(measured/)?{number}[^/]*\.json")
    for file in sorted(path for path in stage.rglob("*") if path.is_file()):
        place = file.relative_to(stage)
        if not own.fullmatch(place.as_posix()):
            raise Failure(f"wrote {place.as_posix()}, which is not a file of chapter {number}")
        moves[(root if "measured" in place.parts else target) / place] = file
    _replace_all({place: file for place, file in moves.items() if not _same(place, file)})
    for old in [*(target / "figures").glob(f"{number}_*"), target / f"data/results/{number}.json"]:
        if old not in moves:
            old.unlink(missing_ok=True)


def _same(place: Path, file: Path) -> bool:
    return place.is_file() and place.read_bytes() == file.read_bytes()


def _replace_all(moves: Mapping[Path, Path]) -> None:
    """Copy every file beside its place first; only when all are there, rename them."""
    beside = {place: place.with_name(f".{place.name}.new") for place in moves}
    before = {place: place.read_bytes() if place.is_file() else None for place in moves}
    try:
        for place, file in moves.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, beside[place])
        for place, copy in beside.items():
            os.replace(copy, place)
    except OSError:
        for place, content in before.items():
            if content is None:
                place.unlink(missing_ok=True)
            elif place.read_bytes() != content:
                place.write_bytes(content)
        raise
    finally:
        for copy in beside.values():
            copy.unlink(missing_ok=True)


def _print_ledger(root: Path) -> None:
    try:
        print(f"\nthe ledger of all claims: {ledger.report(root).relative_to(root)}")
    except ValueError as error:  # of a chapter that did not run now
        print(f"\nno ledger: {error}", file=sys.stderr)


def _print_table(tasks: list[Task]) -> None:
    width = max(len(task.source.stem) for task in tasks)
    print(f"{'chapter':<{width}}  seconds  cells  figures  result")
    for task in tasks:
        print(f"{task.source.stem:<{width}}  {task.seconds:7.1f}  {task.done:5}  {task.figures:7}  {task.result}")
