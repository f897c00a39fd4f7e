"""The gateway between a real client and scripted engines: what goes through, who waits, what faults become."""

import asyncio
import contextlib
import io
import json
from typing import Any

import pytest
from aiohttp import ClientError, FormData

from tests.engines import LIMIT, Asked, Engine, echo, fronted, model
from vllmd.gateway.doors import Doors
from vllmd.gateway.waiting import Outlook
from vllmd.spec import Alias, ApiKey, HttpSpec

CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}]}


def chat(name: str = "a", **more: Any) -> dict[str, Any]:
    return CHAT | {"model": name} | more


# -- what goes through ------------------------------------------------------------------------------------------------


async def test_a_request_goes_through_as_it_came() -> None:
    """Body byte for byte, the client's id, its query; neither its key nor what belongs to its connection."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        body = b'{ "model":"a",  "x": 1.50, "x": 2 }'
        headers = {
            "Authorization": "Bearer secret", "X-Api-Key": "secret", "Cookie": "c=1", "X-Request-Id": "mine-1", "X-Other": "y",
        }  # fmt: skip
        status, answered, value = await front.post(body, "/v1/chat/completions?timeout=5", headers=headers)
        assert (status, value["path"]) == (200, "/v1/chat/completions?timeout=5")
        (asked,) = engine.asked
        assert asked.body == body
        assert asked.headers["x-request-id"] == answered["X-Request-Id"] == "mine-1"
        assert asked.headers["x-other"] == "y"
        assert not {"authorization", "x-api-key", "cookie", "connection"} & set(asked.headers)
        assert front.gateway.counted.memory == 0
    await engine.stop()


async def test_one_connection_may_ask_all_models() -> None:
    """Each request goes by its own model, over kept connections on both sides."""
    engines = [await Engine().start(), await Engine().start()]
    async with fronted(model("a"), model("b")) as front:
        for name, engine in zip("ab", engines, strict=True):
            front.open(name, engine)
        for name in "abbaabab":
            assert (await front.post(chat(name)))[2]["model"] == name
        assert [engine.connections for engine in engines] == [1, 1]
    for engine in engines:
        await engine.stop()


async def test_an_engine_on_a_unix_socket(tmp_path: Any) -> None:
    engine = await Engine().start(str(tmp_path / "e.sock"))
    async with fronted(model("a")) as front:
        front.open("a", engine)
        assert (await front.post(chat()))[0] == 200
    await engine.stop()


async def test_errors_of_the_engine_come_as_they_are() -> None:
    async def script(asked: Asked) -> None:
        asked.answer(b'{"error": {"message": "too long"}}', "400 Bad Request")

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        status, _, value = await front.post(chat())
        assert (status, value) == (400, {"error": {"message": "too long"}})
    await engine.stop()


async def test_large_bodies_both_ways() -> None:
    """100 MB there, 20 MB back, without Content-Length or with it."""

    async def script(asked: Asked) -> None:
        asked.begin("application/json")
        for _ in range(20):
            asked.chunk(b"x" * (1 << 20))
            await asked.writer.drain()
        asked.end()

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        body = json.dumps(chat(pad="y" * (100 << 20))).encode()
        async with front.session.post("/v1/chat/completions", data=io.BytesIO(body)) as answer:
            raw = await answer.read()
        assert len(raw) == 20 << 20
        assert len(engine.asked[0].body) == len(body)
        assert front.gateway.counted.memory == 0
    await engine.stop()


async def test_an_alias_adds_its_parameters_and_is_told_apart_from_the_model() -> None:
    alias = Alias("terse", {"max_tokens": 3, "n": 1}, {"temperature": 0}, ("seed",))
    engine = await Engine().start()
    async with fronted(model("a", aliases=(alias,))) as front:
        front.open("a", engine)
        await front.post(chat("terse", n=2, temperature=1.5, seed=4))
        assert json.loads(engine.asked[0].body) == chat("a", max_tokens=3, n=2, temperature=0)
    await engine.stop()


async def test_multipart_is_routed_by_its_field_and_rewritten_for_an_alias() -> None:
    engine = await Engine().start()
    async with fronted(model("a", aliases=(Alias("whisper", {"language": "de"}),))) as front:
        front.open("a", engine)
        for name in ("a", "whisper"):
            form = FormData()
            form.add_field("file", b"\x00\r\n--\xff" * 1000, filename="a.wav", content_type="audio/wav")
            form.add_field("model", name)
            async with front.session.post("/v1/audio/transcriptions", data=form) as answer:
                assert answer.status == 200
        plain, changed = (asked.body for asked in engine.asked)
        assert b"\x00\r\n--\xff" * 1000 in plain and b"\x00\r\n--\xff" * 1000 in changed
        assert b'name="language"\r\n\r\nde\r\n' in changed and b"whisper" not in changed
        assert b'name="model"\r\n\r\na\r\n' in changed
    await engine.stop()


# -- who waits --------------------------------------------------------------------------------------------------------


async def test_a_request_for_a_model_that_is_down_waits_until_it_is_up() -> None:
    """The core hears of the line once when it begins and once when it is empty."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        tasks = [asyncio.ensure_future(front.post(chat())) for _ in range(20)]  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 20)
        assert front.lines == [("a", 1)]
        front.open("a", engine)
        assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}
        assert front.lines == [("a", 1), ("a", 0)]
        await front.until(lambda: front.use[-1] == ("a", 0, 20))
    await engine.stop()


