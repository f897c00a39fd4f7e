"""Clients that nobody would write, and those that everybody has: what stands on the wire, byte for byte."""

import asyncio
import json
import socket
from typing import Any

import pytest

from tests.engines import LIMIT, Asked, Engine, Front, echo, fronted, model
from vllmd.events import Open, Used
from vllmd.gateway.gateway import REMEMBERED, REMEMBERED_SIZE, _kept

CHAT = {"model": "a", "messages": []}


def request(
    body: dict[str, Any] | None = None, *more: str, path: str = "/v1/chat/completions", method: str = "POST"
) -> bytes:
    data = json.dumps(body).encode() if body is not None else b""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", *more, "", ""]
    return "\r\n".join(lines).encode() + data


async def read_answer(reader: asyncio.StreamReader, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
    """The next answer on a connection, by its own framing."""
    async with asyncio.timeout(LIMIT):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        status = int(head[0].split()[1])
        length = int(headers.get("content-length", "0"))
        return status, headers, await reader.readexactly(length) if body else b""


async def settled(front: Front) -> None:
    """Until nobody is at the engine."""
    await front.until(lambda: (door := front.gateway.doors.entry("a").door) is not None and not door.under_way)


async def test_an_answer_to_head_has_no_body_and_the_connection_lives_on() -> None:
    """A body there would be read as the beginning of the next answer."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        for path, status in (("/v1/chat/completions", 405), ("/v1/models", 200), ("/v1/models/nope", 404)):
            writer.write(request(path=path, method="HEAD"))
            got, headers, _ = await read_answer(reader, body=False)
            assert (got, int(headers["content-length"]) > 0) == (status, True)
            writer.write(request(CHAT))
            status, _, body = await read_answer(reader)
            assert (status, json.loads(body)["model"]) == (200, "a")
        writer.close()
    await engine.stop()


async def test_requests_that_come_at_once_are_answered_one_after_the_other() -> None:
    engines = [await Engine().start(), await Engine().start()]
    async with fronted(model("a"), model("b")) as front:
        for name, engine in zip("ab", engines, strict=True):
            front.open(name, engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        order = "abbabaab" * 4
        writer.write(b"".join(request(CHAT | {"model": name}, f"X-Request-Id: {n}") for n, name in enumerate(order)))
        for n, name in enumerate(order):
            _, headers, body = await read_answer(reader)
            assert (headers["x-request-id"], json.loads(body)["model"]) == (str(n), name)
        writer.close()
    for engine in engines:
        await engine.stop()


async def test_who_asks_and_asks_and_never_reads_is_not_served_without_end() -> None:
    """Each answer waits until there is room for it: else a few kilobytes of requests would fill our memory with answers."""

    async def script(asked: Asked) -> None:
        asked.answer(b"y" * (200 << 10))

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", front.port))
        count = 400  # 80 MB of answers
        sending = asyncio.ensure_future(loop.sock_sendall(raw, request(CHAT) * count))  # noqa: TID251
        last, still = -1, 0
        while still < 40:  # until nothing moves any more
            still, last = (still + 1 if len(engine.asked) == last else 0), len(engine.asked)
            await asyncio.sleep(0.01)
        assert len(engine.asked) < count // 2
        got = 0
        async with asyncio.timeout(LIMIT):
            while got < count * (200 << 10):
                data = await loop.sock_recv(raw, 1 << 20)
                assert data
                got += data.count(b"y")
            await sending
        assert len(engine.asked) == count
        raw.close()
    await engine.stop()


@pytest.mark.parametrize("steady", [True, False])
async def test_a_slow_client_is_served_and_one_that_takes_nothing_is_cut(
    steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is for taking something, not for taking much: it counts from the last byte taken."""
    monkeypatch.setattr("vllmd.gateway.client.PATIENCE", 0.5)
    ended = asyncio.Event()
    size = 16 << 20

    async def script(asked: Asked) -> None:
        asked.begin()
        try:
            for _ in range(size >> 16):
                asked.chunk(b"z" * (1 << 16))
                await asked.writer.drain()
            asked.end()
        except ConnectionError:
            ended.set()
            raise

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(raw, ("127.0.0.1", front.port))
        await loop.sock_sendall(raw, request(CHAT | {"stream": True}))
        await engine.has(1)
        if steady:
            got = 0
            for _ in range(60):  # six times the patience, some kilobytes of it
                data = await loop.sock_recv(raw, 2048)
                assert data, "cut while it was reading"
                got += len(data)
                await asyncio.sleep(0.05)
            assert not ended.is_set() and not engine.asked[0].gone.is_set()
        else:
            async with asyncio.timeout(LIMIT):
                await ended.wait()
            await settled(front)
        raw.close()
    await engine.stop()


async def test_old_clients_get_an_answer_that_ends_with_the_connection() -> None:
    async def script(asked: Asked) -> None:
        if b"true" in asked.body:
            asked.begin()
            asked.chunk(b"data: one\n\n")
            asked.end()
        else:
            await echo(asked)

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        for stream in (True, False):
            reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
            writer.write(request(CHAT | {"stream": stream}).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            async with asyncio.timeout(LIMIT):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower() and b"chunked" not in head.lower()
            assert body == b"data: one\n\n" if stream else json.loads(body)["model"] == "a"
            writer.close()
    await engine.stop()


async def test_headers_of_the_connection_end_here_and_only_those() -> None:
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(
            request(
                CHAT, "Connection: keep-alive, X-Mine", "Connection: X-Other", "X-Mine: 1", "X-Other: 1", "Alive: 1", "X-M: 1",
                "Keep-Alive: timeout=5", "TE: trailers", "Upgrade-Insecure-Requests: 1", "X-Forwarded-For: 10.0.0.1",
            )
        )  # fmt: skip
        assert (await read_answer(reader))[0] == 200
        names = set(engine.asked[0].headers)
        assert not names & {"connection", "x-mine", "x-other", "keep-alive", "te", "x-forwarded-for"}
        assert {"alive", "x-m"} <= names
        writer.close()
    await engine.stop()


async def test_a_victim_that_is_opened_again_is_never_told_idle_while_it_works() -> None:
    """The core ends a victim when it is told that nothing is under way."""
    release = asyncio.Event()

    async def script(asked: Asked) -> None:
        await release.wait()
        await echo(asked)

    engine = await Engine(script).start()
    async with fronted(model("a")) as front:
        attempt = front.open("a", engine)
        first = asyncio.ensure_future(front.post(CHAT))  # noqa: TID251
        await engine.has(1)
        front.shut("a")
        front.gateway.open(Open("a", attempt, "a", engine.endpoint))
        front.shut("a")
        assert isinstance(front.events[-1], Used) and front.events[-1].running == 1
        release.set()
        assert (await first)[0] == 200
        await front.until(lambda: front.use[-1][1] == 0)
    await engine.stop()


async def test_headers_that_are_remembered_do_not_fill_the_memory() -> None:
    """What is handed on of a set of headers is kept for the next request with the same; never of large ones, and never many."""
    engine = await Engine().start()
    async with fronted(model("a")) as front:
        front.open("a", engine)
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        for n in range(REMEMBERED + 50):
            writer.write(request(CHAT, f"X-Large: {n}{'x' * 5000}", f"X-Small: {n}"))
            writer.write(request(CHAT, f"X-Small: {n}"))
            for _ in range(2):
                assert (await read_answer(reader))[0] == 200
        assert [asked.headers["x-small"] for asked in engine.asked[::2]] == [str(n) for n in range(REMEMBERED + 50)]
        assert len(_kept) <= REMEMBERED
        assert max(len(value) for value in _kept.values()) < REMEMBERED_SIZE
        writer.close()
    await engine.stop()


async def test_clients_that_leave_are_counted_with_the_model_that_they_asked() -> None:
    """In line, and while the engine is at it."""

    async def silent(asked: Asked) -> None:
        await asked.gone.wait()

    engine = await Engine(silent).start()
    async with fronted(model("a"), model("b")) as front:
        front.open("a", engine)
        for name, count in (("a", 1), ("b", 2)):
            for _ in range(count):
                _, writer = await asyncio.open_connection("127.0.0.1", front.port)
                writer.write(request(CHAT | {"model": name}))
                await front.until(lambda: front.waiting("b") or engine.asked)
                writer.transport.abort()
                await front.until(lambda: not front.waiting("b"))
            await front.until(lambda: front.gateway.counted.answers[name, "gone"] == count)  # noqa: B023
    await engine.stop()
