# ruff: noqa: ASYNC109 - how long an answer may take belongs to the question: each kind has its own
"""Asking an engine how it is, over its TCP port or unix socket.

One connection per question, closed by us: the side that closes first keeps the port busy for a minute (TIME_WAIT), and
the engine's next start needs its port. The other end may be a stranger, so what it says is bounded in size and time,
and nothing but ProbeError comes of it. /metrics is 50 kB and read each few seconds from every engine: it is searched
for the names that are wanted, not parsed.
"""

import asyncio
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

BODY_MAX: Final = 8 << 20  # bytes of an answer
HEAD_MAX: Final = 32 << 10
KINDS: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "completions": ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    "embeddings": ("/v1/embeddings", {"input": "a"}),
    "pooling": ("/pooling", {"input": "a"}),
}
#: Categories of models that generate nothing: completions would only put an error into their log.
POOLING: Final = frozenset({"embed", "embedding", "embeddings", "rerank", "score", "classify", "reward"})
#: What a server answers to a kind of request that it does not serve, or not to us. Anything else may pass.
NOT_SERVED: Final = frozenset({400, 401, 403, 404, 405, 422})


ANSWER_TOKENS: Final = 8  # enough for a model that lost its weights to say something else
ALIKE: Final = 1e-2  # of two vectors' numbers

Words = str | tuple[float, ...]


class ProbeError(Exception):
    """The engine could not be asked, or its answer could not be read: why."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What an engine counts, summed over its data-parallel ranks. Tokens and iterations since it started."""

    running: int
    waiting: int
    generation_tokens: float
    prompt_tokens: float
    iterations: float
    kv_usage: float  # 0..1, of the fullest rank

    @property
    def progress(self) -> tuple[float, float, float]:
        """What an engine that works cannot leave unchanged."""
        return self.generation_tokens, self.prompt_tokens, self.iterations


