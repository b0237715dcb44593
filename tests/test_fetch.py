"""Fetching: what is kept is what is listed, every failure is one sentence, and nothing half-written stays."""

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from qtools import cli
from qtools.zoo import fetch
from qtools.zoo.fetch import FetchError, File, Package, fetched

ROOT = Path(__file__).resolve().parents[1]
DATA = bytes(range(256)) * 200
MEMBERS = {"toy/data.bin": DATA, "toy/__init__.py": b"raise SystemExit('this must not run')", "toy/LICENSE": b"free"}


def listed(content: bytes, member: str = "toy/data.bin") -> File:
    return File(member, len(content), hashlib.sha256(content).hexdigest())


def add_wheel(links: Path, members: dict[str, bytes] = MEMBERS, name: str = "toy") -> Package:
    """Write the wheel `name` 1.0, which pip takes, and list two of its files."""
    own = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Python: <3\n", "RECORD": ""}
    own["WHEEL"] = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    wheel = links / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in (members | {f"{name}-1.0.dist-info/{key}": text for key, text in own.items()}).items():
            archive.writestr(member, content)
    return listing(wheel, name, (listed(DATA), listed(b"free", "toy/LICENSE")))


def listing(wheel: Path, name: str, files: tuple[File, ...]) -> Package:
    one = listed(wheel.read_bytes())
    return Package(name, "1.0", "MIT", "a toy", one.bytes, one.sha256, files)


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, where pip looks and nowhere else; the cache, ``cache`` beside it, is not there yet."""
    (folder := tmp_path / "links").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder, "PIP_RETRIES": "0"}
    for name, value in (settings | {"QTOOLS_CACHE": tmp_path / "cache"}).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(fetch, "PACKAGES", {"toy": add_wheel(folder)})
    return folder


def cached(links: Path) -> list[str]:
    cache = links.parent / "cache"
    return sorted(path.relative_to(cache).as_posix() for path in cache.rglob("*"))


WHOLE = ["toy-1.0", "toy-1.0/LICENSE", "toy-1.0/data.bin"]


def fails(capsys: pytest.CaptureFixture[str], *message: str) -> None:
    """``qtools fetch toy`` ends with status 1 and one sentence that has each `message`."""
    capsys.readouterr()
    assert cli.main(["fetch", "toy"]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("fetching ")]
    assert out == "" and len(lines) == 1 and lines[0].startswith("qtools fetch: "), err
    assert all(text in lines[0] for text in message), err


def not_allowed(*_: object, **__: object) -> None:
    raise AssertionError("this must not be called")


def test_a_package_is_fetched_once(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetched("toy")
    assert folder == links.parent / "cache/toy-1.0" and cached(links) == WHOLE
    assert (folder / "data.bin").read_bytes() == DATA
    assert capsys.readouterr() == ("", "fetching toy 1.0 (0.1 MB) ...\n")
    monkeypatch.setattr(subprocess, "Popen", not_allowed)
    assert fetched("toy") == folder
    assert capsys.readouterr() == ("", "")
    assert cli.main(["fetch"]) == 0
    assert capsys.readouterr() == (f"toy 1.0: {folder}\n", "")


def test_a_terminal_gets_a_bar(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    fetched("toy")
    assert "toy 1.0:   0%" in terminal.getvalue() and "fetching" not in terminal.getvalue()


def member(package: Package, **other: object) -> Package:
    return replace(package, files=(replace(package.files[0], **other), *package.files[1:]))


def cut_short(package: Package, wheel: Path) -> Package:
    wheel.write_bytes(wheel.read_bytes()[:1000])
    return package


def flipped(package: Package, wheel: Path) -> Package:
    wheel.write_bytes(wheel.read_bytes().replace(DATA, b"\1" + DATA[1:]))
    return listing(wheel, "toy", package.files)


SHORT, ZEROS = listed(DATA).sha256[:12], "… instead of 000000000000…"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda package, _: replace(package, sha256="0" * 64), ZEROS),
        (lambda package, _: member(package, sha256="0" * 64), f"data.bin in the wheel of toy 1.0 has SHA-256 {SHORT}"),
        (lambda package, _: member(package, member="toy/more.bin"), "the wheel of toy 1.0 has no toy/more.bin"),
        (lambda package, _: replace(package, version="2.0"), "the package index that pip asks has no wheel of toy 2.0"),
        (cut_short, "the wheel of toy 1.0 is not a whole zip file: it was cut short"),
        (flipped, "the wheel of toy 1.0 is not a whole zip file"),
    ],
)
def test_a_wrong_wheel_is_refused_and_leaves_nothing(links: Path, capsys, change: Callable, message: str) -> None:
    fetch.PACKAGES["toy"] = change(fetch.PACKAGES["toy"], next(links.iterdir()))
    fails(capsys, message)
    assert cached(links) == []


def test_a_member_that_is_too_large_is_not_even_unpacked(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch.PACKAGES["toy"] = member(fetch.PACKAGES["toy"], bytes=9)
    monkeypatch.setattr("shutil.copyfileobj", not_allowed)
    fails(capsys, "toy/data.bin in the wheel of toy 1.0 has 51,200 bytes instead of 9")
    assert cached(links) == []


def test_a_path_in_the_archive_never_says_where_a_file_goes(links: Path) -> None:
    package = add_wheel(links, MEMBERS | {"../../up.bin": b"up", "../../other.bin": b"other", "/toy-root.bin": b"root"})
    fetch.PACKAGES["toy"] = replace(package, files=(*package.files, listed(b"up", "../../up.bin")))
    fetched("toy")
    assert cached(links) == [*WHOLE, "toy-1.0/up.bin"]
    assert sorted(os.listdir(links.parent)) == ["cache", "links"]


def test_without_a_network_it_says_so(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    fails(capsys, "cannot reach the package index for toy 1.0 (Connection refused); once fetched, all works offline")
    assert cached(links) == []


def test_without_pip_it_says_so(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    venv.create(links.parent / "bare", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(links.parent / "bare/bin/python"))
    fails(capsys, "toy 1.0 is fetched by pip, which is missing: ", "bare/bin/python -m ensurepip adds it")


def test_a_disk_that_fills_up_while_copying(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source, target) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", full)
    fails(capsys, f"the disk of the cache {links.parent / 'cache'} is full: fetching toy 1.0 takes 0.1 MB")
    assert cached(links) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("kb", [64, 1])  # room for the wheel but not for its copy, and for nothing at all
def test_a_disk_that_is_full(links: Path, capsys, kb: int) -> None:
    (cache := links.parent / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kb}k", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a small disk")
    try:
        (cache / "other-1.0").mkdir()
        fails(capsys, f"the disk of the cache {cache} is full: ")
        assert cached(links) == ["other-1.0"]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_cache_that_may_not_be_written_to(links: Path, capsys) -> None:
    cache = links.parent / "cache"
    cache.mkdir(mode=0o555)
    user = os.geteuid()
    try:
        with suppress(PermissionError):
            os.seteuid(user or 65534)  # root may write anywhere
        fails(capsys, "toy 1.0 cannot be kept in the cache (", "Permission denied); set QTOOLS_CACHE to a folder that ")
    finally:
        os.seteuid(user)
    assert cached(links) == []


def test_a_cache_that_cannot_be_one(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    (links.parent / "cache").write_text("a file")
    fails(capsys, "cannot be kept in the cache (", "/cache is a file or lies in one); set QTOOLS_CACHE to a folder")
    monkeypatch.setenv("QTOOLS_CACHE", str(links.parent / "cache/below"))
    fails(capsys, "/cache/below is a file or lies in one)")
    monkeypatch.setenv("QTOOLS_CACHE", "here")
    fails(capsys, "QTOOLS_CACHE is 'here': give it the full path of a folder")
    assert (links.parent / "cache").read_text() == "a file"


def changed(path: Path) -> None:
    before = path.stat().st_mtime_ns
    path.write_bytes(b"\1" + DATA[1:])
    os.utime(path, ns=(before, before + 10**9))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, " is missing"),
        (lambda path: os.truncate(path, 7), " has 7 bytes instead of 51,200"),
        (changed, f"… instead of {SHORT}…"),
    ],
)
def test_a_damaged_file_is_reported_and_renewed(links: Path, capsys, damage: Callable[[Path], None], message) -> None:
    folder = fetched("toy")
    kept = (folder / "LICENSE").stat()
    damage(folder / "data.bin")
    with pytest.raises(FetchError, match=r"qtools fetch toy renews it$") as error:
        fetched("toy")
    assert str(error.value).startswith(f"{folder / 'data.bin'} ") and message in str(error.value)
    assert "damaged" in fetch.table()
    assert cli.main(["fetch", "toy"]) == 0
    assert (fetched("toy") / "data.bin").read_bytes() == DATA and cached(links) == WHOLE
    assert (folder / "LICENSE").stat().st_ino == kept.st_ino


def test_list_downloads_nothing(links: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", not_allowed)
    fetch.PACKAGES["large"] = replace(fetch.PACKAGES["toy"], name="large", bytes=92_871_040, optional=True)
    assert cli.main(["fetch", "--list"]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == ["toy 1.0 0.1 MIT a toy missing", "large 1.0 92.9 MIT a toy missing, optional"]
    assert not (links.parent / "cache").exists()


def test_optional_packages_are_fetched_when_asked_for(links: Path) -> None:
    fetch.PACKAGES["large"] = replace(add_wheel(links, name="large"), optional=True)
    fetch.fetch_required()
    assert cached(links) == WHOLE
    assert cli.main(["fetch", "--all"]) == 0
    assert "large-1.0/data.bin" in cached(links)


def test_an_unknown_name_is_told_the_known_ones(links: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown package 'tai': choose from toy$"):
        fetched("tai")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(links: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        (links.parent / f"cache/.partial-to-y-{pid}-ab_1/tmp").mkdir(parents=True)
    fetched("toy")
    assert cached(links) == [f".partial-to-y-{os.getpid()}-ab_1", f".partial-to-y-{os.getpid()}-ab_1/tmp", *WHOLE]


@pytest.fixture
def server(links: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Barrier]:
    """A package index that holds each wheel back halfway until the barrier's two parties have come."""
    barrier, wheel = threading.Barrier(2, timeout=30), next(links.iterdir())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_wheel = self.path.endswith(".whl")
            content = wheel.read_bytes() if is_wheel else f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/zip" if is_wheel else "text/html")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:1000])
            self.wfile.flush()
            if is_wheel:
                barrier.wait()
            self.wfile.write(content[1000:])

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # pip was killed
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    yield barrier
    barrier.abort()
    server.shutdown()
    server.server_close()
    thread.join()


