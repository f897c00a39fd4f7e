"""The benchmarks' own programs: stub.c, an engine that costs nothing, and load.c, many clients in one thread.

Compiled when first needed, into .bench/, which git does not see; g++, which the engine's set-up asks for, brings cc.
"""

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.daemon import ROOT

HERE = Path(__file__).parent
KEPT = ROOT / ".bench"
LIMIT = 120.0  # seconds, for anything that should take a few
Address = int | Path  # a port of this machine, or a unix socket


@dataclass(frozen=True, slots=True)
class Load:
    """What load.c found; its head says what each means. Times in seconds."""

    requests: int
    chunks: int
    all: int
    errors: int
    error: str
    seconds: float
    p50: float
    p99: float
    max: float
    connect: float
    first: float


@dataclass(frozen=True, slots=True)
class Tagged:
    """A request as the stub saw it, CLOCK_MONOTONIC in nanoseconds. `closed` is 0 while its peer is there."""

    arrived: int
    closed: int


def kept() -> Path:
    """The folder for what is made once. It hides itself from git."""
    KEPT.mkdir(exist_ok=True)
    (KEPT / ".gitignore").write_text("*\n")
    return KEPT


def program(name: str) -> Path:
    """The program of NAME.c, compiled anew when its source is newer."""
    source, binary = HERE / f"{name}.c", kept() / name
    if binary.exists() and binary.stat().st_mtime > source.stat().st_mtime:
        return binary
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("cannot compile the benchmark's programs: there is no C compiler (apt-get install gcc)")
    made = binary.with_suffix(f".{os.getpid()}")  # another run may be using the old one, or making its own
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", made, source], check=True, timeout=LIMIT)
    return made.rename(binary)


@contextmanager
def stub() -> Iterator[int]:
    """A stub on a port of its own."""
    with subprocess.Popen([program("stub")], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split()[1])
        finally:
            process.terminate()


def load(kind: str, port: int, key: str = "", /, **options: float) -> Load:
    """Run load.c to its end: "plain" or "stream", with its options."""
    words = [
        str(word)
        for name, value in options.items()
        for word in (f"--{name}", float(value) if isinstance(value, float) else int(value))
    ]
    command = [str(program("load")), kind, str(port), "--key", key, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=LIMIT, check=True)
    return Load(**json.loads(done.stdout))


def tagged(address: Address) -> dict[str, Tagged]:
    """The tagged requests that a stub has seen, asked of itself."""
    rows = [line.split() for line in fetch(address, "/bench/requests")[1].decode().splitlines()]
    return {name: Tagged(int(arrived), int(closed)) for name, arrived, closed in rows}


def fetch(address: Address, path: str, key: str = "") -> tuple[int, bytes]:
    """Status and body of a GET. Raises OSError, and ValueError for what is no answer."""
    with connect(address) as sock:
        sock.sendall(request("GET", path, key, close=True))
        raw = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1] if b" " in head else b""), body


def connect(address: Address) -> socket.socket:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET)
    sock.settimeout(LIMIT)
    try:
        sock.connect(str(address) if isinstance(address, Path) else ("127.0.0.1", address))
    except OSError:
        sock.close()
        raise
    return sock


def request(method: str, path: str, key: str, value: Any = None, *, close: bool = False) -> bytes:
    """The bytes of a request, with JSON when there is a value."""
    body = b"" if value is None else json.dumps(value).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"Authorization: Bearer {key}"] * bool(key) + ["Connection: close"] * close
    lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"] * bool(body)
    return "\r\n".join([*lines, "", ""]).encode() + body
