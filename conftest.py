"""Notebooks under test compare every number with the committed one, and write into a temporary folder."""

import os
import shutil
import tempfile

import pytest

from qtools.npu import htp
from qtools.zoo.fetch import FetchError, fetch_required


@pytest.fixture(scope="module")
def one_thread():
    """Layers as small as those of the tests gain nothing from a second thread, and wait for it on a busy computer."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_configure(config):
    config.qtools_out = tempfile.mkdtemp(prefix="qtools-test-")
    os.environ |= {"QTOOLS_CHECK": "1", "QTOOLS_OUT": config.qtools_out}


def pytest_unconfigure(config):
    shutil.rmtree(config.qtools_out, ignore_errors=True)


def pytest_sessionstart(session):
    """Fetch what the chapters use, once for all workers; without it half of the tests would fail one by one."""
    if hasattr(session.config, "workerinput"):
        return
    try:
        with session.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            fetch_required()
    except FetchError as error:
        pytest.exit(str(error), returncode=1)


def pytest_collection_modifyitems(items):
    """Without the HTP backend, cells tagged ``htp`` say so instead of what is stored; their numbers are checked."""
    if htp.status().available:
        return
    for item in items:
        if type(item).__name__ == "IPyNbCell" and "htp" in item.cell.metadata.get("tags", []):
            item.options["check"] = False