def start_fetch() -> "subprocess.Popen[str]":
    # A test run in the background may have been told to ignore Ctrl-C.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from qtools import cli\nfrom qtools.zoo import fetch\nfrom qtools.zoo.fetch import File, Package\n"
    code += f"fetch.PACKAGES = {fetch.PACKAGES!r}\nsys.exit(cli.main(['fetch', 'toy']))"
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_download_leaves_nothing(links: Path, server: threading.Barrier, number: int) -> None:
    with start_fetch() as process:
        while not server.n_waiting:  # until pip has the first half of the wheel
            assert process.poll() is None
        (pip,) = psutil.Process(process.pid).children()
        assert any(name.startswith(".partial-toy-") and "/tmp/pip-" in name for name in cached(links))
        os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches all that it started
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == ""
    assert err.splitlines() == ["fetching toy 1.0 (0.1 MB) ...", "interrupted: what was there before stays as it was"]
    assert cached(links) == [] and not pip.is_running()


def test_a_signal_while_files_are_moved_waits_until_they_are_whole(links: Path, monkeypatch) -> None:
    def copy(source, target, copy=shutil.copyfileobj) -> None:
        signal.raise_signal(signal.SIGINT)
        copy(source, target)

    monkeypatch.setattr("shutil.copyfileobj", copy)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["fetch", "toy"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert cached(links) == WHOLE


def test_two_processes_may_fetch_the_same_at_once(links: Path, server: threading.Barrier) -> None:
    with start_fetch() as one, start_fetch() as two:
        said = [process.communicate(timeout=30) for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], said
    assert cached(links) == WHOLE and (links.parent / "cache/toy-1.0/data.bin").read_bytes() == DATA


def test_no_test_runs_without_what_all_need(links: Path) -> None:
    env = os.environ | {"QTOOLS_CACHE": str(links / "toy-1.0-py3-none-any.whl")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "tests/test_metrics.py",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "::" not in done.stdout
    assert done.stderr.startswith("Exit: rapidocr-onnxruntime 1.4.4 cannot be kept in the cache"), done.stderr


def test_what_the_course_uses_is_here_and_is_what_is_listed() -> None:
    for package in fetch.choose():
        assert sorted(os.listdir(fetched(package.name))) == sorted(file.name for file in package.files)
        for file in package.files:
            assert listed((fetched(package.name) / file.name).read_bytes(), file.member) == file
