"""Buffers against the kernel's own books: descriptors, mappings, pages, and what other processes and runtimes see."""

import gc
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from qtools.npu import buffers, soc
from qtools.npu.buffers import Buffer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="buffers need Linux")

DATA = soc.TABLE.parent
SOURCE = DATA / "zero_copy.cpp"
HEAP = buffers.HEAP
MB = 2**20
COMPILER = shutil.which("g++") or shutil.which("clang++")
# The other process: a letter says what to do, a line of JSON on stdout what came of it.
OTHER = """
import json, os, socket, sys, time
import numpy as np
from qtools.npu.buffers import Buffer

def own():
    return 1024 * int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0])

connection = socket.socket(fileno=int(sys.argv[1]))
while todo := connection.recv(1).decode():
    before, start = own(), time.process_time()
    if todo == "b":
        buffer = Buffer.receive(connection)
        data = buffer.array(buffer.size, np.uint8)
    elif todo == "c":
        data = np.empty(int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little"), np.uint8)
        rest = memoryview(data)
        while rest:
            rest = rest[connection.recv_into(rest):]
    elif todo == "w":
        data[[0, -1]] = 7, 8
    elif todo == "a":
        buffer = Buffer(2**26, 'memfd')
        data = buffer.array(buffer.size, np.uint8)
        data[:] = 5
        buffer.send(connection)
    ends = [int(data[0]), int(data[-1])]
    cpu = time.process_time() - start
    said = dict(ends=ends, cpu=cpu, grown=own() - before, write=data.flags.writeable)
    said["inode"] = os.fstat(buffer.fd).st_ino if todo == "b" else 0
    print(json.dumps(said), flush=True)
"""


def own_memory() -> int:
    """Resident bytes that are this process's alone."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def system_shared() -> int:
    """Bytes of all memfds and the like on this computer."""
    return 1024 * int(re.search(r"Shmem:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:qtools")


@pytest.fixture(autouse=True)
def memory_files(monkeypatch):
    """By default buffers are memfds, which is what these tests look into, even where there is a heap."""
    monkeypatch.setattr(buffers, "HEAP", "/nowhere")


@pytest.fixture
def nothing_left():
    """No descriptor and no mapping more than before."""
    gc.collect()
    before = descriptors(), mappings()
    yield
    gc.collect()
    assert (descriptors(), mappings()) == before


class Other:
    """A process at the other end of a socket."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        command = [sys.executable, "-c", OTHER, str(theirs.fileno())]
        with theirs:
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, text=True)

    def ask(self, todo: str) -> None:
        self.socket.sendall(todo.encode())

    def said(self) -> dict:
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        self.socket.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture
def other(nothing_left):
    process = Other()
    yield process
    process.end()


# -- one process -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from(["u1", "i1", "<u2", "<f2", "<f4", "<i8", "<f8", "?", "<c16"]),
    st.integers(0, 5),
    st.integers(0, 100),
)
def test_arrays_lie_where_the_descriptor_says(shape, dtype, steps, more):
    dtype = np.dtype(dtype)
    offset, count = steps * dtype.itemsize, math.prod(shape)
    with Buffer(offset + count * dtype.itemsize + more + 1) as buffer:
        array = buffer.array(shape, dtype, offset)
        values = np.arange(count).astype(dtype).reshape(shape)
        array[...] = values
        assert (array.shape, array.dtype, array.flags.writeable) == (tuple(shape), dtype, True)
        assert os.pread(buffer.fd, buffer.size + 1, 0) == bytes(offset) + values.tobytes() + bytes(more + 1)
        again = buffer.array(shape, dtype, offset)
        assert again.ctypes.data == array.ctypes.data


