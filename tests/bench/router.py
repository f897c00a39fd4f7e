"""vllm-router, the peer that the gateway is measured beside: written in Rust, one process, made for many requests.

Installed when first needed into an environment of its own, .bench/router, at the version that the targets are about.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.bench_start import free_port
from tests.bench.native import kept

VERSION = "0.1.17"
INSTALL_LIMIT = 300.0  # seconds


class NotHadError(Exception):
    """vllm-router cannot be had here: why."""


def command() -> Path:
    """Its command, installed if need be. Raises NotHadError."""
    folder = kept() / "router"
    found, stamp = folder / "bin/vllm-router", folder / f"{VERSION}.ready"
    if stamp.exists():
        return found
    install = [str(folder / "bin/python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_LIMIT)
        subprocess.run([*install, f"vllm-router=={VERSION}"], check=True, timeout=INSTALL_LIMIT, capture_output=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        raise NotHadError(f"cannot install vllm-router {VERSION}: {said[-1] if said else error}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotHadError(f"cannot install vllm-router {VERSION}: {error}") from None
    stamp.touch()
    return found


@contextmanager
def router(program: Path, engine: int, log: Path) -> Iterator[tuple[int, int]]:
    """Port and process of a router with one engine, of which it logs as it does by default. It may not listen yet."""
    port, metrics = free_port(), free_port()
    words = [
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--prometheus-port",
        metrics,
        "--worker-urls",
        f"http://127.0.0.1:{engine}",
    ]
    words += ["--policy", "round_robin", "--max-concurrent-requests", 4096]
    with log.open("ab") as file, subprocess.Popen([program, *map(str, words)], stdout=file, stderr=file) as process:
        try:
            yield port, process.pid
        finally:
            process.terminate()
