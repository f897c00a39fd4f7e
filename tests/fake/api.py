"""The paths of vLLM's API server. A completion goes through the engine; /health does not, and lies as the real one."""

import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, Final

from tests.fake.faults import Faults
from tests.fake.flags import Options
from tests.fake.front import Answer, Inbox, Request
from tests.fake.metrics import Counts, render
from tests.fake.shapes import Draining, EngineDead, Refusal, Talk, dump
from tests.fake.wire import Line

WORDS: Final = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "nobody", "looks", "on")
SSE: Final = "text/event-stream; charset=utf-8"


class Api:
    """What the API server knows of its engine, and its answers."""

    def __init__(self, options: Options, faults: Faults, engine: Line, up: dict[str, Any]) -> None:
        self.options, self.faults, self.engine = options, faults, engine
        self.length: int = up["length"]
        self.kv_tokens: int = up["kv_tokens"]
        self.lock = threading.Lock()
        self.inboxes: dict[int, Inbox] = {}
        self.serial = self.open = 0
        self.counts = Counts()
        self.dead = self.draining = self.mute = False
        self.idle = threading.Condition(self.lock)
        self.keys = options.api_keys or tuple(filter(None, [os.environ.get("VLLM_API_KEY")]))
        self.began = int(time.time())
        self.asleep: set[str] = set()  # tags of vLLM's sleep mode
        self.true = True  # its weights are what they were
        self.routes = self.table()

    def table(self) -> dict[tuple[str, str], Callable[[Request], Answer]]:
        """Method and path to what answers."""
        routes: dict[tuple[str, str], Callable[[Request], Answer]] = {
            ("GET", "/health"): self.health,
            ("GET", "/ping"): self.health,
            ("GET", "/load"): lambda _: dump({"server_load": 0}),
            ("GET", "/version"): lambda _: dump({"version": "0.32.0"}),
            ("GET", "/metrics"): self.metrics,
            ("GET", "/v1/models"): self.models,
            ("POST", "/v1/completions"): self.complete,
            ("POST", "/v1/chat/completions"): self.complete,
            ("POST", "/v1/embeddings"): self.embed,
            ("POST", "/tokenize"): self.tokenize,
        }
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            routes[("POST", "/sleep")] = self.sleep
            routes[("POST", "/wake_up")] = self.wake
            routes[("POST", "/collective_rpc")] = self.call
            routes[("POST", "/reset_prefix_cache")] = lambda _: Answer(200)
            routes[("GET", "/is_sleeping")] = lambda _: dump({"is_sleeping": self.counts.sleep > 0})
        return routes

    def answer(self, request: Request) -> Answer:
        """Any request's answer."""
        with self.lock:
            self.open += 1
        if self.keys and request.path.startswith("/v1") and bearer(request) not in self.keys:
            return dump({"error": "Unauthorized"}, 401)
        if act := self.routes.get((request.method, request.path)):
            try:
                return act(request)
            except Refusal as refusal:
                return refusal.answer()
        known = any(path == request.path for _, path in self.routes)
        return dump({"detail": "Method Not Allowed" if known else "Not Found"}, 405 if known else 404)

    def sent(self) -> None:
        """One answer less to wait for."""
        with self.lock:
            self.open -= 1
            self.idle.notify_all()

    # -- the engine's side --

    def listen(self) -> None:
        """Hand on what the engine says, until it is dead; then every open request learns of it, unless `mute`."""
        while messages := self.engine.hear():
            for message in messages:
                self.note(message)
        with self.lock:
            self.dead = True
            for inbox in () if self.mute else self.inboxes.values():
                inbox.put({"dead": True})

    def note(self, message: dict[str, Any]) -> None:
        """Count, and wake whoever waits for it."""
        with self.lock:
            made, inbox = message["n"], self.inboxes.get(message["id"])
            counts = self.counts
            self.counts = counts._replace(
                running=message["running"],
                waiting=message["waiting"],
                kv=message["kv"],
                generated=counts.generated + made,
                iterations=counts.iterations + bool(made),
                sleep=message.get("sleep", counts.sleep),
            )
        if inbox and (made or message.get("done")):
            inbox.put(message)

    def tokens(self, request: Request, prompt: int, count: int) -> Iterator[int]:
        """How many tokens came, time and again, until the last; aborted when the client goes. EngineDead, Draining."""
        with self.lock:
            if self.dead:
                raise EngineDead
            if self.draining:
                raise Draining
            self.serial += 1
            number, inbox, began = self.serial, Inbox(), time.monotonic()
            self.inboxes[number] = inbox
            self.counts = self.counts._replace(prompt=self.counts.prompt + prompt)
            self.engine.say(op="add", id=number, prompt=prompt, tokens=count)
        done = False
        try:
            while not done:
                message = inbox.get(request.sock)
                if message.get("dead"):
                    raise EngineDead
                done = message["done"]
                yield message["n"]
        finally:
            self.forget(number, done, time.monotonic() - began)

    def forget(self, number: int, done: bool, seconds: float) -> None:
        """A request is over, in whatever way."""
        with self.lock:
            os.close(self.inboxes.pop(number).bell)
            if done:
                self.counts = self.counts._replace(done=self.counts.done + 1, seconds=self.counts.seconds + seconds)
            else:
                self.engine.say(op="abort", id=number)

    # -- the client's side --

    def health(self, _: Request) -> Answer:
        """A flag, no round trip."""
        return Answer(503 if self.dead and not self.faults.health_lie else 200)

    def metrics(self, _: Request) -> Answer:
        """The counters as of the engine's last word."""
        size = self.faults.metrics_bytes
        text = render(self.counts, self.options.served[0], self.kv_tokens, self.options.utilization, size)
        return Answer(200, text.encode(), "text/plain; version=1.0.0; charset=utf-8")

    def models(self, _: Request) -> Answer:
        """Every served name."""
        card = {"object": "model", "created": self.began, "owned_by": "vllm", "root": self.options.model}
        data = [{"id": name} | card | {"parent": None, "max_model_len": self.length} for name in self.options.served]
        return dump({"object": "list", "data": data})

    def complete(self, request: Request) -> Answer:
        """Text or chat, whole or as a stream."""
        body = parse(request, self.options.served)
        chat = request.path.endswith("chat/completions")
        prompt = count_tokens(body.get("messages") if chat else body.get("prompt"))
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        if prompt + limit > self.length:
            raise Refusal(
                400,
                f"This model's maximum context length is {self.length} tokens. However, you requested {limit} output "
                f"tokens and your prompt contains at least {prompt} input tokens, for a total of at least "
                f"{prompt + limit} tokens. Please reduce the length of the input prompt or the number of requested "
                "output tokens.",
                "BadRequestError",
            )
        said = self.faults.answer.split()
        words = (said or [WORDS[n % len(WORDS)] for n in range(limit)])[:limit]
        words = words if self.true else ["!"] * len(words)
        talk = Talk(chat, body, prompt, words, "stop" if said and len(said) <= limit else "length")
        source = self.tokens(request, prompt, max(1, len(words)))
        first = next(source)  # so that a refusal still has a status of its own
        if body.get("stream"):
            return Answer(200, talk.stream(first, source), SSE)
        for _ in source:
            pass
        return dump(talk.whole())

    def embed(self, request: Request) -> Answer:
        """A vector of eight numbers for each input."""
        body = parse(request, self.options.served)
        inputs = body.get("input") if isinstance(body.get("input"), list) else [body.get("input")]
        prompt = count_tokens(inputs)
        for _ in self.tokens(request, prompt, 1):
            pass
        data = [{"index": n, "object": "embedding", "embedding": [0.125] * 8} for n in range(len(inputs or ()))]
        usage = {"prompt_tokens": prompt, "total_tokens": prompt, "completion_tokens": 0}
        return dump({"id": "embd-1", "object": "list", "model": self.options.served[0], "data": data, "usage": usage})

    def tokenize(self, request: Request) -> Answer:
        """A number for each word."""
        body = parse(request, self.options.served)
        count = count_tokens(body.get("messages", body.get("prompt")))
        return dump({"count": count, "max_model_len": self.length, "tokens": list(range(count)), "token_strs": None})

    def sleep(self, request: Request) -> Answer:
        """Level 1 or 2: requests hang until /wake_up. Level 2 drops the weights."""
        level = int(urllib.parse.parse_qs(request.query).get("level", ["1"])[0])
        if self.faults.sleep == "refused":
            return dump({"error": "Internal Server Error"}, 500)
        self.asleep, self.true = {"weights", "kv_cache"}, self.true and level == 1 and self.faults.sleep != "garbled"
        return self.order(request, "sleep", level)

    def wake(self, request: Request) -> Answer:
        """Go on, once all tags are awake."""
        if self.faults.sleep == "stuck":
            return dump({"error": "CUDA out of memory"}, 500)
        self.asleep -= set(urllib.parse.parse_qs(request.query).get("tags", self.asleep))
        return self.order(request, "wake", 0) if not self.asleep else dump({"status": "sleeping"})

    def call(self, request: Request) -> Answer:
        """reload_weights: what level 2 dropped is there again, if there is memory for it."""
        method = json.loads(request.body).get("method")
        self.true |= method == "reload_weights" and "weights" not in self.asleep and self.faults.sleep != "garbled"
        return dump({"results": [None]})

    def order(self, request: Request, op: str, level: int) -> Answer:
        """Something for the engine itself to do."""
        with self.lock:
            self.serial += 1
            number, inbox = self.serial, Inbox()
            self.inboxes[number] = inbox
            self.engine.say(op=op, id=number, level=level)
        dead = inbox.get(request.sock).get("dead")
        with self.lock:
            os.close(self.inboxes.pop(number).bell)
        return Answer(500 if dead else 200)


def parse(request: Request, served: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a request for one of our names; Refusal else."""
    try:
        body = json.loads(request.body)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Refusal(400, "1 validation error: JSON decode error", "BadRequestError")
    if (name := body.get("model", served[0])) not in served:
        raise Refusal(404, f"The model `{name}` does not exist.", "NotFoundError", "model")
    return body


def count_tokens(content: Any) -> int:
    """A word is a token, an image sixty-four."""
    match content:
        case str():
            return max(1, len(content.split()))
        case {"type": "image_url"}:
            return 64
        case {"text": inner} | {"content": inner}:
            return count_tokens(inner)
        case list():
            return sum(count_tokens(part) for part in content)
        case _:
            return 1


def bearer(request: Request) -> str:
    """The key that came with the request."""
    return request.headers.get("authorization", "").removeprefix("Bearer ")