def test_arrays_outlive_the_buffer_but_descriptors_do_not(nothing_left):
    with Buffer(100) as buffer:
        fd, array = buffer.fd, buffer.array(25, np.float32)
        array[:] = 3
        assert repr(buffer) == f"Buffer(100 bytes, {buffer.kind}, fd {fd})"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert repr(buffer).endswith("closed)")
    array += 1
    assert (array == 4).all()
    for use in (
        lambda: buffer.fd,
        lambda: buffer.array(1, np.int8),
        lambda: buffer.ort_value(1, np.int8),
        lambda: buffer.seal(),
        lambda: buffer.send(None),
        lambda: buffer.access().__enter__(),
        lambda: Buffer.from_fd(buffer.fd),
    ):
        with pytest.raises(ValueError, match="the buffer is closed"):
            use()
    buffer.close()


@pytest.mark.parametrize("size", [0, -1, 1.5, "1", None])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(ValueError, match="whole number of bytes from 1"):
        Buffer(size)


def test_more_than_there_is_and_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"2\*\*60|1152921504606846976 bytes is more than the \d+ bytes"):
        Buffer(2**60)
    with pytest.raises(ValueError, match="the kind is 'memfd', or 'dma-buf' where"):
        Buffer(1, "ion")


@pytest.mark.parametrize(
    ("shape", "dtype", "offset", "words"),
    [
        (26, np.float32, 0, r"104 bytes at 0 do not fit into 100: shape \(26,\), dtype float32"),
        ((5, 5), np.float32, 4, "100 bytes at 4 do not fit"),
        ((-1, 4), np.float32, 0, "no array of shape"),
        (1, np.float32, 2, "no array of shape"),
        (1, np.float32, -4, "no array of shape"),
        (1, object, 0, "no array of shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shape, dtype, offset, words):
    with Buffer(100) as buffer:
        for make in (buffer.array, buffer.ort_value):
            with pytest.raises(ValueError, match=words):
                make(shape, dtype, offset)


def test_descriptors_of_other_things_are_refused(tmp_path, nothing_left):
    file = (tmp_path / "file").open("w+b")
    ends, sockets = os.pipe(), socket.socketpair()
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    file.write(b"0123456789")
    file.seek(3)
    for fd in (file.fileno(), *ends, *(one.fileno() for one in sockets), unsealed):
        with pytest.raises(ValueError, match=f"descriptor {fd} is neither a DMA-BUF nor a memfd whose size is sealed"):
            Buffer.from_fd(fd)
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 3
    for fd in (-1, 10**6, 10**20, "x", None):
        with pytest.raises(ValueError, match="is no open file descriptor"):
            Buffer.from_fd(fd)
    file.close()
    for fd in (*ends, unsealed):
        os.close(fd)
    for one in sockets:
        one.close()


def test_a_second_buffer_of_the_same_memory_leaves_the_first_alone(nothing_left):
    with Buffer(4096) as first:
        first.array(4096, np.uint8)[:] = 9
        for size in (0, -1, 4097):
            with pytest.raises(ValueError, match="the memory has 4096 bytes"):
                Buffer.from_fd(first.fd, size)
        with Buffer.from_fd(first.fd, 10) as second:
            assert second.fd != first.fd and second.size == 10
            second.array(10, np.uint8)[:] = 1
        assert first.array(4096, np.uint8).sum() == 10 + 9 * 4086


def test_sealed_memory_can_neither_be_cut_off_nor_written_by_others():
    with Buffer(4096) as buffer:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(buffer.fd, size)
        mine = buffer.array(4, np.uint8)
        buffer.seal()
        mine[:] = 6
        with Buffer.from_fd(buffer.fd) as theirs:
            assert not theirs.writable and (theirs.array(4, np.uint8) == 6).all()
            with pytest.raises(ValueError, match="read-only"):
                theirs.array(4, np.uint8)[0] = 1
        with pytest.raises(PermissionError):
            os.pwrite(buffer.fd, b"x", 0)


def test_descriptors_that_may_only_read_give_arrays_that_may_only_be_read():
    with Buffer(16) as buffer:
        fd = os.open(f"/proc/self/fd/{buffer.fd}", os.O_RDONLY)
        with Buffer.from_fd(fd) as theirs:
            assert not theirs.array(16, np.uint8).flags.writeable
        os.close(fd)


def test_ten_thousand_buffers_leave_nothing(nothing_left):
    def cycles(count):
        for number in range(count):
            with Buffer(8192) as buffer, Buffer.from_fd(buffer.fd) as second:
                second.array(2048, np.float32)[::512] = number
            if number % 10 == 0:  # forgotten, not closed
                Buffer(4096).array(1, np.uint8)[:] = 1
        gc.collect()
        return descriptors(), mappings(), own_memory()

    fds, maps, memory = cycles(500)
    fds_then, maps_then, memory_then = cycles(10_000)
    assert (fds_then, maps_then) == (fds, maps)
    assert memory_then - memory < MB  # a page for each would be 40 MB


def test_failures_leave_no_descriptor(monkeypatch, nothing_left):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    for name in ("mmap", "ftruncate"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Cannot allocate"):
            patch.setattr(buffers.mmap if name == "mmap" else os, name, refuse)
            Buffer(4096)


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_quarter_of_a_gigabyte_goes_to_another_process_without_a_byte_copied(other):
    size = 256 * MB
    with Buffer(size) as buffer:
        data = buffer.array(size, np.uint8)
        data[:] = 3
        blocks, mine = os.fstat(buffer.fd).st_blocks, own_memory()

        def hand(todo: str) -> dict:
            start = time.process_time()
            other.ask(todo)
            if todo == "b":
                buffer.send(other.socket)
            elif todo == "c":
                other.socket.sendall(size.to_bytes(8, "little"))
                other.socket.sendall(buffer.array(size, np.uint8))
            here = time.process_time() - start
            said = other.said()
            return said | {"cpu": said["cpu"] + here}

        shared = [hand("b") for _ in range(3)]
        assert all(said["ends"] == [3, 3] and said["write"] for said in shared)
        assert {said["inode"] for said in shared} == {os.fstat(buffer.fd).st_ino}
        assert max(said["grown"] for said in shared) < MB
        assert hand("w")["ends"] == [7, 8] and (data[0], data[-1]) == (7, 8)
        assert os.fstat(buffer.fd).st_blocks == blocks and own_memory() - mine < MB
        copied = hand("c")
        assert copied["grown"] > size - MB  # so the growth of a copy would have been seen
        # Seconds of work of both, which a busy computer does not change as it does those of a clock.
        assert 10 * min(said["cpu"] for said in shared) < copied["cpu"]


def test_what_comes_is_a_buffer_or_refused(nothing_left):
    ours, theirs = socket.socketpair()
    with ours, theirs, Buffer(64) as buffer, open(os.devnull) as null:
        ours.sendall(bytes(8))
        with pytest.raises(ValueError, match="no buffer came"):
            Buffer.receive(theirs)
        socket.send_fds(ours, [b"short"], [buffer.fd])
        with pytest.raises(ValueError, match="no buffer came"):
            Buffer.receive(theirs)
        socket.send_fds(ours, [(64).to_bytes(8, "little")], [null.fileno()])
        with pytest.raises(ValueError, match="is neither a DMA-BUF nor a memfd"):
            Buffer.receive(theirs)
        socket.send_fds(ours, [(65).to_bytes(8, "little")], [buffer.fd])
        with pytest.raises(ValueError, match="the memory has 64 bytes, so the buffer cannot have 65"):
            Buffer.receive(theirs)
        buffer.send(ours)
        with Buffer.receive(theirs) as received:
            assert received.size == 64 and not os.get_inheritable(received.fd)
        ours.close()
        with pytest.raises(ValueError, match="the other side has closed"):
            Buffer.receive(theirs)


def test_a_killed_holder_leaves_its_readers_the_memory_and_nothing_after_them(other):
    named, before = set(os.listdir("/dev/shm")), system_shared()
    other.ask("a")
    received = Buffer.receive(other.socket)
    other.said()
    held = system_shared() - before
    assert held > 48 * MB  # 64, less what others gave back meanwhile
    other.process.kill()
    other.process.wait(timeout=60)
    with received:
        assert (received.array(64 * MB, np.uint8) == 5).all()
    gc.collect()
    assert system_shared() - before < held - 48 * MB
    assert set(os.listdir("/dev/shm")) <= named


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


def session(body: str, output: str) -> ort.InferenceSession:
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[N] x) => (float[{output}] y) {{{body}}}'
    model = parser.parse_model(text)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_onnx_runtime_reads_a_quarter_of_a_gigabyte_where_it_lies():
    largest, count = session("y = ReduceMax <keepdims = 0> (x)", ""), 64 * MB

    def run(value: ort.OrtValue) -> np.ndarray:
        binding = largest.io_binding()
        binding.bind_ortvalue_input("x", value)
        binding.bind_output("y")
        largest.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]

    run(ort.OrtValue.ortvalue_from_numpy(np.ones(8, np.float32)))
    with Buffer(4 * count) as buffer:
        data = buffer.array(count, np.float32)
        data[count // 3] = 17
        before, start = own_memory(), time.process_time()
        value = buffer.ort_value(count, np.float32)
        bound, seconds = own_memory(), time.process_time() - start
        assert value.data_ptr() == data.ctypes.data
        assert run(value) == 17
        assert max(bound, own_memory()) - before < MB
        data[1] = 18
        assert run(value) == 18  # the same memory, still
        gc.collect()  # or what other tests left would go meanwhile
        before, start = own_memory(), time.process_time()
        copied = ort.OrtValue.ortvalue_from_numpy(data.copy())
        assert 10 * seconds < time.process_time() - start
        assert own_memory() - before > 4 * count - MB and copied.data_ptr() != value.data_ptr()


def test_onnx_runtime_writes_into_a_buffer_and_keeps_it_alive():
    negative, count = session("y = Neg (x)", "N"), 4 * MB
    with Buffer(4 * count) as inputs, Buffer(4 * count) as outputs:
        inputs.array(count, np.float32)[:] = np.arange(count)
        binding = negative.io_binding()
        binding.bind_ortvalue_input("x", inputs.ort_value(count, np.float32))
        binding.bind_ortvalue_output("y", outputs.ort_value((count,), np.float32))
        fd = os.dup(outputs.fd)
    gc.collect()
    before = own_memory()
    negative.run_with_iobinding(binding)
    assert own_memory() - before < MB
    with Buffer.from_fd(fd) as outputs:
        assert (outputs.array(count, np.float32) == -np.arange(count, dtype=np.float32)).all()
    os.close(fd)


# -- DMA-BUF, of a kernel that is played -------------------------------------------------------------------------------


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A heap whose DMA-BUFs are unsealed memfds of whole pages; what it was asked for."""
    import fcntl

    heap, asked, made = tmp_path / "system", [], set()
    heap.touch()
    monkeypatch.setattr(buffers, "HEAP", str(heap))
    fields = (slice(0, 8), slice(8, 12), slice(12, 16), slice(16, 24))
    interrupted = itertools.cycle([InterruptedError, BlockingIOError, None])

    def ioctl(fd: int, request: int, data: bytes) -> bytes:
        if request == 0xC0184800 and os.path.samestat(os.fstat(fd), heap.stat()):
            length, zero, flags, heap_flags = (int.from_bytes(data[cut], sys.byteorder) for cut in fields)
            assert (zero, heap_flags, len(data)) == (0, 0, 24) and flags == os.O_RDWR | os.O_CLOEXEC
            if length > 10**6:
                raise OSError(12, "Cannot allocate memory")
            new = os.memfd_create("played")
            made.add(os.fstat(new).st_ino)
            os.ftruncate(new, -(-length // 4096) * 4096)
            asked.append(("allocate", length))
            return data[:8] + new.to_bytes(4, sys.byteorder) + data[12:]
        if request == 0x40086200 and os.fstat(fd).st_ino in made:
            if error := next(interrupted):
                raise error
            asked.append(("sync", int.from_bytes(data, sys.byteorder)))
            return data
        raise OSError(25, "Inappropriate ioctl for device")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    return asked


def test_a_heap_is_asked_first_and_the_caches_are_synchronized(kernel, nothing_left):
    with Buffer(5000) as buffer:
        assert (buffer.kind, buffer.size, os.fstat(buffer.fd).st_size) == ("dma-buf", 5000, 8192)
        array = buffer.array(5000, np.uint8)
        with buffer.access():
            array[:] = 4
        with buffer.access(write=False):
            assert array.sum() == 20_000
        with pytest.raises(ZeroDivisionError), buffer.access():
            raise ZeroDivisionError
        assert kernel == [("allocate", 5000)] + [("sync", flag) for flag in (3, 7, 1, 5, 3, 7)]
        with pytest.raises(ValueError, match="only a memfd can be sealed"):
            buffer.seal()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            buffer.send(ours)
            with Buffer.receive(theirs) as received:
                assert (received.kind, received.size) == ("dma-buf", 5000)
                assert (received.array(5000, np.uint8) == 4).all()
        del array


def test_a_heap_that_refuses_is_closed_again(kernel, nothing_left):
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Buffer(2 * 10**6)


@pytest.mark.skipif(not os.access(HEAP, os.R_OK), reason="there is no DMA-BUF heap")
def test_a_real_heap_gives_memory_that_is_shared_all_the_same(monkeypatch, other):
    monkeypatch.setattr(buffers, "HEAP", HEAP)
    with Buffer(5000) as buffer:
        assert buffer.kind == "dma-buf" and os.readlink(f"/proc/self/fd/{buffer.fd}").startswith("/dmabuf:")
        data = buffer.array(5000, np.uint8)
        with buffer.access():
            data[:] = 3
        other.ask("b")
        buffer.send(other.socket)
        assert other.said()["inode"] == os.fstat(buffer.fd).st_ino
        other.ask("w")
        assert other.said()["ends"] == [7, 8]
        with buffer.access(write=False):
            assert (data[0], data[1], data[-1]) == (7, 3, 8)
        assert buffer.ort_value(1250, np.float32).data_ptr() == data.ctypes.data
    for _ in range(1000):
        with Buffer(5000) as buffer, Buffer.from_fd(buffer.fd) as second:
            second.array(1, np.uint8)[:] = 1
    del data


def test_memory_files_need_no_synchronization(kernel):
    with Buffer(100, "memfd") as buffer, buffer.access():
        assert buffer.kind == "memfd"
    assert kernel == []


def test_where_there_is_no_such_memory_the_error_says_what_to_use(monkeypatch):
    monkeypatch.setattr(buffers, "HEAP", "/nowhere")
    with pytest.raises(ValueError, match="'dma-buf' where /nowhere can be opened"):
        Buffer(1, "dma-buf")
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(OSError, match=r"neither DMA-BUF heaps nor memfd_create: use multiprocessing\.shared_memory"):
        Buffer(1)


def test_the_module_can_be_imported_without_fcntl(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("buffers_on_windows", buffers.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "buffers_on_windows", module)
    spec.loader.exec_module(module)
    assert module.fcntl is None


@pytest.mark.skipif(not COMPILER or not Path("/usr/include/linux/dma-heap.h").exists(), reason="no compiler or headers")
def test_requests_and_structures_are_those_of_the_kernel_headers(tmp_path):
    names = "DMA_HEAP_IOCTL_ALLOC DMA_BUF_IOCTL_SYNC DMA_BUF_SYNC_READ DMA_BUF_SYNC_WRITE DMA_BUF_SYNC_END"
    seals = "F_SEAL_SHRINK|F_SEAL_GROW F_SEAL_FUTURE_WRITE F_SEAL_WRITE|F_SEAL_FUTURE_WRITE"
    parts = ("len", "fd", "fd_flags", "heap_flags")
    numbers = [*names.split(), *seals.split(), "sizeof(dma_heap_allocation_data)"]
    numbers += [f"offsetof(dma_heap_allocation_data, {part})" for part in parts]
    headers = ("cstdio", "cstddef", "fcntl.h", "linux/dma-buf.h", "linux/dma-heap.h")
    code = "".join(f"#include <{name}>\n" for name in headers) + "int main() {\n"
    code += "".join(f'std::printf("%llu ", (unsigned long long)({number}));\n' for number in numbers) + "}\n"
    (tmp_path / "print.cpp").write_text(code)
    subprocess.run([COMPILER, "-D_GNU_SOURCE", "-o", tmp_path / "print", tmp_path / "print.cpp"], check=True)
    printed = subprocess.run([tmp_path / "print"], capture_output=True, text=True, check=True).stdout.split()
    ours = [buffers._HEAP_ALLOCATE, buffers._SYNC, buffers._READ, buffers._WRITE, buffers._END]
    ours += [buffers._FIXED_SIZE, buffers._NO_NEW_WRITERS, buffers._READ_ONLY, buffers._ALLOCATION.size, 0, 8, 12, 16]
    assert [int(number) for number in printed] == ours


# -- the C++ -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not COMPILER or not Path("/usr/include/linux/dma-heap.h").exists(), reason="no compiler or headers")
def test_the_program_is_valid_and_the_one_of_the_article_is_not(tmp_path):
    strict = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([*strict, "-fsyntax-only", SOURCE], check=True)
    subprocess.run([*strict, "-DTRY_IT", "-o", tmp_path / "try", SOURCE], check=True)
    done = subprocess.run([tmp_path / "try"], capture_output=True, text=True)
    if os.access(HEAP, os.R_OK):
        assert (done.returncode, done.stdout) == (0, "1048576 bytes shared, none copied\n")
    else:
        assert (done.returncode, done.stdout) == (2, "") and "no buffer: /dev/dma_heap/system: " in done.stderr
    printed = re.search(r"#if 0.*?\n(.*?)#endif", SOURCE.read_text(), re.S)[1]
    article = tmp_path / "article.cpp"
    article.write_text("#include <fcntl.h>\n#include <sys/ioctl.h>\n#include <sys/mman.h>\n" + printed)
    command = [COMPILER, "-std=c++20", "-fsyntax-only", article]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode and "buffer_" in refused.stderr and "ion_allocation_data" in refused.stderr


def test_every_marked_line_of_the_article_has_its_fault():
    text = SOURCE.read_text()
    printed, rest = re.search(r"#if 0.*?\n(.*?)#endif\n(.*?)\n\n", text, re.S).groups()
    marked = re.findall(r"// (\d)$", printed, re.M)
    assert marked == re.findall(r"^// (\d)  \S", rest, re.M) == [str(number) for number in range(1, 8)]


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_the_recipe_measures_every_way_and_target(monkeypatch):
    monkeypatch.syspath_prepend(DATA / "recipes")
    spec = importlib.util.spec_from_file_location("zero_copy", DATA / "recipes/zero_copy.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    assert [recipe.SIZES[0], recipe.SIZES[-1]] == [2**10, 2**28]
    values = recipe.measure((4 * MB,), 1)
    ways = ["process_zero", "process_kept", "process_copy", "runtime_zero", "runtime_copy"]
    assert set(values) == {f"{way}_{what}_{4 * MB}" for way in ways for what in ("us", "reading_us", "memory")}
    assert values[f"process_copy_memory_{4 * MB}"] > 3 * MB
    assert max(values[f"{way}_memory_{4 * MB}"] for way in ways if "copy" not in way) < MB
