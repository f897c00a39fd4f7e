"""The client towards engines by itself, against servers that say what a test wants, byte for byte."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.engines import LIMIT
from vllmd.gateway.pool import Pool
from vllmd.gateway.upstream import EngineGone, Exchange

HEAD = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@asynccontextmanager
async def pool(talk: Talk, path: Any = None) -> AsyncIterator[Pool]:
    """A pool before a server. `talk` is given each request, when its head has come, and the number of its connection."""
    writers: list[asyncio.StreamWriter] = []
    serving: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        serving.append(asyncio.current_task())
        number = len(writers)
        try:
            while not writer.is_closing():
                await reader.readuntil(b"\r\n\r\n")
                await talk(reader, writer, number)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    loop = asyncio.get_running_loop()
    if path is None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        made = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", loop)
    else:
        server = await asyncio.start_unix_server(serve, path)
        made = Pool(f"unix:{path}", loop)
    try:
        yield made
    finally:
        made.close()
        server.close()
        for writer in writers:
            writer.transport.abort()
        await server.wait_closed()
        await asyncio.gather(*(task for task in serving if task is not None))
        for _ in range(3):
            await asyncio.sleep(0)  # the other ends hear of it


async def body_of(exchange: Exchange) -> bytes:
    """All of it, however it comes."""
    if exchange.whole:
        return exchange.take()
    pieces: list[bytes] = []

    def sink(data: bytes) -> bool:
        pieces.append(data)
        return True

    async def drain() -> None:
        raise AssertionError("the sink is never full")

    async with asyncio.timeout(LIMIT):
        await exchange.pour(sink, drain)
    return b"".join(pieces)


def says(*pieces: bytes, close: bool = False) -> Talk:
    """Each piece is on the wire before the next one is written."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return talk


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
FRAMED = {
    "length": ((WHOLE,), False),
    "length in bytes": (tuple(bytes([byte]) for byte in WHOLE), False),
    "chunked": ((CHUNKED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",), False),
    "chunked in pieces": ((CHUNKED, b"2\r", b"\nhe\r\n3\r\nll", b"o\r\n0\r\n", b"X-Trailer: 1\r\n\r\n"), False),
    "until the end": ((b"HTTP/1.1 200 OK\r\n\r\n", b"hel", b"lo"), True),
    "HTTP/1.0": ((b"HTTP/1.0 200 OK\r\n\r\nhello",), True),
    "after 100 and 103": (
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nRetry-After: 1\r\n\r\n", WHOLE),
        False,
    ),
    "Retry-After": ((WHOLE.replace(b"OK\r\n", b"OK\r\nX: 1\r\nRetry-After: 3\r\n"),), False),
}


@pytest.mark.parametrize("case", FRAMED)
async def test_every_framing_of_an_answer_is_read(case: str) -> None:
    pieces, close = FRAMED[case]
    async with pool(says(*pieces, close=close)) as engine:
        for _ in range(3):
            exchange = await engine.ask(HEAD, b"")
            assert exchange.status == 200
            assert exchange.more == b"Retry-After: 3\r\n" * ("Retry" in case)
            assert await body_of(exchange) == b"hello"


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_connections_are_kept_and_each_has_one_request_at_a_time(kind: str, tmp_path: Any) -> None:
    seen: list[int] = []
    both, go = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        seen.append(number)
        if len(seen) == 2:
            both.set()
        await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number)

    async with pool(talk, str(tmp_path / "s") if kind == "unix" else None) as engine:
        asks = [asyncio.ensure_future(engine.ask(HEAD, b"")) for _ in range(2)]  # noqa: TID251
        async with asyncio.timeout(LIMIT):
            await both.wait()
        go.set()
        assert {(await ask).take() for ask in asks} == {b"1", b"2"}
        for _ in range(6):
            await engine.ask(HEAD, b"")
        assert len(seen) == 8 and set(seen) == {1, 2}


SURPLUS = {
    "a whole answer": WHOLE + b"HTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\nwrong",
    "the begin of one": WHOLE + b"HTTP/1.1 500 Oo",
    "a byte": WHOLE + b"x",
    "after chunks": CHUNKED + b"5\r\nhello\r\n0\r\n\r\nHTTP/1.1 500 Oops\r\nContent-Length: 5\r\n\r\nwrong",
}


@pytest.mark.parametrize("case", SURPLUS)
async def test_what_an_engine_says_unasked_is_nobodys_answer(case: str) -> None:
    """Neither part of the answer before it nor the answer to the next request."""
    async with pool(says(SURPLUS[case])) as engine:
        for _ in range(4):
            exchange = await engine.ask(HEAD, b"")
            assert (exchange.status, await body_of(exchange)) == (200, b"hello")


CUT = {
    "nothing": b"",
    "in the head": b"HTTP/1.1 200 OK\r\nContent-",
    "in the length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhel",
    "in a chunk": CHUNKED + b"5\r\nhel",
    "between chunks": CHUNKED + b"5\r\nhello\r\n",
    "in the last chunk": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "encoded and chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n",
    "in a large one": b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\nhello",
}


@pytest.mark.parametrize("case", CUT)
async def test_an_answer_that_is_cut_is_never_taken_for_a_whole_one(case: str) -> None:
    async with pool(says(CUT[case], close=True)) as engine:
        with pytest.raises(EngineGone) as gone:
            await body_of(await engine.ask(HEAD, b""))
        assert gone.value.begun == (case not in ("nothing", "in the head"))


async def test_an_answer_without_a_length_that_is_reset_is_cut() -> None:
    """Only a proper end of the connection is the end of such an answer."""
    come = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhel")
        await writer.drain()
        await come.wait()
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with RST
        writer.transport.abort()

    async with pool(talk) as engine:
        exchange = await engine.ask(HEAD, b"")
        come.set()
        with pytest.raises(EngineGone):
            await body_of(exchange)


async def test_nobody_there_is_no_answer() -> None:
    loop = asyncio.get_running_loop()
    for endpoint in ("http://127.0.0.1:1", "unix:/nowhere/at/all"):
        with pytest.raises(EngineGone, match="cannot be reached") as gone:
            await Pool(endpoint, loop).ask(HEAD, b"")
        assert not gone.value.begun


async def test_a_connection_that_was_idle_and_breaks_is_replaced_once() -> None:
    """The second request goes out on the kept connection, meets its end, and is answered on a new one. What breaks on a new
    connection as well is the engine's death."""
    count = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal count
        count += 1
        if count in (1, 3):
            writer.write(WHOLE)
        else:
            writer.close()

    async with pool(talk) as engine:
        assert (await engine.ask(HEAD, b"")).status == 200
        assert (await engine.ask(HEAD, b"")).status == 200
        assert count == 3
        with pytest.raises(EngineGone):
            await engine.ask(HEAD, b"")
        assert count == 5


async def test_who_stops_waiting_ends_the_connection() -> None:
    come, gone = asyncio.Event(), asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        come.set()
        try:
            await reader.read(1)
        finally:
            gone.set()

    async with pool(talk) as engine:
        ask = asyncio.ensure_future(engine.ask(HEAD, b""))  # noqa: TID251
        async with asyncio.timeout(LIMIT):
            await come.wait()
            ask.cancel()
            await gone.wait()


async def test_a_full_sink_stops_the_reading_until_it_is_drained() -> None:
    """Far more than fits into the kernel's buffers: the engine cannot write it all while nobody drains."""
    size, written = 32 << 20, 0
    drained = asyncio.Event()
    waits = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size >> 16):
            writer.write(b"z" * (1 << 16))
            await writer.drain()
            written += 1 << 16

    async with pool(talk) as engine:
        exchange = await engine.ask(HEAD, b"")
        got = 0

        def sink(data: bytes) -> bool:
            nonlocal got
            got += len(data)
            return drained.is_set()

        async def drain() -> None:
            waits.set()
            await drained.wait()

        pour = asyncio.ensure_future(exchange.pour(sink, drain))  # noqa: TID251
        async with asyncio.timeout(LIMIT):
            await waits.wait()
            last, still = -1, 0
            while still < 20:  # until nothing moves any more
                still, last = (still + 1 if written == last else 0), written
                await asyncio.sleep(0.01)
            assert got < 4 << 20 and written < size
            drained.set()
            await pour
        assert got == size
        again = await engine.ask(HEAD, b"")
        assert again.connection is exchange.connection, "it reads again, for the next one"
        again.abort()
