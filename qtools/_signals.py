"""Signals collected instead of raised, so that what must not be cut in two is not."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Caught(list[int]):
    """The signals that came while they were collected."""

    _raises = False

    def __call__(self, number: int, _: FrameType | None) -> None:
        self.append(number)
        if self._raises:
            self._raises = False  # the first one only: the tidying up that it sets off is not cut short by a second
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Here the first signal raises KeyboardInterrupt where it comes, and so does one that came before."""
        self._raises = True
        try:
            if self:
                raise KeyboardInterrupt
            yield
            if self:  # raised where Python can only print it, as in a finalizer
                raise KeyboardInterrupt
        finally:
            self._raises = False


@contextmanager
def collected() -> Iterator[Caught]:
    """Collect Ctrl-C, SIGTERM and SIGHUP; what is to become of them is for the caller to say.

    Within another such block it is the outer one that goes on collecting.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may, and only it is interrupted
    numbers = [number for number in numbers if signal.getsignal(number) not in (signal.SIG_IGN, None)]  # as under nohup
    outer = next((one for one in map(signal.getsignal, numbers) if isinstance(one, Caught)), None)
    if outer is not None:
        raising, outer._raises = outer._raises, False
        try:
            yield outer
        finally:
            outer._raises = raising
        return
    caught = Caught()
    before = {number: signal.signal(number, caught) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