async def test_a_stream_that_waits_is_told_how_far_things_are() -> None:
    async def script(asked: Asked) -> None:
        asked.begin()
        asked.chunk(b"data: one\n\n")
        asked.chunk(b"data: [DONE]\n\n")
        asked.end()

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.outlooks["a"] = Outlook("starting", "loading weights 38 %", 25.0)
        async with front.session.post("/v1/chat/completions", json=chat(stream=True)) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert await answer.content.readline() == b": vllmd a is starting: loading weights 38 %, about 25 s left\n"
            front.open("a", engine)
            assert (await answer.read()).strip() == b"data: one\n\ndata: [DONE]"
    await engine.stop()


async def test_an_anthropic_stream_that_waits_gets_pings_and_its_kind_of_error() -> None:
    async with fronted(model("a")) as front:
        async with front.session.post("/v1/messages", json=chat(stream=True)) as answer:
            lines = [await answer.content.readline() for _ in range(4)]
            assert lines[2:] == [b"event: ping\n", b'data: {"type": "ping"}\n']
            front.refuse("a", "no room for it")
            rest = (await answer.read()).decode()
        assert rest.strip().startswith("event: error\ndata: ")
        error = json.loads(rest.partition("data: ")[2])
        assert error["type"] == "error"
        assert error["error"] == {"type": "overloaded_error", "message": "no room for it"}


async def test_who_waits_in_vain_is_told_why() -> None:
    async with fronted(model("a")) as front:
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.refuse("a", "cannot start a: needs 9.0 GiB", after=40)
        status, headers, value = await task
        assert (status, headers["Retry-After"]) == (503, "40")
        assert value["error"]["message"] == "cannot start a: needs 9.0 GiB"
        assert value["error"]["code"] == "no_room"


async def test_a_whole_answer_is_waited_for_no_longer_than_queue_timeout() -> None:
    async with fronted(model("a", queue_timeout=0.05)) as front:
        front.outlooks["a"] = Outlook("starting", "compiling", 12.0)
        status, headers, value = await front.post(chat())
        assert (status, headers["Retry-After"]) == (503, "12")
        assert "a is starting: compiling" in value["error"]["message"]
        assert front.lines == [("a", 1), ("a", 0)]


async def test_a_client_that_will_not_wait_is_told_at_once_and_the_model_wanted_all_the_same() -> None:
    async with fronted(model("a")) as front:
        for headers in ({"Prefer": "respond-async"}, {"X-Vllmd-No-Wait": "1"}):
            assert (await front.post(chat(), headers=headers))[0] == 503
        assert front.lines == [("a", 1), ("a", 0)] * 2