class Probe:
    """Asks engines. Remembers which kind of canary an engine answers."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str], str] = {}

    async def health(self, endpoint: str, timeout: float = 5.0) -> bool:
        """Whether /health says 200. It lies: a frozen engine says so too."""
        try:
            status, _ = await ask(endpoint, "GET", "/health", timeout=timeout)
        except ProbeError:
            return False
        return status == 200

    async def served(self, endpoint: str, timeout: float = 5.0) -> list[str]:
        """The model names that /v1/models lists. Raises ProbeError."""
        value = await get_json(endpoint, "/v1/models", timeout)
        rows = value.get("data") if isinstance(value, dict) else None
        if not isinstance(rows, list):
            raise ProbeError("cannot read /v1/models: it lists no models")
        return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]

    async def counters(self, endpoint: str, timeout: float = 5.0) -> Counters:
        """The engine's counters. Raises ProbeError."""
        status, body = await ask(endpoint, "GET", "/metrics", timeout=timeout)
        if status != 200:
            raise ProbeError(f"cannot read /metrics: status {status}")
        return read_counters(body)

    async def canary(
        self, endpoint: str, model: str, categories: Collection[str] = (), timeout: float = 30.0
    ) -> bool | None:
        """One token through the engine: True = it came, False = it did not, None = no kind of canary suits it."""
        for kind in self._order(endpoint, model, categories):
            path, body = KINDS[kind]
            try:
                status, _ = await ask(endpoint, "POST", path, {"model": model, **body}, timeout)
            except ProbeError:
                return False
            if status < 300:
                self._kinds[endpoint, model] = kind
                return True
            if status not in NOT_SERVED:
                return False
        return None

    async def answer(
        self, endpoint: str, model: str, categories: Collection[str] = (), timeout: float = 30.0
    ) -> Words | None:
        """What the engine answers to a fixed request, greedily: a text, or a vector. None: nothing that could be compared.
        Raises ProbeError when it does not answer."""
        for kind in self._order(endpoint, model, categories):
            path, body = KINDS[kind]
            more = {"max_tokens": ANSWER_TOKENS, "temperature": 0, "seed": 0} if kind == "completions" else {}
            status, raw = await ask(endpoint, "POST", path, {"model": model, **body, **more}, timeout)
            if status < 300:
                self._kinds[endpoint, model] = kind
                return read_words(raw)
            if status not in NOT_SERVED:
                raise ProbeError(f"{path} answers with status {status}")
        return None

    async def sleep(self, endpoint: str, level: int, timeout: float) -> None:
        """Put the engine to sleep at level 1 or 2; returns when it sleeps. Raises ProbeError."""
        await tell(endpoint, f"/sleep?level={level}&mode=wait", timeout)
        if not await self.sleeping(endpoint):
            raise ProbeError("it says that it does not sleep")

    async def wake(self, endpoint: str, level: int, timeout: float) -> None:
        """Wake it. At level 2 its weights were dropped: they are loaded again before there is a KV cache, and what was computed
        with the old ones is forgotten. Raises ProbeError."""
        if level == 1:
            await tell(endpoint, "/wake_up", timeout)
        else:
            await tell(endpoint, "/wake_up?tags=weights", timeout)
            await tell(endpoint, "/collective_rpc", timeout, {"method": "reload_weights"})
            await tell(endpoint, "/wake_up?tags=kv_cache", timeout)
            await tell(endpoint, "/reset_prefix_cache", timeout)
        if await self.sleeping(endpoint):
            raise ProbeError("it says that it still sleeps")

    async def sleeping(self, endpoint: str, timeout: float = 5.0) -> bool:
        """Whether it says so. Raises ProbeError."""
        value = await get_json(endpoint, "/is_sleeping", timeout)
        return isinstance(value, dict) and value.get("is_sleeping") is True

    def _order(self, endpoint: str, model: str, categories: Collection[str]) -> list[str]:
        kinds = list(KINDS)
        if POOLING & {each.lower() for each in categories}:
            kinds = kinds[1:] + kinds[:1]
        known = self._kinds.get((endpoint, model))
        return sorted(kinds, key=lambda kind: kind != known)  # another start of it may serve another kind

    def forget(self, endpoint: str) -> None:
        """The engine behind this endpoint is gone; the next one there may be another model."""
        self._kinds = {key: kind for key, kind in self._kinds.items() if key[0] != endpoint}


# -- counters ---------------------------------------------------------------------------------------------------------


def read_counters(text: bytes) -> Counters:
    """The counters in vLLM's /metrics. A counter that is missing is 0 (a pooling model generates nothing). Raises
    ProbeError when it is not vLLM's."""
    running = samples(text, b"vllm:num_requests_running")
    if not running:
        raise ProbeError("cannot read /metrics: no vllm:num_requests_running in it")
    return Counters(
        running=int(sum(running)),
        waiting=int(sum(samples(text, b"vllm:num_requests_waiting"))),
        generation_tokens=sum(samples(text, b"vllm:generation_tokens_total")),
        prompt_tokens=sum(samples(text, b"vllm:prompt_tokens_total")),
        iterations=sum(samples(text, b"vllm:iteration_tokens_total_count")),
        kv_usage=max(samples(text, b"vllm:kv_cache_usage_perc"), default=0.0),
    )


def samples(text: bytes, name: bytes) -> list[float]:
    """The values of all samples of `name`. Raises ProbeError for what is no finite, positive number."""
    found = []
    start = text.find(b"\n" + name)
    while start >= 0:
        start += 1 + len(name)
        end = text.find(b"\n", start)
        if text[start : start + 1] in (b"{", b" "):  # else it is the beginning of a longer name
            found.append(number(text[start : end if end >= 0 else None]))
        start = text.find(b"\n" + name, start)
    return found


