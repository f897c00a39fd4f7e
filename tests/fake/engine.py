"""EngineCore: starts its workers, sizes the KV cache, then hands out tokens.

It outlives an API server that was killed: end of file there is silence to it, as in vLLM. It dies with a worker, and a
worker with it. Tokens are paced by one heap of due times in one select, so an idle engine sleeps in the kernel. Every
request costs one round trip to the first worker, so that a stopped worker stops it. Where it differs from vLLM: an
orphan gives up after ten minutes.
"""

import heapq
import os
import selectors
import signal
import time
from functools import partial
from typing import Any, Final

from tests.fake.faults import live, rename
from tests.fake.texts import (
    ENGINE_FRAMES,
    FAILURES,
    NO_BLOCKS,
    WORKER_ABOVE,
    StartError,
    bare,
    log,
    log_engine_failure,
    trace,
)  # fmt: skip
from tests.fake.wire import Line, fork
from tests.fake.worker import Start, gib, run_worker

ORPHAN_S: Final = 600


def run_engine(api: Line, start: Start) -> None:
    """The life of the engine core's process."""
    rename("VLLM::EngineCore", "VLLM::EngineCore")
    if start.faults.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        engine = Engine(api, start)
        engine.boot()
    except StartError as error:
        log_engine_failure(str(error))
        os._exit(1)
    engine.serve()


