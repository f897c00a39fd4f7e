#!/usr/bin/env python3
"""`vllm serve MODEL --flags` without a model: real processes, signals, sockets and words, ready in a third of a second.

The tree is vLLM's: the API server (this process, the leader) with a resource tracker and VLLM::EngineCore, which has
VLLM::Worker under it; all in the leader's session and group. It listens only at the end of its start. What goes wrong
is asked for by the environment, so by `env` of a model:

| variable | what it does |
|---|---|
| FAKE_START_S=0.3 | seconds of the whole start, shared out over the phases |
| FAKE_FAIL=ONE | the start fails with vLLM's words: kv path arch package oom free profiling gated port |
| FAKE_CRASH_AT=PHASE | SIGKILL of whose phase it is: import, config, http are the leader's, engine the engine's, |
| | worker, download, load, profile, compile, graphs a worker's |
| FAKE_STALL_AT=PHASE | silent for ever in that phase |
| FAKE_EXIT_AFTER=S[:CODE] | S seconds after ready all exit with CODE (default 1; below zero: by that signal) |
| FAKE_ONCE=FILE | the four faults above only while FILE is absent; the first start makes it |
| FAKE_IGNORE_TERM=1 | SIGTERM and SIGINT do nothing |
| FAKE_DEATH_S=0.5 | from the engine's death to the leader's exit 0; /health is 503 meanwhile |
| FAKE_HEALTH_LIE=1 | /health stays 200 when the engine is gone, and the leader stays too |
| FAKE_ESCAPE=1 | a grandchild leaves the session, holds 16 MiB and outlives all (120 s at most) |
| FAKE_LEAK_PROCESS=1 | a child stays in the group after a clean exit (120 s at most) |
| FAKE_MEMORY=BYTES | held and touched by each worker; given back while asleep |
| FAKE_SLEEP=ONE | of its sleep: refused, stuck (no waking), garbled (other answers after it), leaky (keeps its memory) |
| FAKE_EAT=FILE | each worker takes memory without end once FILE is there |
| FAKE_WORKERS=N | as --tensor-parallel-size N |
| FAKE_KV_PER_TOKEN=BYTES | instead of what config.json says |
| FAKE_TOTAL=BYTES | memory of the device, instead of the machine's |
| FAKE_DEVICE=cuda | the lines of a GPU: graphs, Available KV cache memory, Actual usage |
| FAKE_SHARDS=N, FAKE_DOWNLOAD=N | steps of the loader's bar; files fetched from the hub first |
| FAKE_TOKENS_PER_S=R, FAKE_PREFILL_S=S | pace of an answer; wait before its first token |
| FAKE_ANSWER=TEXT | what the model says, to its stop |
| FAKE_LINES=N | log lines after ready |
| FAKE_HOSTILE_LOG=1 | ANSI, NUL, invalid UTF-8, a line of 1 MB, one without an end |
| FAKE_METRICS_BYTES=N | /metrics filled up to this size (the real one has 52,000) |

Signals, as in vLLM: before the engine is spawned SIGTERM kills; from then to ready it is swallowed, SIGINT ends. Once
serving both mean stop: at once, or after --shutdown-timeout of drain; a cap that is hit with requests left kills the
engine and leaves the leader hanging.
"""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.fake import texts
from tests.fake.api import Api
from tests.fake.engine import run_engine
from tests.fake.faults import Faults, live, rename, spawn_escapee, spawn_leftover
from tests.fake.flags import Options, known, parse
from tests.fake.front import accept
from tests.fake.model import load_model
from tests.fake.texts import FAILURES, StartError, bare, log, log_api_failure, trace
from tests.fake.wire import Line, fork
from tests.fake.worker import Start

