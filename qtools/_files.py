"""Files that are there whole, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that no reader ever sees half of it; equal bytes stay."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o644)
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def replace_json(path: Path, content: Any) -> None:
    """`replace_file` with what JSON can hold, to be read by people too."""
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
