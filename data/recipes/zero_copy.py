"""Memory handed to another process and to ONNX Runtime, and the same bytes copied, from 1 KB to 256 MB; half a minute.

python data/recipes/zero_copy.py data/results/measured/08_zero_copy.json
"""

from __future__ import annotations

import gc
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from record import record

from qtools.npu.buffers import Buffer

SIZES = [4**power for power in range(5, 15)]
ROUNDS = 9
_NUMBER = struct.Struct("=Q")
_REPORT = struct.Struct("=qd")


class HandOver(NamedTuple):
    """Seconds until the bytes can be used, bytes of memory they take there, seconds to read them all once."""

    seconds: float
    memory: int
    reading: float


def own_memory() -> int:
    """Resident bytes that are this process's alone: a copy adds to them, shared memory does not."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[1])


def serve(connection: socket.socket) -> None:
    """The other process: takes what comes, answers with its first and last byte, then reports."""
    kept = old = Buffer(8)
    while how := connection.recv(1):
        before = own_memory()
        if how == b"z":
            kept, old = Buffer.receive(connection), kept
        data = received(connection) if how == b"c" else kept.array(kept.size, np.uint8)
        connection.sendall(bytes([data[0], data[-1]]))
        memory, start = own_memory() - before, time.perf_counter()
        int(data.view(np.uint64).max())
        reading = time.perf_counter() - start
        del data  # nothing is left to be done when the next one comes
        old.close()
        connection.sendall(_REPORT.pack(memory, reading))


def received(connection: socket.socket) -> np.ndarray:
    """Bytes out of a socket, their number first."""
    data = np.empty(*_NUMBER.unpack(connection.recv(_NUMBER.size, socket.MSG_WAITALL)), np.uint8)
    rest = memoryview(data)
    while rest:
        rest = rest[connection.recv_into(rest) :]
    return data


def to_process(connection: socket.socket, buffer: Buffer, way: str) -> HandOver:
    """Give the process that runs `serve` a buffer's descriptor, its bytes, or a hint that it has the buffer already."""
    data = buffer.array(buffer.size, np.uint8)
    start = time.perf_counter()
    connection.sendall(way[:1].encode())
    if way == "copy":
        connection.sendall(_NUMBER.pack(buffer.size))
        connection.sendall(data)
    elif way == "zero":
        buffer.send(connection)
    seen = connection.recv(2)
    seconds = time.perf_counter() - start
    if seen != bytes([data[0], data[-1]]):
        raise RuntimeError("the other process saw other bytes")
    return HandOver(seconds, *_REPORT.unpack(connection.recv(_REPORT.size, socket.MSG_WAITALL)))


def to_runtime(session: object, buffer: Buffer, way: str) -> HandOver:
    """Bind a buffer, or a copy of it, as input of a session that looks for the largest number."""
    import onnxruntime as ort

    floats, before = buffer.array(buffer.size // 4, np.float32), own_memory()
    start = time.perf_counter()
    value = ort.OrtValue.ortvalue_from_numpy(floats.copy()) if way == "copy" else buffer.ort_value(floats.shape, "f4")
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", value)
    binding.bind_output("y")
    bound = time.perf_counter()
    memory = own_memory() - before
    session.run_with_iobinding(binding)
    reading = time.perf_counter() - bound
    if binding.copy_outputs_to_cpu()[0] != floats.max():
        raise RuntimeError("the session saw other numbers")
    return HandOver(bound - start, memory, reading)


def runtime() -> object:
    """A session for `to_runtime`."""
    import onnxruntime as ort
    from onnx import parser

    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[N] x) => (float[] y) { y = ReduceMax <keepdims = 0> (x) }'
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rounds(ways: Sequence[str], call: Callable[[str], HandOver], count: int) -> dict[str, HandOver]:
    """By way, in turns: the least seconds and the most memory of the rounds behind a first one."""
    found: dict[str, list[HandOver]] = {way: [] for way in ways}
    for _ in range(count + 1):
        for way, each in found.items():
            gc.collect()
            each.append(call(way))
    columns = {way: list(zip(*each[1:])) for way, each in found.items()}
    return {way: HandOver(min(one), max(two), min(three)) for way, (one, two, three) in columns.items()}


def measure(sizes: Sequence[int] = SIZES, count: int = ROUNDS) -> dict[str, float]:
    """By target, way and size, such as ``process_zero_us_1024``; microseconds, and bytes of memory.

    To a process: 'zero' sends a descriptor, which is mapped there, 'kept' tells it to look at what it has mapped
    already, 'copy' sends the bytes.  To ONNX Runtime: 'zero' binds the buffer as an input, 'copy' a copy of it.
    """
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--serve", str(theirs.fileno())]
    session, values = runtime(), {}
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as other:
        theirs.close()
        for size in sizes:
            with Buffer(size) as buffer:
                buffer.array(size // 4, np.float32)[:] = np.arange(size // 4)
                found = {
                    "process": rounds(("zero", "kept", "copy"), lambda way, b=buffer: to_process(ours, b, way), count),
                    "runtime": rounds(("zero", "copy"), lambda way, b=buffer: to_runtime(session, b, way), count),
                }
            for target, ways in found.items():
                for way, one in ways.items():
                    values[f"{target}_{way}_us_{size}"] = round(1e6 * one.seconds, 1)
                    values[f"{target}_{way}_reading_us_{size}"] = round(1e6 * one.reading, 1)
                    values[f"{target}_{way}_memory_{size}"] = one.memory
        ours.shutdown(socket.SHUT_RDWR)
        other.wait(timeout=60)
    return values


def main() -> None:
    """Write what was measured where the chapter looks for it."""
    if sys.argv[1] == "--serve":
        return serve(socket.socket(fileno=int(sys.argv[2])))
    load, values = os.getloadavg()[0], measure()
    record(sys.argv[1], values, load=load)


if __name__ == "__main__":
    main()
