"""Engines that die, refuse or break off in every way that they have: what the client is told."""

import asyncio
import json
from typing import Any

import pytest

from tests.engines import LIMIT, Asked, Engine, Front, Script, echo, fronted, model
from vllmd.gateway.waiting import Outlook

CHAT = {"model": "a", "messages": []}


def first(script: Script, then: Script = echo) -> Script:
    """One way for the first request, another one for all that follow."""
    seen: list[Asked] = []

    async def both(asked: Asked) -> None:
        seen.append(asked)
        await (script if len(seen) == 1 else then)(asked)

    return both


async def settled(front: Front) -> None:
    """Until nobody is at the engine."""
    await front.until(lambda: (door := front.gateway.doors.entry("a").door) is not None and not door.under_way)


async def dies(asked: Asked) -> None:
    asked.die()


async def test_an_engine_that_breaks_one_connection_and_lives_on_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its door stays open, as the core sees nothing wrong: nobody may be left to stand before it."""
    monkeypatch.setattr("vllmd.gateway.doors.BREATH", 0.01, raising=False)
    engine = await Engine(first(dies)).start()
    async with fronted(model("a")) as front, asyncio.timeout(20):
        front.open("a", engine)
        assert (await front.post(CHAT))[0] == 200
        assert (await front.post(CHAT))[0] == 200
        assert front.gateway.counted.retries["a"] == 1
    await engine.stop()


async def test_an_engine_that_cannot_be_reached_for_a_moment_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never asked: this is no try. Its socket appears while the request waits."""
    monkeypatch.setattr("vllmd.gateway.doors.BREATH", 0.02, raising=False)
    engine = await Engine().start()
    endpoint, port = engine.endpoint, int(engine.endpoint.rpartition(":")[2])
    await engine.stop()
    late = Engine()
    late.endpoint = endpoint
    async with fronted(model("a")) as front, asyncio.timeout(20):
        front.open("a", late)
        task = asyncio.ensure_future(front.post(CHAT))  # noqa: TID251
        await front.until(lambda: front.use and front.use[-1][2] >= 3)
        late._server = await asyncio.start_server(late._serve, "127.0.0.1", port)
        assert (await task)[0] == 200
        assert front.gateway.counted.retries == {}
    await late.stop()


async def test_the_time_at_an_engine_is_no_time_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waited, was long under way and comes back has its whole patience again."""
    at_it, die = asyncio.Event(), asyncio.Event()

    async def slow(asked: Asked) -> None:
        at_it.set()
        await die.wait()
        asked.die()

    bad, good = await Engine(slow).start(), await Engine().start()
    async with fronted(model("a", queue_timeout=1.0)) as front:
        task = asyncio.ensure_future(front.post(CHAT))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.open("a", bad)
        async with asyncio.timeout(LIMIT):
            await at_it.wait()
        loop = asyncio.get_running_loop()
        end = loop.time() + 1.2
        await front.until(lambda: loop.time() > end)
        front.shut("a", "backoff")
        die.set()
        await front.until(lambda: front.waiting("a") == 1 or task.done())
        front.open("a", good)
        status, _, value = await task
        assert status == 200, value
        assert front.gateway.counted.wait_seconds["a"] < 1.0
    await bad.stop()
    await good.stop()


DYING = [
    b'{"error": {"message": "EngineCore encountered an issue. See stack trace (above) for the root cause.", "code": 500}}',
    b'{"error": {"message": "cannot schedule new futures after shutdown", "type": "InternalServerError", "code": 500}}',
]


@pytest.mark.parametrize("body", DYING)
async def test_an_engine_that_says_that_it_is_dying_counts_as_dead(body: bytes) -> None:
    """vLLM's API server outlives its engine for a moment, and answers what it had with 500."""

    async def last_words(asked: Asked) -> None:
        asked.answer(body, "500 Internal Server Error")

    bad, good = await Engine(last_words).start(), await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", bad)
        task = asyncio.ensure_future(front.post(CHAT))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1 or task.done())
        front.shut("a", "backoff")
        front.open("a", good)
        assert (await task)[0] == 200
    await bad.stop()
    await good.stop()