async def test_a_client_that_leaves_leaves_the_line_and_nobody_else() -> None:
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        tasks = [asyncio.ensure_future(front.post(chat())) for _ in range(3)]  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 3)
        tasks[1].cancel()
        await front.until(lambda: front.waiting("a") == 2)
        front.open("a", engine)
        assert [status for status, _, _ in await asyncio.gather(tasks[0], tasks[2])] == [200, 200]
        await front.until(lambda: front.use and front.use[-1][1] == 0)
        assert len(engine.asked) == 2
    await engine.stop()


async def test_the_line_is_bounded() -> None:
    async with fronted(model("a", queue=5)) as front:
        tasks = [asyncio.ensure_future(front.post(chat())) for _ in range(5)]  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 5)
        status, headers, value = await front.post(chat())
        assert (status, value["error"]["code"]) == (429, "queue_full")
        assert int(headers["Retry-After"]) > 0
        front.refuse("a")
        await asyncio.gather(*tasks)


async def test_ten_thousand_in_line_are_each_let_in_once() -> None:
    """Of all that wait nobody is lost, doubled or overtaken by one of the same key; keys take turns."""
    engine = await Engine().start()
    doors = Doors(lambda event: None, asyncio.get_running_loop())
    spec = model("a", queue=10_000, concurrency=10_000)
    doors.configure({"a": spec})
    entry = doors.entry("a")
    places = [doors.join(entry, "heavy" if n % 10 else "light", 0, float(n), first=False) for n in range(10_000)]
    order: list[str] = []
    for place in places:
        place.turn.add_done_callback(lambda _, place=place: order.append(place.key))
    from vllmd.events import Open

    doors.open(Open("a", 1, "a", engine.endpoint))
    await asyncio.gather(*(place.turn for place in places))
    assert len(order) == 10_000
    assert order[:2000].count("light") == 1000, "the few of a modest key do not wait for the many of another"
    assert entry.door is not None and entry.door.under_way == 10_000
    await engine.stop()


async def test_no_more_than_concurrency_are_at_an_engine() -> None:
    release = asyncio.Event()

    async def script(asked: Asked) -> None:
        await release.wait()
        await echo(asked)

    engine = await Engine(script).start()
    async with fronted(model("a", concurrency=3)) as front:
        front.open("a", engine)
        tasks = [asyncio.ensure_future(front.post(chat())) for _ in range(8)]  # noqa: TID251
        await engine.has(3)
        await front.until(lambda: front.waiting("a") == 5)
        assert len(engine.asked) == 3
        release.set()
        assert {status for status, _, _ in await asyncio.gather(*tasks)} == {200}
        assert max(running for _, running, _ in front.use) <= 3
    await engine.stop()


async def test_a_door_that_shuts_keeps_new_ones_and_finishes_what_is_under_way() -> None:
    release = asyncio.Event()

    async def script(asked: Asked) -> None:
        await release.wait()
        await echo(asked)

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        first = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await engine.has(1)
        front.shut("a")
        assert front.use[-1] == ("a", 1, 1)
        second = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        release.set()
        assert (await first)[0] == 200
        await front.until(lambda: front.use[-1] == ("a", 0, 1))
        front.open("a", engine)
        assert (await second)[0] == 200
    await engine.stop()


# -- engines that die -------------------------------------------------------------------------------------------------


async def test_an_engine_that_dies_before_its_answer_loses_nothing() -> None:
    """The request goes back to the head of the line, once, and the next engine answers it."""

    async def dies(asked: Asked) -> None:
        asked.die()

    bad, good = await Engine(dies).start(), await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", bad)
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.shut("a", "backoff")
        front.open("a", good)
        assert (await task)[0] == 200
        assert len(bad.asked) == len(good.asked) == 1
        assert front.gateway.counted.retries["a"] == 1
    await bad.stop()
    await good.stop()


