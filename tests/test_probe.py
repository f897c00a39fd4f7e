"""The probe: what it reads from an engine, and that a stranger can do no harm to it."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.fake.make_model import make_model
from tests.fake.metrics import Counts, render
from tests.test_fake_engine import Fake
from vllmd.edge.probe import Counters, Probe, ProbeError, alike, ask, read_counters, read_words

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"
Reply = Callable[[str, bytes], bytes]  # path and body of a request -> bytes of the answer


class Engine:
    """A server of given bytes; keeps the requests and says when a client hung up."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.asked: list[tuple[str, bytes]] = []
        self.got = asyncio.Event()
        self.left = asyncio.Event()
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0] or 0)
            path, body = head.split(" ")[1], await reader.readexactly(length)
            self.asked.append((path, body))
            self.got.set()
            answer = self.reply(path, body)
            if answer:
                writer.write(answer)
                writer.write_eof()
            await reader.read()
        self.left.set()
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.open -= 1


@contextlib.asynccontextmanager
async def engine(reply: Reply | bytes) -> AsyncIterator[tuple[str, Engine]]:
    """An endpoint with an Engine behind it. No bytes = it never answers."""
    made = Engine(reply if callable(reply) else lambda path, body: reply)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", made
        async with asyncio.timeout(20):
            while made.open:
                await asyncio.sleep(0.001)


def answer(value: object, status: int = 200) -> bytes:
    """JSON with a status."""
    body = json.dumps(value).encode()
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


# -- reading ----------------------------------------------------------------------------------------------------------


async def test_the_fake_engine_is_read_over_its_socket(tmp_path: Path) -> None:
    """Health, names, counters and a canary that makes a token."""
    fake = Fake(tmp_path, str(make_model(tmp_path / "m")), "--served-model-name", "m").ready()
    try:
        endpoint, probe = f"unix:{fake.socket}", Probe()
        assert await probe.health(endpoint)
        assert await probe.served(endpoint) == ["m"]
        before = await probe.counters(endpoint)
        assert before.running == before.generation_tokens == 0
        assert await probe.canary(endpoint, "m") is True
        after = await probe.counters(endpoint)
        assert (after.generation_tokens, after.iterations > 0, after.prompt_tokens > 0) == (1, True, True)
    finally:
        fake.end()


@pytest.mark.parametrize("size", [0, 52_000])
def test_counters_are_found_among_everything_else(size: int) -> None:
    """Exact names only, in a body of any size."""
    counts = Counts(running=3, waiting=2, kv=0.25, prompt=500, generated=70, iterations=9)
    text = render(counts, "m} 7", 1000, 0.9, size).encode()
    assert read_counters(text) == Counters(3, 2, 70, 500, 9, 0.25)


def test_counters_of_data_parallel_ranks_are_summed_and_cache_use_is_the_highest() -> None:
    """One line per rank."""
    text = b"""
vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:num_requests_waiting{engine="0"} 1.0
vllm:generation_tokens_total{engine="0"} 1e+06
vllm:generation_tokens_total{engine="1"} 5.0
vllm:generation_tokens_created{engine="1"} 1.79e+09
vllm:kv_cache_usage_perc{engine="0"} 0.1
vllm:kv_cache_usage_perc{engine="1"} 0.7"""
    assert read_counters(text) == Counters(3, 1, 1_000_005, 0, 0, 0.7)


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "x", "", "1e400", "1 2x"])
def test_a_count_that_is_none_is_an_error(value: str) -> None:
    """Nothing odd gets to the core."""
    with pytest.raises(ProbeError, match="is no count"):
        read_counters(f"\nvllm:num_requests_running{{}} {value}\n".encode())


def test_metrics_of_somebody_else_are_an_error() -> None:
    """Not zeros: a stranger must not look like an idle engine."""
    with pytest.raises(ProbeError, match="no vllm:num_requests_running"):
        read_counters(b"# HELP x\nup 1\n")


@pytest.mark.parametrize(
    "raw",
    [
        OK % (4, b'"ab"'),
        b'HTTP/1.0 200 OK\r\n\r\n"ab"',
        b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n"\r\n3;x=y\r\nab"\r\n0\r\n\r\n',
        b'HTTP/1.1 200\r\ncontent-LENGTH:4\r\n\r\n"ab"',
    ],
)
async def test_a_body_is_read_however_its_end_is_told(raw: bytes) -> None:
    """By length, by the end of the connection, in chunks."""
    async with engine(raw) as (endpoint, _):
        assert await ask(endpoint, "GET", "/x", timeout=20) == (200, b'"ab"')


# -- the canary -------------------------------------------------------------------------------------------------------