async def test_any_other_error_of_an_engine_is_its_answer() -> None:
    async def fails(asked: Asked) -> None:
        asked.answer(b'{"error": {"message": "division by zero"}}', "500 Internal Server Error")

    engine = await Engine(fails).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        status, _, value = await front.post(CHAT)
        assert (status, value["error"]["message"], len(engine.asked)) == (500, "division by zero", 1)
    await engine.stop()


REFUSALS: dict[str, tuple[bytes, str, str]] = {
    "openai": (
        b'{"error": {"message": "too long by 7", "type": "BadRequestError", "code": 400}}',
        "400 Bad",
        "too long by 7",
    ),
    "anthropic": (b'{"type": "error", "error": {"type": "x", "message": "no such tool"}}', "400 Bad", "no such tool"),
    "fastapi": (b'{"detail": "Not Found"}', "404 Not Found", "Not Found"),
    "text": (b"Internal Server Error", "500 Internal", "Internal Server Error"),
    "odd": (b'{"error": ["x"]}', "400 Bad", '{"error": ["x"]}'),
    "no stream": (b'{"id": "1"}', "200 OK", "the engine answered with application/json instead of a stream"),
}


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("case", REFUSALS)
async def test_a_refusal_that_comes_after_the_stream_has_begun_is_told_in_it(case: str, chunked: bool) -> None:
    """With the engine's own sentence, not with the JSON around it."""
    body, status, said = REFUSALS[case]

    async def refuses(asked: Asked) -> None:
        if chunked:
            head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
            asked.writer.write(head.encode())
            await asked.writer.drain()
            asked.chunk(body)
            asked.end()
        else:
            asked.answer(body, status)

    engine = await Engine(refuses).start()
    async with fronted(model("a")) as front:
        async with front.session.post("/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            assert (await answer.content.readline()).startswith(b": vllmd")
            front.open("a", engine)
            events = [line for line in (await answer.read()).decode().splitlines() if line.startswith("data: ")]
        assert json.loads(events[0][6:])["error"]["message"] == said
        assert events[1:] == ["data: [DONE]"]
        await settled(front)
    await engine.stop()


async def test_a_defect_of_ours_in_the_middle_of_a_plain_answer_breaks_it() -> None:
    """No words of ours may stand in it as if they were its end."""

    async def script(asked: Asked) -> None:
        asked.begin("application/json")
        asked.chunk(b'{"half": ')
        await asked.writer.drain()
        await asked.gone.wait()

    def breaks(*_: Any) -> bool:
        raise RuntimeError("defect")

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vllmd.gateway.upstream.Exchange.pour", breaks)
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            body = json.dumps(CHAT).encode()
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            said = b""
            try:
                async with asyncio.timeout(LIMIT):
                    while data := await reader.read(1 << 16):
                        said += data
            except ConnectionError:
                pass
            assert said.count(b"HTTP/1.1") <= 1 and b"error" not in said and b"0\r\n\r\n" not in said
            writer.close()
        await front.until(lambda: front.faults)
        front.faults.clear()
        async with asyncio.timeout(LIMIT):
            await engine.asked[0].gone.wait()
    await engine.stop()


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_an_answer_without_a_body_has_none(status: str) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(f"HTTP/1.1 {status}\r\n\r\n".encode())

    engine = await Engine(first(script)).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        body = json.dumps(CHAT).encode()
        writer.write(
            (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)) * 2
        )
        async with asyncio.timeout(LIMIT):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status}".encode()) and b"chunked" not in head
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
    await engine.stop()


async def test_those_who_wait_outlive_several_deaths_of_the_engine() -> None:
    """A crash loop: who was at the engine twice is told, who only waited is not."""
    bad, good = await Engine(dies).start(), await Engine().start()
    async with fronted(model("a", concurrency=2)) as front:
        front.outlooks["a"] = Outlook("starting", "")
        tasks = [asyncio.ensure_future(front.post(CHAT)) for _ in range(6)]  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 6)
        front.open("a", bad)
        front.shut("a", "backoff")
        await front.until(lambda: len(bad.asked) == 2 and front.waiting("a") == 6)
        front.open("a", bad)
        front.shut("a", "backoff")
        await front.until(lambda: sum(task.done() for task in tasks) == 2 and front.waiting("a") == 4)
        front.open("a", good)
        statuses = sorted([status for status, _, _ in await asyncio.gather(*tasks)])
        assert statuses == [200] * 4 + [502] * 2
    await bad.stop()
    await good.stop()