def number(sample: bytes) -> float:
    """The value at the end of a sample line: labels may hold anything, blanks too."""
    try:
        value = float(sample.rpartition(b" ")[2])
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e18:
        raise ProbeError(f"cannot read /metrics: {sample[-40:]!r} is no count")
    return value


# -- answers to compare -----------------------------------------------------------------------------------------------


def read_words(raw: bytes) -> Words | None:
    """The text or the vector in an answer; None where neither is found."""
    try:
        match json.loads(raw):
            case {"choices": [{"text": str(text)}, *_]}:
                return text
            case {"data": [{"embedding": [*numbers]} | {"data": [*numbers]}, *_]}:
                return tuple(float(number) for number in numbers)
    except (ValueError, TypeError, RecursionError):
        pass
    return None


def alike(one: Words, other: Words) -> bool:
    """Whether two answers are the same, vectors up to rounding."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return len(one) == len(other) and all(abs(a - b) <= ALIKE for a, b in zip(one, other, strict=True))


# -- HTTP -------------------------------------------------------------------------------------------------------------


async def get_json(endpoint: str, path: str, timeout: float) -> Any:
    """The JSON at `path`. Raises ProbeError."""
    status, body = await ask(endpoint, "GET", path, timeout=timeout)
    if status != 200:
        raise ProbeError(f"cannot read {path}: status {status}")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ProbeError(f"cannot read {path}: no JSON") from None


async def tell(endpoint: str, path: str, timeout: float, value: Any = None) -> None:
    """POST what must succeed. Raises ProbeError."""
    status, body = await ask(endpoint, "POST", path, value, timeout)
    if status >= 300:
        raise ProbeError(f"{path} answers with status {status}: {body[:200].decode(errors='replace')}")


async def ask(endpoint: str, method: str, path: str, value: Any = None, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body of one request. Raises ProbeError. Cancelling closes the connection, so that the engine stops."""
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await connect(endpoint)
            try:
                writer.write(request(method, path, value))
                return await read_answer(reader)
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise ProbeError(f"no answer to {path} within {timeout:g} s") from None
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        raise ProbeError(f"cannot ask {path}: {error}") from None


async def connect(endpoint: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to "http://127.0.0.1:8000" or "unix:/path"."""
    if endpoint.startswith("unix:"):
        return await asyncio.open_unix_connection(endpoint.removeprefix("unix:"), limit=HEAD_MAX)
    address = urlsplit(endpoint)
    return await asyncio.open_connection(address.hostname, address.port, limit=HEAD_MAX)


def request(method: str, path: str, value: Any) -> bytes:
    """The bytes of a request with a JSON body, if there is a value."""
    body = b"" if value is None else json.dumps(value).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: vllmd\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body. Raises ValueError, EOFError, LimitOverrunError for what is no HTTP/1 answer of bounded size."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if not words[0].startswith("HTTP/1.") or len(words) < 2 or not (words[1].isdigit() and len(words[1]) == 3):
        raise ValueError(f"{first[:40]!r} is no HTTP answer")
    headers = {name.strip().lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return int(words[1]), await read_chunks(reader)
    if "content-length" in headers:
        return int(words[1]), await reader.readexactly(bounded(int(headers["content-length"])))
    return int(words[1]), await read_rest(reader)


def bounded(size: int) -> int:
    """A size that may be read. Raises ValueError."""
    if not 0 <= size <= BODY_MAX:
        raise ValueError(f"a body of more than {BODY_MAX >> 20} MiB is too large")
    return size


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body."""
    body = bytearray()
    while length := int((await reader.readuntil(b"\r\n")).decode("latin-1").partition(";")[0].strip(), 16):
        bounded(length)
        bounded(len(body) + length)
        body += await reader.readexactly(length)
        await reader.readexactly(2)
    return bytes(body)


async def read_rest(reader: asyncio.StreamReader) -> bytes:
    """A body that ends with the connection."""
    body = bytearray()
    while data := await reader.read(1 << 16):
        body += data
        bounded(len(body))
    return bytes(body)
