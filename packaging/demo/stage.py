"""What the demo plays on: models, a configuration, and a vllmd of its own that ends with it, whatever happens.

vllmd runs in a process group of its own, so that Ctrl-C reaches the demo alone, which hands it on once. Should the demo be
killed, the kernel tells vllmd.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOCKET_LONGEST = 100  # bytes; the kernel's limit is 107
UP_WITHIN = 30.0  # seconds for vllmd to listen
_PR_SET_PDEATHSIG = 1

# One model takes about 1.4 GiB on a CPU: the processes of vLLM, mostly. Of a GPU it may take 2 GiB. vLLM would bind each
# model's worker to the same cores, where one that is busy starves the others.
KINDS = {
    "cpu": ('[devices.cpu]\nlimit = "3.5GiB"', 'gpus = ["cpu"]\nenv = { VLLM_CPU_OMP_THREADS_BIND = "nobind" }'),
    "gpu": ('[devices.0]\nlimit = "5GiB"', 'gpus = [0]\nvram = "2GiB"'),
}
CONFIG = """\
# Written by `make run`, which will write it again.
[daemon]
socket = {socket}
state_dir = "./state"
runtime_dir = {runtime}
log_dir = "./log"
cache_dir = "./cache"

[http]
listen = ["127.0.0.1:0"]

# Room for two of the three models.
{budget}

[defaults]
executable = {vllm}
{device}
kv_cache = "64MiB"
max_model_len = 2048
port = "auto"
min_resident = "5s"
args = {{ enforce-eager = true }}
"""
MODELS = ("alpha", "beta", "gamma")
MODEL = '\n[models.{name}]\nmodel = {folder}\ncategory = ["llm"]\n'


class Failed(Exception):
    """The demonstration cannot go on; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where everything is."""

    engine: Path
    home: Path
    runtime: Path

    @property
    def socket(self) -> Path:
        return self.runtime / "vllmd.sock"

    @property
    def log(self) -> Path:
        return self.home / "vllmd.log"

    @property
    def config(self) -> Path:
        return self.home / "vllmd.toml"


# -- set-up -----------------------------------------------------------------------------------------------------------


def prepare(engine: Path, home: Path) -> Stage:
    """Make models and configuration, as far as they are not there. Raises Failed, OSError."""
    if not os.access(engine / "bin/vllm", os.X_OK):
        raise Failed(f"cannot find {engine}/bin/vllm (make engine)")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    stage = Stage(engine, home, choose_runtime(home))
    kinds = [word for name in MODELS for word in ("llama", str(engine / "models" / name))]
    made = subprocess.run(
        [engine / "bin/python", ROOT / "packaging/demo/tiny.py", *kinds], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise Failed(f"cannot make the models: {(made.stderr.strip() or 'no reason given').splitlines()[-1]}")
    stage.config.write_text(write_config(stage))
    return stage


def choose_runtime(home: Path) -> Path:
    """A directory for sockets: in `home`, or where that makes too long a path for a socket, a private one in TMPDIR."""
    near = home / "run"
    if len(os.fsencode(near / "vllmd.sock")) <= SOCKET_LONGEST:
        return near
    name = f"vllmd-{os.getuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
    short = Path(tempfile.gettempdir()) / name
    short.mkdir(mode=0o700, exist_ok=True)
    if short.is_symlink() or short.stat().st_uid != os.getuid():
        raise Failed(f"cannot use {short}: it is somebody else's (set TMPDIR to another directory)")
    return short


def clear(stage: Stage) -> None:
    """Remove what lies outside of `home`."""
    if stage.runtime.parent != stage.home:
        shutil.rmtree(stage.runtime, ignore_errors=True)


def write_config(stage: Stage) -> str:
    """The configuration for what the engine was built for. JSON's strings are TOML's too."""
    kind = "gpu" if (stage.engine / ".engine-stamp").read_text().startswith("gpu") else "cpu"
    budget, device = KINDS[kind]
    text = CONFIG.format(
        socket=json.dumps(str(stage.socket)), runtime=json.dumps(str(stage.runtime)), budget=budget,
        vllm=json.dumps(str(stage.engine / "bin/vllm")), device=device,
    )  # fmt: skip
    return text + "".join(MODEL.format(name=n, folder=json.dumps(str(stage.engine / "models" / n))) for n in MODELS)


# -- vllmd ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(stage: Stage) -> Iterator["subprocess.Popen[bytes]"]:
    """vllmd, listening; ended with all its models on the way out, whatever the reason. Raises Failed."""
    began = stage.log.stat().st_size if stage.log.exists() else 0
    parent = os.getpid()

    def die_with_us() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with stage.log.open("ab") as log:
        daemon = subprocess.Popen(
            [BIN / "vllmd", "--config", stage.config],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
            preexec_fn=die_with_us,  # noqa: PLW1509 - there is one thread
        )  # fmt: skip
    try:
        await_socket(stage, daemon, began)
        yield daemon
        check_alive(stage, daemon, began)
    except Failed:
        check_alive(stage, daemon, began)
        raise
    finally:
        end(daemon)


def await_socket(stage: Stage, daemon: "subprocess.Popen[bytes]", began: int) -> None:
    """Until vllmd accepts connections. Raises Failed with what it said when it ends instead."""
    limit = time.monotonic() + UP_WITHIN
    while True:
        if daemon.poll() is not None:
            raise Failed(f"cannot start vllmd:\n{tail(stage.log, began)}")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(stage.socket)) == 0:
                return
        if time.monotonic() > limit:
            raise Failed(f"cannot reach vllmd on {stage.socket} after {UP_WITHIN:.0f} s (see {stage.log})")
        time.sleep(0.05)


def check_alive(stage: Stage, daemon: "subprocess.Popen[bytes]", began: int) -> None:
    """Raises Failed with vllmd's last words when it has ended, which is then what all else follows from."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        code = daemon.wait(0.5)
        raise Failed(f"vllmd ended by itself (exit code {code}):\n{tail(stage.log, began)}") from None


def end(daemon: "subprocess.Popen[bytes]") -> None:
    """Ask vllmd to end, once, and wait. Each further Ctrl-C is handed on: the next one skips the drain."""

    def hand_on(number: int, frame: object) -> None:
        daemon.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait()


def tail(log: Path, began: int) -> str:
    """What vllmd said in this run, its last lines."""
    with log.open("rb") as file:
        file.seek(began)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-8:]) or "  (it said nothing)"