async def test_the_canary_tries_the_kinds_in_turn_and_remembers(tmp_path: Path) -> None:
    """What the model does not do is 4xx; what works is asked first from then on."""
    async with engine(lambda path, _: answer({}, 200 if path == "/pooling" else 404)) as (endpoint, made):
        probe = Probe()
        assert await probe.canary(endpoint, "m", timeout=20) is True
        assert [path for path, _ in made.asked] == ["/v1/completions", "/v1/embeddings", "/pooling"]
        assert await probe.canary(endpoint, "m", timeout=20) is True
        assert [path for path, _ in made.asked[3:]] == ["/pooling"]
        probe.forget(endpoint)
        await probe.canary(endpoint, "m", timeout=20)
        assert made.asked[4][0] == "/v1/completions"


async def test_the_canary_asks_for_one_token() -> None:
    """And not for more."""
    async with engine(answer({})) as (endpoint, made):
        assert await Probe().canary(endpoint, "m", timeout=20) is True
        assert json.loads(made.asked[0][1]) == {"model": "m", "prompt": "a", "max_tokens": 1}


async def test_an_embedding_model_is_asked_for_an_embedding_first() -> None:
    """By its category: no error goes into its log."""
    async with engine(answer({})) as (endpoint, made):
        assert await Probe().canary(endpoint, "m", ("llm", "Embed"), timeout=20) is True
        assert made.asked[0][0] == "/v1/embeddings"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [(404, None), (400, None), (401, None), (422, None), (408, False), (429, False), (500, False), (503, False)],
)
async def test_the_canary_of_a_model_that_answers_none(status: int, verdict: bool | None) -> None:
    """No kind is served: there is no canary. What may pass (too many requests, 5xx) failed."""
    async with engine(answer({}, status)) as (endpoint, _):
        assert await Probe().canary(endpoint, "m", timeout=20) is verdict


async def test_a_canary_without_an_answer_failed() -> None:
    """A frozen engine takes the request and says nothing."""
    async with engine(b"") as (endpoint, _):
        assert await Probe().canary(endpoint, "m", timeout=0.1) is False


async def test_cancelling_hangs_up() -> None:
    """The engine learns that nobody waits, and stops working for it."""
    async with engine(b"") as (endpoint, made), asyncio.timeout(20):
        task = asyncio.get_running_loop().create_task(Probe().canary(endpoint, "m", timeout=20))
        await made.got.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await made.left.wait()


# -- strangers --------------------------------------------------------------------------------------------------------

ODD = [
    b"\x00", b"\r\n\r\n", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 abc X\r\n\r\n", b"HTTP/1.1 2000 X\r\n\r\n", b"HTTP/2 200\r\n\r\n",
    "HTTP/1.1 ²²² X\r\n\r\n".encode("latin-1"), b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    b"A" * 100_000, OK % (100, b"short"), OK % (10**12, b"x"), b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\nabc", b"HTTP/1.1 200 OK\r\nContent-Length: 9" + b"9" * 5000 + b"\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400000\r\n" + b"x" * 0x400000 + b"\r\n" + b"500000\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (9 << 20), OK % (3, b"\xff\xfe{"), OK % (60_000, b"[" * 60_000), OK % (2, b"[]"),
    OK % (11, b'{"data": 1}'), OK % (4, b"null"), OK % (7, b"1" + b"e99999"), b"HTTP/1.1 301 X\r\nLocation: http://x\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD)))
async def test_an_odd_answer_is_a_probe_error_and_nothing_else(number: int) -> None:
    """Whoever answers on the port."""
    async with engine(ODD[number]) as (endpoint, _):
        probe = Probe()
        for question in (probe.served, probe.counters):
            with pytest.raises(ProbeError):
                await question(endpoint, timeout=20)
        await probe.health(endpoint, timeout=20)
        await probe.canary(endpoint, "m", timeout=20)


@pytest.mark.parametrize("number", [11, 17, 18])
async def test_an_endless_answer_is_not_kept(number: int) -> None:
    """By length, in chunks, until the end: 8 MiB are enough."""
    async with engine(ODD[number]) as (endpoint, _):
        with pytest.raises(ProbeError, match="too large"):
            await ask(endpoint, "GET", "/x", timeout=20)


async def test_noise_is_a_probe_error_and_nothing_else() -> None:
    """Random bytes, and good answers with bytes changed."""
    rng = random.Random(2)

    def noise(path: str, body: bytes) -> bytes:
        data = bytearray(rng.choice([answer({"data": [{"id": "m"}]}), rng.randbytes(rng.randint(1, 300)), *ODD[:6]]))
        for _ in range(rng.randint(0, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)

    async with engine(noise) as (endpoint, _):
        for _ in range(200):
            with contextlib.suppress(ProbeError):
                await Probe().served(endpoint, timeout=20)


async def test_ids_that_are_no_text_are_left_out() -> None:
    """A list of models may hold anything."""
    value = {"data": [{"id": "a"}, {"id": 1}, {}, 7, None, {"id": ["b"]}]}
    async with engine(answer(value)) as (endpoint, _):
        assert await Probe().served(endpoint) == ["a"]


@pytest.mark.parametrize(
    "endpoint", ["unix:/nonexistent/s", "http://127.0.0.1:1", "unix:", "http://127.0.0.1:99999", "http://", "x"]
)
async def test_nobody_there_is_not_healthy(endpoint: str) -> None:
    """Refused, missing, or no endpoint at all."""
    assert await Probe().health(endpoint) is False
    with pytest.raises(ProbeError):
        await Probe().served(endpoint)


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False), (204, False)])
async def test_health_is_200(status: int, healthy: bool) -> None:
    """Nothing else."""
    async with engine(answer({}, status)) as (endpoint, _):
        assert await Probe().health(endpoint) is healthy


