"""`make run`: two real vLLM models in one memory budget: started, shown, asked; a third is refused; Ctrl-C ends all.

    demo.py ENGINE [DIR]      ENGINE as engine.sh makes it; configuration, state and logs in DIR (default: .run)

vllmd runs in a process group of its own and vllmctl ignores SIGINT, so that Ctrl-C reaches this program alone, which
hands it on once. Should this program be killed, the kernel tells vllmd. With VLLMD_DEMO_ONCE set, or without a terminal
on stdin, all is stopped as soon as it was shown.
"""

import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import shlex
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOCKET_LONGEST = 100  # bytes; the kernel's limit is 107
UP_WITHIN, ANSWER_WITHIN = 30.0, 120.0  # seconds for vllmd to listen, for a model to answer
NO_ROOM = 5  # vllmctl's exit code
_PR_SET_PDEATHSIG = 1
QUESTION = "What is the memory of a GPU for?"

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


# -- the demonstration ------------------------------------------------------------------------------------------------


def show(stage: Stage) -> None:
    """Start two, look, try the third, ask both. Raises Failed."""
    say(f"vllmd runs with {brief(stage.config)}; its log is {brief(stage.log)}")
    if control(stage, "start", "alpha", "beta"):
        raise Failed(f"cannot start both models (see above, and {brief(stage.home / 'log')})")
    control(stage, "status")
    say("\nA third one does not fit into the budget, and is refused at once:")
    if (code := control(stage, "start", "gamma")) != NO_ROOM:
        raise Failed(f"cannot show the refusal: vllmctl ended with code {code}, not {NO_ROOM}")
    say("\nOne chat request through each. Their weights are random: what they say is noise, how they serve is real.")
    for model in read_status(stage)["models"]:
        if model["state"] == "ready":
            began = time.monotonic()
            answer = ask(model)
            say(f"\n{model['name']} at {model['endpoint']}, {time.monotonic() - began:.2f} s")
            say(f"  question: {QUESTION}\n  answer:   {printable(answer)}")


def control(stage: Stage, *words: str) -> int:
    """Run vllmctl, visibly; its exit code."""
    say(f"\n$ vllmctl {shlex.join(words)}")
    return vllmctl(stage, *words).returncode


def read_status(stage: Stage) -> Any:
    """What `vllmctl status --json` prints. Raises Failed."""
    done = vllmctl(stage, "status", "--json", stdout=subprocess.PIPE)
    if done.returncode:
        raise Failed("cannot read the status (see above)")
    return json.loads(done.stdout)


def vllmctl(stage: Stage, *words: str, stdout: int | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run it to its end, deaf to Ctrl-C."""
    command = [str(BIN / "vllmctl"), "--socket", str(stage.socket), *words]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=stdout, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip


def ask(model: dict[str, Any]) -> str:
    """One chat request to the model's own endpoint; the answer. Raises Failed."""
    body = {"model": model["name"], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    connection = http.client.HTTPConnection(model["endpoint"].removeprefix("http://"), timeout=ANSWER_WITHIN)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    except OSError as error:
        raise Failed(f"cannot ask {model['name']} at {model['endpoint']}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise Failed(f"cannot ask {model['name']}: HTTP {response.status}: {data.decode(errors='replace')[:300]}")
    return str(json.loads(data)["choices"][0]["message"]["content"])


def printable(text: str) -> str:
    """Noise may be anything; a terminal must not obey it."""
    return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in text)


def say_on(stage: Stage) -> None:
    """How to go on by oneself."""
    ready = next(model for model in read_status(stage)["models"] if model["state"] == "ready")
    body = json.dumps({"model": ready["name"], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24})
    control_ = shlex.quote(brief(BIN / "vllmctl"))
    url = f"{ready['endpoint']}/v1/chat/completions"
    say(f"""
Both serve. In another terminal, in {Path.cwd()}:

    export VLLMD_SOCKET={shlex.quote(str(stage.socket))}
    {control_} status --watch
    {control_} stop alpha && {control_} start gamma
    {control_} logs -f beta
    curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}
""")


def say(text: str) -> None:
    print(text, flush=True)


def brief(path: Path) -> str:
    """The path as seen from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(engine: Path, home: Path) -> None:
    """Everything, in its order. Raises Failed, OSError, KeyboardInterrupt when that comes before all was shown."""
    stage = prepare(engine, home)
    try:
        with running(stage) as daemon:
            show(stage)
            say_on(stage)
            if os.environ.get("VLLMD_DEMO_ONCE") or not sys.stdin.isatty():
                say("Stopping everything.")
                return
            say("Ctrl-C stops everything.")
            with contextlib.suppress(KeyboardInterrupt):
                daemon.wait()
                return
            say(" Stopping everything (Ctrl-C again: without letting requests finish).")
    finally:
        if stage.runtime.parent != stage.home:
            shutil.rmtree(stage.runtime, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Exit code 0 when all was shown, 1 when something failed, 2 for a wrong command line, 130 after an early Ctrl-C."""
    if not 1 <= len(arguments) <= 2:
        print("usage: demo.py ENGINE [DIR]", file=sys.stderr)
        return 2
    engine, home = Path(arguments[0]).absolute(), Path(arguments[1] if arguments[1:] else ROOT / ".run").absolute()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run(engine, home)
    except KeyboardInterrupt:
        return 130
    except (Failed, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    say("All stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