async def test_a_request_that_kills_two_engines_is_not_given_a_third() -> None:
    async def dies(asked: Asked) -> None:
        asked.die()

    engine = await Engine(dies).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.shut("a", "backoff")
        front.open("a", engine)
        status, _, value = await task
        assert (status, value["error"]["code"]) == (502, "engine_lost")
        assert "twice" in value["error"]["message"]
        assert len(engine.asked) == 2
    await engine.stop()


async def test_an_engine_that_refuses_because_it_is_stopped_counts_as_one_that_died() -> None:
    stopping = asyncio.Event()

    async def script(asked: Asked) -> None:
        await stopping.wait()
        asked.answer(b'{"detail": "draining"}', "503 Service Unavailable")

    bad, good = await Engine(script).start(), await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", bad)
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await bad.has(1)
        front.shut("a")
        stopping.set()
        await front.until(lambda: front.waiting("a") == 1)
        front.open("a", good)
        assert (await task)[0] == 200
    await bad.stop()
    await good.stop()


@pytest.mark.parametrize(("path", "shape"), [("/v1/chat/completions", "openai"), ("/v1/messages", "anthropic")])
async def test_a_stream_whose_engine_dies_ends_with_an_error(path: str, shape: str) -> None:
    """In the client's words; never as if it were complete."""

    async def script(asked: Asked) -> None:
        asked.begin()
        asked.chunk(b"data: one\n\n")
        await asked.writer.drain()
        await seen.wait()
        asked.die()

    seen = asyncio.Event()
    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        async with front.session.post(path, json=chat(stream=True)) as answer:
            assert await answer.content.readline() == b"data: one\n"
            seen.set()
            rest = (await answer.read()).decode().strip()
        error = json.loads(rest.partition("data: ")[2].partition("\n")[0])["error"]
        assert "in the middle of its answer" in error["message"]
        assert rest.startswith("event: error" if shape == "anthropic" else "data: {")
        assert ("[DONE]" in rest) == (shape == "openai")
    await engine.stop()


async def test_a_plain_answer_that_is_cut_is_no_answer() -> None:
    async def script(asked: Asked) -> None:
        asked.begin("application/json")
        asked.chunk(b'{"half": ')
        await asked.writer.drain()
        asked.die()

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        with pytest.raises(ClientError):
            await front.post(chat())
    await engine.stop()


async def test_a_connection_that_the_engine_closed_meanwhile_is_no_death() -> None:
    """vLLM's server closes idle connections after five seconds."""

    async def closes(asked: Asked) -> None:
        await echo(asked)
        await asked.writer.drain()
        asked.writer.close()

    engine = await Engine(closes).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        for _ in range(5):
            assert (await front.post(chat()))[0] == 200
        assert front.gateway.counted.retries == {}
    await engine.stop()


@pytest.mark.parametrize(
    "garbage", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"\x00" * 400]
)
async def test_what_is_no_http_is_no_engine(garbage: bytes) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(garbage)

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.refuse("a", "it failed")
        assert (await task)[0] == 503
    await engine.stop()


# -- clients that go, or do not read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_ends_its_request_at_the_engine(stream: bool) -> None:
    """In the middle of a stream, and while the engine is silent."""

    async def script(asked: Asked) -> None:
        if stream:
            asked.begin()
            asked.chunk(b"data: one\n\n")
        await asked.gone.wait()

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        body = json.dumps(chat(stream=stream)).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        (asked,) = await engine.has(1)
        if stream:
            await reader.readuntil(b"one")
        writer.transport.abort()
        async with asyncio.timeout(LIMIT):
            await asked.gone.wait()
        await front.until(lambda: front.use and front.use[-1][1] == 0)
    await engine.stop()