ROUTES = ("/load", "/version", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")
imported = False
read: tuple[dict[str, str], Faults] | None = None


def main(argv: list[str] | None = None) -> None:
    """The command `vllm`; ends the process."""
    words = sys.argv[1:] if argv is None else argv
    faults = faults_now()
    import_vllm(faults)
    if words in (["--version"], ["-v"]):
        print("0.32.0+cpu")
        sys.exit(0)
    if any(word.partition("=")[0] in ("--help", "-h") for word in words):
        print("usage: vllm serve [model_tag] [options]\n")
        print("\n".join(f"  --{name.replace('_', '-')}" for name in sorted(known())))
        sys.exit(0)
    options = parse(words)
    if faults.workers:
        options = options._replace(workers=faults.workers)
    serve(options, faults)


def faults_now() -> Faults:
    """What the environment asks for. Read once as long as it stays the same: FAKE_ONCE is used up by reading. One that waited
    warm has another environment when it is taken."""
    global read
    asked = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
    if read is None or read[0] != asked:
        read = asked, Faults.read(asked)
    return read[1]


def import_vllm(faults: Faults) -> None:
    """The phase of Python's imports: once in a process, so that one which waits warm has it behind it."""
    global imported
    if not imported:
        live("import", faults)
    imported = True


def serve(options: Options, faults: Faults) -> NoReturn:
    """The API server's life."""
    logo(options)
    listener = None
    try:
        live("config", faults)
        fail("config", options, faults)
        model = load_model(options)
        log("APIServer", "model.py:733", f"Resolved architecture: {model.arch}")
        log("APIServer", "model.py:2152", f"Using max model len {options.max_model_len or model.max_len}")
        listener = bind(options)
        fail("bind", options, faults)
    except (StartError, OSError) as error:
        cause = str(error) if isinstance(error, StartError) else f"OSError: {error}"
        log_api_failure(cause, engine=False)
        os._exit(1)
    if faults.leak_process:
        spawn_leftover()
    Leader(options, faults, listener).run(Start(options, faults, model))


def logo(options: Options) -> None:
    """The first lines."""
    art = f"\n ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.32.0\n  █▄█▀ █     █     █     █  model   {options.model}\n"
    log("APIServer", "api_utils.py:347", art)
    secret = {"api_key", "hf_token"}
    shown = {name: "***" if name in secret else value for name, value in options.given.items()}
    log("APIServer", "api_utils.py:286", f"non-default args: { ({'model_tag': options.model} | shown)!r}")


def fail(phase: str, options: Options, faults: Faults) -> None:
    """StartError when FAKE_FAIL asks for one of this phase."""
    failure = FAILURES.get(faults.fail)
    if faults.fail and failure is None:
        raise StartError(f"ValueError: FAKE_FAIL={faults.fail} is none of {', '.join(FAILURES)}")
    if failure and failure.phase == phase:
        raise StartError(failure.cause.format(model=options.model, arch="NoSuchForCausalLM"))


def bind(options: Options) -> socket.socket:
    """Bound, not yet listening. OSError where somebody listens already; two that are only bound do not collide yet."""
    if options.uds:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(options.uds)
        return listener
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((options.host, options.port))
    return listener


class Leader:
    """The API server from the spawn of its engine to its exit."""

    def __init__(self, options: Options, faults: Faults, listener: socket.socket) -> None:
        self.options, self.faults, self.listener = options, faults, listener
        self.engine_pid = 0
        self.workers: list[int] = []
        self.api: Api | None = None
        self.stopping = False

    def run(self, start: Start) -> NoReturn:
        """Start all, then wait for a signal."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if self.faults.ignore_term else self.heed)
        inner = Line(self.listener)  # only to have it closed in the children: the port is free when the leader is gone
        _, self.tracker = fork(track, inner)
        self.engine_pid, engine = fork(lambda line: run_engine(line, start), inner)
        self.open(engine, self.await_engine(engine))
        self.after_ready()
        while True:
            signal.pause()

    def await_engine(self, engine: Line) -> dict[str, Any]:
        """What the engine says when it is up; exit 1 when it is gone before."""
        while heard := engine.hear():
            for message in heard:
                if "up" in message:
                    return message
                self.workers = message["workers"]
        os.waitpid(self.engine_pid, 0)
        log_api_failure("", engine=True)
        os._exit(1)

    def open(self, engine: Line, up: dict[str, Any]) -> None:
        """The phase http: listen, and say so."""
        live("http", self.faults)
        options = self.options
        where = f"unix:{options.uds}" if options.uds else f"http://{options.host or '0.0.0.0'}:{options.port}"
        log("APIServer", "entry.py:140", f"Starting vLLM server on {where}")
        log("APIServer", "launcher.py:186", "Available routes are:")
        for path in ROUTES:
            log("APIServer", "launcher.py:195", f"Route: {path}, Methods: {'POST' if 'comp' in path else 'GET'}")
        bare(f"INFO:     Started server process [{os.getpid()}]\nINFO:     Waiting for application startup.")
        self.api = Api(options, self.faults, engine, up)
        try:
            self.listener.listen(2048)
        except OSError as error:
            bare(trace(texts.API_FRAMES, f"OSError: {error}"))
            self.quit(1)
        bare("INFO:     Application startup complete.")
        threading.Thread(target=accept, args=(self.listener, self.api, self.quiet), daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()

    def quiet(self, path: str) -> bool:
        """Whether an access line is left out."""
        options = self.options
        return options.quiet_access or path in options.quiet_paths or options.log_level not in ("info", "debug")

    def after_ready(self) -> None:
        """What was asked for once it serves."""
        faults = self.faults
        if faults.escape:
            spawn_escapee()
        for n in range(faults.lines):
            log("APIServer", "loggers.py:259", f"Engine 000: Avg generation throughput: {n}.0 tokens/s")
        if faults.hostile_log:
            texts.write(1, "\x1b[31mred\x1b[0m \x1b]0;title\x07\n nul \0 here\n\udcff\udcfe not utf-8 \udcc3\n")
            texts.write(1, "x" * (1 << 20) + "\nno end")
        if faults.exit_after:
            after, _, code = faults.exit_after.partition(":")
            timer = threading.Timer(float(after), self.quit, [int(code or 1)])
            timer.daemon = True
            timer.start()

    def heed(self, number: int, _: FrameType | None) -> None:
        """SIGTERM and SIGINT: swallowed or deadly during the start, a stop afterwards, nothing the second time."""
        if self.api is None:
            if number == signal.SIGINT:
                self.quit(-signal.SIGINT)
        elif not self.stopping:
            self.stopping = True
            threading.Thread(target=self.stop, daemon=True).start()

    def stop(self) -> None:
        """Drain as long as --shutdown-timeout allows, then end everything."""
        api, cap = self.api, self.options.shutdown_timeout
        assert api is not None
        log("APIServer", "launcher.py:254", "[shutdown] API server: shutdown triggered")
        mode = f"mode={'drain' if cap else 'abort'} timeout={cap:.0f}s"
        log("APIServer", "launcher.py:270", f"[shutdown] API server: stopping engine client {mode}")
        with api.lock:
            api.draining = True
            drained = api.idle.wait_for(lambda: not api.open, timeout=cap) if cap else True
        api.mute = not drained
        self.kill()
        if not drained:
            # As measured: the engine is killed at the cap, nobody tells the clients, and the server waits for them.
            with api.lock:
                api.idle.wait_for(lambda: not api.open)
        bare("INFO:     Shutting down\nINFO:     Waiting for application shutdown.")
        with api.lock:  # every open request hears of the engine's death before the process goes
            api.idle.wait_for(lambda: not api.open, timeout=1)
        bare("INFO:     Application shutdown complete.")
        self.quit(0)

    def watch(self) -> None:
        """Hear the engine; when it is gone unasked, answer 503 a while and exit 0, as vLLM does."""
        assert self.api is not None
        self.api.listen()
        if self.stopping or self.faults.health_lie:
            return
        dead = f"vllm.v1.engine.exceptions.EngineDeadError: {texts.DEAD}"
        last = "AsyncLLM output_handler failed.\n" + trace(texts.API_FRAMES, dead)
        log("APIServer", "async_llm.py:906", last, "ERROR")
        if os.environ.get("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH") == "1":
            return
        time.sleep(self.faults.death_s)
        log("APIServer", "launcher.py:254", "[shutdown] API server: shutdown triggered")
        self.quit(0)

    def kill(self) -> None:
        """End the engine and its workers at once; a stopped one too."""
        for pid in (self.engine_pid, *self.workers):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def quit(self, code: int) -> NoReturn:
        """Leave with all children; below zero by that signal."""
        if self.engine_pid:
            self.kill()
        if code < 0:
            if threading.current_thread() is threading.main_thread():
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code % 256)


def track(line: Line) -> None:
    """The resource tracker: deaf to SIGTERM and SIGINT, gone when nobody holds the other end."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    rename("python", "python -c from multiprocessing.resource_tracker import main;main(37)")
    line.hear()
    os._exit(0)


if __name__ == "__main__":
    main()
