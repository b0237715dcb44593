"""Memory that processes, runtimes and devices share by file descriptor instead of copying it.

A `Buffer` comes from a DMA-BUF heap where there is one (Android 12 and newer, Linux 5.6 and newer if built in): then
an NPU can map it too, in QNN as ``QNN_MEM_TYPE_ION``, a name that outlived the driver.  Elsewhere on Linux it comes
from ``memfd_create``: the same for processes and runtimes, but no device can map it.  macOS and Windows have neither.
Linux frees the memory when the last descriptor and mapping are gone, however their processes ended: there is no name
to be left behind, as there is with POSIX shared memory (``multiprocessing.shared_memory``).

``data/zero_copy.cpp`` has the article's C++, what is wrong with it, and the same with a DMA-BUF heap.

Sources: Linux, ``include/uapi/linux/dma-heap.h`` and ``dma-buf.h`` (requests, structures, when to synchronize), and
memfd_create(2); Android, *Transition from ION to DMA-BUF heaps* (source.android.com).
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import socket
import struct
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

try:
    import fcntl
except ImportError:  # Windows, where no Buffer can be made
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import onnxruntime

Kind = Literal["dma-buf", "memfd"]
HEAP = "/dev/dma_heap/system"

_ALLOCATION = struct.Struct("=QIIQ")  # dma_heap_allocation_data: length, descriptor, its flags, the heap's flags
_HEAP_ALLOCATE = 0xC018_4800  # DMA_HEAP_IOCTL_ALLOC
_SYNC = 0x4008_6200  # DMA_BUF_IOCTL_SYNC, with the flags below in a uint64
_READ, _WRITE, _END = 1, 2, 4
_FIXED_SIZE = 0x2 | 0x4  # F_SEAL_SHRINK, F_SEAL_GROW: who maps it must not lose pages under his feet
_NO_NEW_WRITERS = 0x10  # F_SEAL_FUTURE_WRITE, Linux 5.1
_READ_ONLY = 0x8 | _NO_NEW_WRITERS
_NUMBER = struct.Struct("=Q")


class Buffer:
    """Memory mapped once, and shared; a context manager.

    Parameters
    ----------
    size : int
        Bytes.
    kind : 'dma-buf' or 'memfd', optional
        By default from the heap `HEAP` if this process may open it.

    Raises
    ------
    ValueError
        If the size is not between 1 and the memory that is available, or there is no such kind here.
    OSError
        If the system has neither kind, or no memory left.
    """

    def __init__(self, size: int, kind: Kind | None = None) -> None:
        import psutil

        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"the size of a buffer is a whole number of bytes from 1, got {size!r}")
        if size > (free := psutil.virtual_memory().available):
            raise ValueError(f"a buffer of {size} bytes is more than the {free} bytes that are available")
        heap = os.access(HEAP, os.R_OK)
        if kind not in (None, "dma-buf", "memfd") or (kind == "dma-buf" and not heap):
            raise ValueError(f"the kind is 'memfd', or 'dma-buf' where {HEAP} can be opened, got {kind!r}")
        kind = kind or ("dma-buf" if heap else "memfd")
        self._keep((_from_heap if kind == "dma-buf" else _from_memory)(int(size)), int(size), kind)

    @classmethod
    def from_fd(cls, fd: int, size: int | None = None) -> Buffer:
        """Map the memory behind a descriptor, which stays its owner's: this one has a duplicate.

        Memory that may not be written to becomes a buffer of read-only arrays.

        Raises
        ------
        ValueError
            If `fd` is not open or no such memory, or `size` is not between 1 and that of the memory.
        """
        kind, most = _identify(fd)
        if not 1 <= (size := most if size is None else size) <= most:
            raise ValueError(f"the memory has {most} bytes, so the buffer cannot have {size}")
        buffer = cls.__new__(cls)
        buffer._keep(os.dup(fd), size, kind)
        return buffer

    def _keep(self, fd: int, size: int, kind: Kind) -> None:
        self.size, self.kind, self._fd = size, kind, fd
        self._release = weakref.finalize(self, os.close, fd)  # also if the buffer is forgotten, or cannot be mapped
        sealed = kind == "memfd" and fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _READ_ONLY
        self.writable = not sealed and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        access = mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ
        self._memory: mmap.mmap | None = mmap.mmap(fd, size, access=access)

    @property
    def fd(self) -> int:
        """The descriptor, to be passed to drivers and runtimes; ValueError if the buffer is closed."""
        if not self._release.alive:
            raise ValueError("the buffer is closed")
        return self._fd

    def close(self) -> None:
        """Give up the descriptor; the mapping goes with the last array that was made from it."""
        self._release()
        self._memory = None

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"fd {self._fd}" if self._release.alive else "closed"
        return f"Buffer({self.size} bytes, {self.kind}, {state})"

    def array(self, shape: int | Sequence[int], dtype: Any, offset: int = 0) -> np.ndarray:
        """An array in this memory; it keeps the mapping alive.

        Raises
        ------
        ValueError
            If the buffer is closed, the array would not fit, or not lie on a boundary of its elements.
        """
        shape, dtype = (shape,) if isinstance(shape, int | np.integer) else tuple(shape), np.dtype(dtype)
        needed = math.prod(shape) * dtype.itemsize
        if self.fd < 0 or dtype.hasobject or min(shape, default=0) < 0 or offset < 0 or offset % dtype.alignment:
            raise ValueError(f"no array of shape {shape} and dtype {dtype} can lie {offset} bytes into a buffer")
        if offset + needed > self.size:
            raise ValueError(f"{needed} bytes at {offset} do not fit into {self.size}: shape {shape}, dtype {dtype}")
        return np.ndarray(shape, dtype, self._memory, offset)

    def ort_value(self, shape: int | Sequence[int], dtype: Any, offset: int = 0) -> onnxruntime.OrtValue:
        """The same memory as a tensor of ONNX Runtime on the CPU, to be bound (`io_binding`) as an input.

        As an output too if it is `writable`: ONNX Runtime does not ask, and would crash.
        """
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(self.array(shape, dtype, offset))

    @contextlib.contextmanager
    def access(self, write: bool = True) -> Iterator[None]:
        """For the CPU's use of the memory: a DMA-BUF's caches are synchronized with the devices at both ends."""
        flags = _READ | (_WRITE if write else 0)
        if self.fd >= 0 and self.kind == "dma-buf":
            _synchronize(self.fd, flags)
        try:
            yield
        finally:
            if self.kind == "dma-buf":
                _synchronize(self.fd, flags | _END)

    def seal(self) -> None:
        """Let nobody else map it for writing from now on; mappings that exist stay as they are (memfd only)."""
        if self.kind != "memfd":
            raise ValueError("only a memfd can be sealed, not a DMA-BUF")
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _NO_NEW_WRITERS)

    def send(self, connection: socket.socket) -> None:
        """Hand the memory to the process at the other end of a Unix socket, which calls `receive`."""
        socket.send_fds(connection, [_NUMBER.pack(self.size)], [self.fd])

    @classmethod
    def receive(cls, connection: socket.socket) -> Buffer:
        """The buffer that another process sends next; ValueError if it sends something else or nothing more."""
        message, fds, _, _ = socket.recv_fds(connection, _NUMBER.size, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if len(message) != _NUMBER.size or len(fds) != 1:
                raise ValueError("no buffer came: the other side has closed, or sent something else")
            return cls.from_fd(fds[0], *_NUMBER.unpack(message))
        finally:
            for fd in fds:
                os.close(fd)


def _from_heap(size: int) -> int:
    heap = os.open(HEAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        request = _ALLOCATION.pack(size, 0, os.O_RDWR | os.O_CLOEXEC, 0)
        return _ALLOCATION.unpack(fcntl.ioctl(heap, _HEAP_ALLOCATE, request))[1]
    finally:
        os.close(heap)


def _from_memory(size: int) -> int:
    if not hasattr(os, "memfd_create"):
        raise OSError(f"{sys.platform} has neither DMA-BUF heaps nor memfd_create: use multiprocessing.shared_memory")
    fd = os.memfd_create("qtools", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _identify(fd: int) -> tuple[Kind, int]:
    """Kind and bytes of the memory behind a descriptor."""
    try:
        size = os.fstat(fd).st_size
    except (OSError, TypeError, OverflowError):
        raise ValueError(f"{fd!r} is no open file descriptor") from None
    with contextlib.suppress(OSError):
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE:
            return "memfd", size
    with contextlib.suppress(OSError):
        _synchronize(fd, _READ)
        _synchronize(fd, _READ | _END)
        return "dma-buf", os.lseek(fd, 0, os.SEEK_END)
    raise ValueError(f"descriptor {fd} is neither a DMA-BUF nor a memfd whose size is sealed")


def _synchronize(fd: int, flags: int) -> None:
    while True:  # a signal may interrupt it, and then it must be asked for again
        with contextlib.suppress(InterruptedError, BlockingIOError):
            fcntl.ioctl(fd, _SYNC, _NUMBER.pack(flags))
            return