async def test_a_client_that_does_not_read_holds_back_the_engine_and_loses_nothing() -> None:
    """The gateway holds a bounded part of what the engine would send; read later, all of it is there."""
    sent = 0
    size = 64 << 20

    async def script(asked: Asked) -> None:
        nonlocal sent
        asked.begin()
        for _ in range(size >> 16):
            asked.chunk(b"z" * (1 << 16))
            sent += 1 << 16
            await asked.writer.drain()
        asked.end()

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port, limit=1 << 16)
        body = json.dumps(chat(stream=True)).encode()
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % len(body)
        )
        writer.write(head + body)
        await reader.readuntil(b"\r\n\r\n")
        last, still = -1, 0
        while still < 20:  # until nothing moves any more
            still, last = (still + 1 if sent == last else 0), sent
            await asyncio.sleep(0.02)
        assert sent < size - (8 << 20), "the engine must not run ahead of its client without end"
        got = 0
        while data := await reader.read(1 << 20):
            got += data.count(b"z")
        assert got == size
        writer.close()
    await engine.stop()


async def test_two_hundred_slow_clients_do_not_keep_one_from_its_answer() -> None:
    """Each has sent half of its request, and sends no more."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        slow = [await asyncio.open_connection("127.0.0.1", front.port) for _ in range(200)]
        for _, writer in slow:
            writer.write(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"model": "a"')
        for _ in range(5):
            assert (await front.post(chat()))[0] == 200
        for _, writer in slow:
            writer.transport.abort()
        await front.until(lambda: front.gateway.counted.memory == 0)
        assert len(engine.asked) == 5
    await engine.stop()


# -- bounds and malice ------------------------------------------------------------------------------------------------


async def test_bodies_are_bounded_each_and_together() -> None:
    async with fronted(model("a"), http=HttpSpec(max_body=10_000, memory=15_000)) as front:
        status, _, value = await front.post(chat(pad="x" * 20_000))
        assert (status, value["error"]["code"]) == (413, "body_too_large")
        task = asyncio.ensure_future(front.post(chat(pad="x" * 9_000)))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        status, headers, value = await front.post(chat(pad="x" * 9_000))
        assert (status, value["error"]["code"]) == (503, "out_of_memory")
        assert "Retry-After" in headers
        front.refuse("a")
        await task
        assert front.gateway.counted.memory == 0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'{"model": "a"', 400, "invalid_json"),
        (b'{"model": 3}', 400, "invalid_model"),
        (b'{"model": "a", "stream": "yes"}', 400, "invalid_stream"),
        (b"{}", 400, "model_missing"),
        (b'{"model": "b"}', 404, "model_not_found"),
        (b'{"model": "../a"}', 404, "model_not_found"),
        (b'{"x":' + b"[" * 100_000, 400, "invalid_json"),
    ],
)
async def test_what_cannot_be_routed_is_refused_with_a_reason(body: bytes, status: int, code: str) -> None:
    async with fronted(model("a")) as front:
        got, _, value = await front.post(body)
        assert (got, value["error"]["code"]) == (status, code)
        assert value["error"]["message"]
        assert front.events == []


async def test_the_nearest_name_is_named() -> None:
    async with fronted(model("dots-ocr"), model("chat")) as front:
        _, _, value = await front.post(chat("dots-orc"))
        assert value["error"]["hint"] == 'did you mean "dots-ocr"?'
        assert value["error"]["param"] == "model"


SMUGGLED = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /",
    b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    b"Transfer-Encoding: xchunked\r\nContent-Length: 30\r\n\r\n" + b"x" * 30,
    b"Content-Length: +5\r\n\r\nhello",
    b"Content-Length : 5\r\n\r\nhello",
    b"X: a\r\n b: c\r\nContent-Length: 0\r\n\r\n",
    b"X: a\x00b\r\nContent-Length: 0\r\n\r\n",
]


@pytest.mark.parametrize("head", SMUGGLED)
async def test_what_two_servers_could_read_in_two_ways_reaches_no_engine(head: bytes) -> None:
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + head)
        async with asyncio.timeout(LIMIT):
            answer = await reader.readline()
        assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4")), answer[:100]
        assert engine.asked == []
        writer.close()
    await engine.stop()


@pytest.mark.parametrize("query", ["a=%0d%0aX:y", "x=%00", "q=a%20b"])
async def test_a_query_cannot_add_to_the_head(query: str) -> None:
    """It is handed on encoded as it came, so that no line of it ends."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        body = json.dumps(chat()).encode()
        more = f"Host: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(f"POST /v1/chat/completions?{query} HTTP/1.1\r\n{more}".encode() + body)
        await reader.read()
        for asked in engine.asked:
            assert asked.line == f"POST /v1/chat/completions?{query} HTTP/1.1"
            assert "x" not in asked.headers
        writer.close()
    await engine.stop()