async def test_silence_ends_with_the_time_given() -> None:
    """A stranger that takes the connection and says nothing holds nobody up."""
    async with engine(b"") as (endpoint, _):
        assert await Probe().health(endpoint, timeout=0.1) is False
        with pytest.raises(ProbeError, match=r"no answer to /metrics within 0.1 s"):
            await Probe().counters(endpoint, timeout=0.1)


# -- sleep ------------------------------------------------------------------------------------------------------------


def dreams(sleeping: bool, refuses: str = "") -> Reply:
    """An engine that says of itself whether it sleeps, and refuses one path."""

    def reply(path: str, body: bytes) -> bytes:
        if refuses and path.startswith(refuses):
            return b"HTTP/1.1 500 Oops\r\nContent-Length: 13\r\n\r\nout of memory"
        said = json.dumps({"is_sleeping": sleeping}).encode()
        return OK % (len(said), said)

    return reply


@pytest.mark.parametrize(
    ("level", "paths"),
    [
        (1, ["/wake_up"]),
        (2, ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache"]),
    ],
)
async def test_waking_loads_dropped_weights_before_there_is_a_cache(level: int, paths: list[str]) -> None:
    """At level 2 in this order, or the answers are garbage."""
    async with engine(dreams(False)) as (endpoint, seen):
        await Probe().wake(endpoint, level, 20.0)
    assert [path for path, _ in seen.asked] == [*paths, "/is_sleeping"]
    assert level == 1 or json.loads(seen.asked[1][1]) == {"method": "reload_weights"}


async def test_sleep_waits_for_what_runs_and_is_seen() -> None:
    async with engine(dreams(True)) as (endpoint, seen):
        await Probe().sleep(endpoint, 2, 20.0)
    assert [path for path, _ in seen.asked] == ["/sleep?level=2&mode=wait", "/is_sleeping"]


@pytest.mark.parametrize("refuses", ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"])
async def test_a_waking_that_stops_half_way_is_none(refuses: str) -> None:
    async with engine(dreams(False, refuses)) as (endpoint, seen):
        with pytest.raises(ProbeError, match="status 500: out of memory"):
            await Probe().wake(endpoint, 2, 20.0)
    assert seen.asked[-1][0] == refuses


async def test_an_engine_that_only_says_yes_has_neither_slept_nor_woken() -> None:
    async with engine(dreams(False)) as (endpoint, _):
        with pytest.raises(ProbeError, match="does not sleep"):
            await Probe().sleep(endpoint, 1, 20.0)
    async with engine(dreams(True)) as (endpoint, _):
        with pytest.raises(ProbeError, match="still sleeps"):
            await Probe().wake(endpoint, 1, 20.0)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b'{"choices": [{"text": "a b"}]}', "a b"),
        (b'{"data": [{"embedding": [0.5, 1]}]}', (0.5, 1.0)),
        (b'{"data": [{"data": [0.5, 1]}]}', (0.5, 1.0)),
        (b'{"data": [{"data": [[0.5], [1]]}]}', None),
        (b"[" * 10_000, None),
        (b'{"choices": []}', None),
    ],
)
def test_what_can_be_compared_is_read(raw: bytes, words: object) -> None:
    assert read_words(raw) == words


def test_vectors_are_alike_up_to_rounding() -> None:
    assert alike((0.5, 1.0), (0.501, 0.999))
    assert not alike((0.5, 1.0), (0.5, 0.9))
    assert not alike((0.5,), (0.5, 1.0))
    assert not alike("a", "b")
    assert not alike("a", (0.5,))
