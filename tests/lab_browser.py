"""A reader in front of JupyterLab: a real server, a real browser, a slider that is moved by its keys.

The server works on a copy of the notebooks without their outputs, so that whatever is on the page was computed there,
and keeps its settings and run-time files in a temporary folder; kernels are those of this environment.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import psutil

_CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
_CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
_START_SECONDS = 60
_RUN_SECONDS = 120
_REDRAW_SECONDS = 5
_QUIET_SECONDS = 0.3
_SETTINGS = {
    # No pop-up over the page, and every cell in the page rather than only those in view.
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "notebook-extension/tracker": {"windowingMode": "none"},
}
# JupyterLab shows an error as stderr; the notebooks print nothing else there.
_ERRORS = '[data-mime-type="application/vnd.jupyter.stderr"], [data-mime-type="application/vnd.jupyter.error"]'
# Every cell with code has its number, or there are more errors than the notebook means to show.
_FINISHED = """expected => {
  const errors = document.querySelectorAll(expected.selector).length;
  const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputArea-prompt')];
  const done = prompts.filter(prompt => /\\[\\d+\\]/.test(prompt.textContent)).length;
  return errors > expected.errors || done >= expected.cells;
}"""
# From the key (its own time stamp, so waiting in the queue counts) to the load of the last picture that it causes:
# only when none has come for a while is the next key pressed, so that no press is credited with another's picture.
_REDRAW = """([picture, quiet, limit]) => {
  window.redraw = new Promise(resolve => {
    let pressed = null, took = null, end = null;
    const onKey = event => { pressed = event.timeStamp; };
    const onLoad = () => {
      if (pressed !== null) took = performance.now() - pressed;
      clearTimeout(end);
      end = setTimeout(stop, quiet);
    };
    const stop = () => {
      document.removeEventListener('keydown', onKey, true);
      picture.removeEventListener('load', onLoad);
      resolve(took);
    };
    document.addEventListener('keydown', onKey, true);
    picture.addEventListener('load', onLoad);
    end = setTimeout(stop, limit);
  });
}"""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it is, and the folder that it serves."""

    port: int
    token: str
    folder: Path

    def url(self, name: str) -> str:
        """Give the address of a notebook's page."""
        return f"http://127.0.0.1:{self.port}/lab/tree/{name}?token={self.token}&reset"


class Page:
    """One notebook open in the browser."""

    def __init__(self, page: Any, lab: Lab, name: str) -> None:
        self.page = page
        self.notebook = nbformat.read(lab.folder / name, as_version=4)
        page.goto(lab.url(name))
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=_START_SECONDS * 1000)
        # The status bar says Idle once the kernel has answered; running cells sooner asks which kernel to take.
        page.wait_for_selector("#jp-main-statusbar >> text=/\\| Idle/", timeout=_START_SECONDS * 1000)

    def run_all(self) -> None:
        """Choose Run All Cells and wait for the last one."""
        code = [cell for cell in self.notebook.cells if cell.cell_type == "code" and cell.source.strip()]
        meant = sum("raises-exception" in cell.metadata.get("tags", []) for cell in code)
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expected = {"cells": len(code), "errors": meant, "selector": _ERRORS}
        self.page.wait_for_function(_FINISHED, arg=expected, timeout=_RUN_SECONDS * 1000)
        shown = self.page.locator(_ERRORS)
        if shown.count() > meant:
            raise AssertionError(f"a cell failed in the browser: {shown.last.inner_text()[-500:]}")

    def redraw_ms(self, slider: int = 0, times: int = 1) -> list[float | None]:
        """Press an arrow key on a slider and time the picture beside it, once per press.

        Returns
        -------
        list of float or None
            Milliseconds from each key press to the load of the picture that stays; None where none came.
        """
        output = self.page.locator(".jp-OutputArea-output:has(.noUi-handle):has(img)").nth(slider)
        output.scroll_into_view_if_needed()
        handle, picture = output.locator(".noUi-handle").first, output.locator("img").first
        return [self._redraw_ms(handle, picture.element_handle()) for _ in range(times)]

    def _redraw_ms(self, handle: Any, picture: Any) -> float | None:
        before = picture.get_attribute("src")
        now, end = (float(handle.get_attribute(f"aria-value{name}")) for name in ("now", "max"))
        self.page.evaluate(_REDRAW, [picture, _QUIET_SECONDS * 1000, _REDRAW_SECONDS * 1000])
        handle.press("ArrowRight" if now < end else "Home")
        took = self.page.evaluate("window.redraw")
        return took if picture.get_attribute("src") != before else None

    def screenshot(self, path: Path) -> None:
        """Keep what the reader sees."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)


@contextmanager
def serve(notebooks: Path, folder: Path) -> Iterator[Lab]:
    """Serve a copy of `notebooks`, outputs cleared, from within the temporary `folder`."""
    copy = shutil.copytree(notebooks, folder / "notebooks", ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for path in copy.glob("*.ipynb"):
        _clear(path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        lab = Lab(free.getsockname()[1], secrets.token_hex(16), copy)
    with (folder / "lab.log").open("wb") as log:
        server = subprocess.Popen(
            _command(lab), env=_environment(folder), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        _wait(lab, server, folder / "lab.log")
        yield lab
    finally:
        _end(server)


@contextmanager
def browse(executable: str) -> Iterator[Any]:
    """Open one page in headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=_CHROMIUM)
        try:
            yield browser.new_page(viewport={"width": 1280, "height": 900})
        finally:
            browser.close()


def _clear(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def _command(lab: Lab) -> list[str]:
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": lab.port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": lab.folder,
        "IdentityProvider.token": lab.token,
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]


def _environment(folder: Path) -> dict[str, str]:
    for name, content in _SETTINGS.items():
        path = folder / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime"}
    own |= {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}
    env = os.environ | {name: str(folder / place) for name, place in own.items()}
    return {name: value for name, value in env.items() if name not in ("MPLBACKEND", "QTOOLS_OUT", "QTOOLS_CHECK")}


def _wait(lab: Lab, server: subprocess.Popen[bytes], log: Path) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{lab.port}/api/status")
    request.add_header("Authorization", f"token {lab.token}")
    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text(errors='replace')[-1000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    try:
        family = [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]
    except psutil.NoSuchProcess:
        return
    server.terminate()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    server.wait()