class Engine:
    """The scheduler: who waits, who runs, and when the next token is due."""

    def __init__(self, api: Line, start: Start) -> None:
        self.api = api
        self.start = start
        self.workers: list[tuple[int, Line]] = []
        self.kv_tokens = 0
        self.waiting: list[dict[str, Any]] = []
        self.running: dict[int, dict[str, Any]] = {}
        self.due: list[tuple[float, int]] = []
        self.sleeping = 0
        self.selector = selectors.DefaultSelector()

    def boot(self) -> None:
        """All phases up to the KV cache; StartError when one fails."""
        options, faults, _ = self.start
        began = time.monotonic()
        live("engine", faults)
        config = f"model='{options.model}', max_seq_len={self.length()}, tensor_parallel_size={options.workers}"
        log("EngineCore", "core.py:133", f"Initializing a V1 LLM engine (v0.32.0) with config: {config}")
        for rank in range(options.workers):
            ends = [self.api, *(line for _, line in self.workers)]
            self.workers.append(fork(partial(run_worker, rank=rank, start=self.start), *ends))
        self.api.say(workers=[pid for pid, _ in self.workers])
        self.step("load")
        kv = min(answer["kv"] for answer in self.step("profile"))
        length = self.fit(kv)
        device = "CPU" if faults.device == "cpu" else "GPU"
        log(
            "EngineCore",
            "kv_cache_utils.py:2327",
            f"{device} KV cache size: {self.kv_tokens:,} tokens, Maximum concurrency for {length:,} tokens per "
            f"request: {self.kv_tokens / length:.2f}x",
        )
        self.step("graphs")
        took = time.monotonic() - began
        log("EngineCore", "core.py:402", f"init engine (profile, create kv cache, warmup model) took {took:.2f} s")
        self.api.say(up=True, length=length, kv_tokens=self.kv_tokens)

    def step(self, name: str) -> list[dict[str, Any]]:
        """One step by all workers; their answers."""
        for _, line in self.workers:
            line.say(do=name)
        answers = []
        for _, line in self.workers:
            if not (heard := line.hear()):
                raise StartError("Exception: " + WORKER_ABOVE)
            answers += heard
        if wrong := next((answer["error"] for answer in answers if "error" in answer), None):
            where = "please check the stack trace above for the root cause"
            raise StartError(f"RuntimeError: Worker failed with error '{wrong}', {where}")
        return answers

    def length(self) -> int:
        """Tokens of one request, before an automatic fit."""
        wanted = self.start.options.max_model_len
        return self.start.model.max_len if wanted in (None, -1) else wanted or 0

    def fit(self, kv: int) -> int:
        """Size the cache to `kv` bytes; the tokens of one request, or StartError when not even one fits."""
        options, faults, model = self.start
        each = faults.kv_per_token or model.kv_per_token
        length = self.length()
        self.kv_tokens = kv // each
        if kv <= 0:
            raise StartError(NO_BLOCKS)
        if options.max_model_len == -1 and self.kv_tokens < length:
            length = self.kv_tokens
            log("EngineCore", "kv_cache_utils.py:1900", f"Auto-fit max_model_len: reduced to {length} tokens")
        if self.kv_tokens < length or faults.fail == "kv":
            possible = min(self.kv_tokens, length // 2)
            hint = f"Based on the available memory, the estimated maximum model length is {possible}. "
            have = min(kv, possible * each)
            raise StartError(
                FAILURES["kv"].cause.format(
                    length=length, needed=gib(length * each), available=gib(have), estimate=hint if possible else ""
                )
            )
        return length

    # -- serving --

    def serve(self) -> None:
        """Until killed, or until a worker dies."""
        self.selector.register(self.api.sock, selectors.EVENT_READ, self.api)
        for _, line in self.workers:
            self.selector.register(line.sock, selectors.EVENT_READ, line)
        while True:
            wait = max(0.0, self.due[0][0] - time.monotonic()) if self.due and not self.sleeping else None
            for key, _ in self.selector.select(wait):
                partner: Line = key.data
                messages = partner.hear()
                if not messages:
                    self.lose(partner)
                for message in messages:
                    self.take(message) if partner is self.api else self.begin(message)
            self.emit(time.monotonic())

    def lose(self, line: Line) -> None:
        """A partner is gone: live on without the API server, die with a worker."""
        if line is self.api:
            self.selector.unregister(line.sock)
            signal.alarm(ORPHAN_S)
            return
        rank = next(n for n, (_, other) in enumerate(self.workers) if other is line)
        _, status = os.waitpid(self.workers[rank][0], 0)
        log(
            "EngineCore",
            "multiproc_executor.py:316",
            f"Worker proc VllmWorker-{rank} died unexpectedly (exit code: {os.waitstatus_to_exitcode(status)}), "
            "shutting down executor.",
            "ERROR",
        )
        last = trace(ENGINE_FRAMES, "RuntimeError: Executor failed.")
        log("EngineCore", "core.py:1512", "EngineCore encountered a fatal error.\n" + last, "ERROR")
        bare("Process EngineCore:\n" + last)
        os._exit(1)

    def take(self, message: dict[str, Any]) -> None:
        """A request of the API server."""
        match message["op"]:
            case "add":
                self.waiting.append(message)
                self.admit()
            case "abort":
                self.waiting = [request for request in self.waiting if request["id"] != message["id"]]
                self.running.pop(message["id"], None)
                self.admit()
                self.report(id=message["id"], n=0)
            case "sleep" | "wake":
                self.sleeping = message.get("level", 0)
                for _, line in self.workers:
                    line.say(do=message["op"])
                self.admit()
                self.report(id=message["id"], n=0, done=True, sleep=self.sleeping)

    def admit(self) -> None:
        """Move whom there is room for from waiting to the worker."""
        while self.waiting and len(self.running) < self.start.options.max_num_seqs and not self.sleeping:
            request = self.waiting.pop(0)
            self.running[request["id"]] = request | {"made": 0}
            self.workers[0][1].say(do="prefill", id=request["id"])
            self.report(id=request["id"], n=0)

    def begin(self, message: dict[str, Any]) -> None:
        """The worker has read the prompt: the first token is due."""
        if message["do"] == "prefill" and message["id"] in self.running:
            heapq.heappush(self.due, (time.monotonic() + self.start.faults.prefill_s, message["id"]))

    def emit(self, now: float) -> None:
        """Every token that is due; all at once where no pace is set."""
        rate = self.start.faults.tokens_per_s
        while self.due and self.due[0][0] <= now and not self.sleeping:
            at, number = heapq.heappop(self.due)
            if (request := self.running.get(number)) is None:
                continue
            made = 1 if rate else request["tokens"]
            request["made"] += made
            done = request["made"] >= request["tokens"]
            if done:
                del self.running[number]
                self.admit()
            else:
                heapq.heappush(self.due, (max(at + 1 / rate, now - 1), number))
            self.report(id=number, n=made, done=done)

    def report(self, **message: Any) -> None:
        """Tell the API server, with the state of the scheduler, which it shows in /metrics."""
        used = sum(request["prompt"] + request["made"] for request in self.running.values())
        self.api.say(**message, running=len(self.running), waiting=len(self.waiting), kv=used / max(1, self.kv_tokens))