async def test_the_rest_of_a_refused_body_is_not_taken_for_a_request() -> None:
    engine = await Engine().start()
    async with fronted(model("a"), http=HttpSpec(max_body=1000)) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        inner = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n" + b'{"model":"a"}'
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + inner * 20)
        async with asyncio.timeout(LIMIT):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 413 " in answer and b"Connection: close" in answer
        writer.transport.abort()
        assert engine.asked == []
    await engine.stop()


async def test_paths_that_are_not_on_the_list_are_not_ours() -> None:
    async with fronted(model("a")) as front:
        takes = front.gateway.takes
        assert takes("/v1/chat/completions") and takes("/v1/models") and takes("/v1/models/a")
        for path in (
            "/sleep",
            "/v1/load_lora_adapter",
            "/invocations",
            "/v1/chat/completions/",
            "/v1//models",
            "/metrics",
        ):
            assert not takes(path), path
        assert (await front.session.get("/v1/chat/completions")).status == 405


# -- models and keys --------------------------------------------------------------------------------------------------


async def test_models_are_listed_with_their_true_state() -> None:
    async with fronted(model("a", aliases=(Alias("gpt"),)), model("b")) as front:
        front.outlooks["b"] = Outlook("ready", "")
        listed = await (await front.session.get("/v1/models")).json()
        assert [(m["id"], m["status"], m.get("alias_of")) for m in listed["data"]] == [
            ("a", "stopped", None), ("gpt", "stopped", "a"), ("b", "ready", None),
        ]  # fmt: skip
        assert (await (await front.session.get("/v1/models/gpt")).json())["alias_of"] == "a"
        assert (await front.session.get("/v1/models/nope")).status == 404


async def test_a_key_sees_and_asks_only_its_models() -> None:
    engine = await Engine().start()
    async with fronted(model("a"), model("b")) as front:
        front.open("a", engine)
        front.key = ApiKey("k", "0" * 64, models=("a",), priority=3)
        assert (await front.post(chat("a")))[0] == 200
        status, _, value = await front.post(chat("b"))
        assert (status, value["error"]["code"]) == (403, "model_not_allowed")
        listed = await (await front.session.get("/v1/models")).json()
        assert [m["id"] for m in listed["data"]] == ["a"]
    await engine.stop()


async def test_a_removed_model_is_no_more() -> None:
    async with fronted(model("a"), model("b")) as front:
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.gateway.configure({"b": front.models["b"]}, front.http)
        assert (await task)[0] == 404
        assert (await front.post(chat()))[0] == 404


async def test_at_the_end_who_waits_is_told() -> None:
    async with fronted(model("a")) as front:
        task = asyncio.ensure_future(front.post(chat()))  # noqa: TID251
        await front.until(lambda: front.waiting("a") == 1)
        front.gateway.close()
        status, _, value = await task
        assert (status, value["error"]["code"]) == (503, "closing")
        assert (await front.post(chat()))[0] == 503


async def test_a_defect_of_ours_is_an_error_with_a_name() -> None:
    async with fronted(model("a")) as front:

        def breaks(name: str) -> Outlook:
            raise RuntimeError("defect")

        front.gateway._carrier._look = breaks
        status, _, value = await front.post(chat(), headers={"X-Vllmd-No-Wait": "1"})
        assert (status, value["error"]["code"]) == (500, "internal")
        assert len(front.faults) == 1
        front.faults.clear()
        with contextlib.suppress(AssertionError):
            front.refuse("a")
