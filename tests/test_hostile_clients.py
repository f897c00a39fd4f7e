"""Clients that mean harm or are broken: both listeners go on answering, never with 500, and forget them."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.stub_backend import Front, fronted
from vllmd.edge.gate import Limits

SHORT = Limits(request=0.3, patience=0.3)
START = b"POST /api/v1/start HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n"
LINE = b"%s HTTP/1.1\r\nHost: localhost\r\n\r\n"
LOGS = LINE % b"GET /api/v1/models/alpha/logs?%s"
METHODS = [
    b"",
    b" ",
    b"G\x00T",
    b"GET GET",
    b"\xff",
    b"A" * 9000,
    b"<script>",
    b"get",
    b"CONNECT",
    b"TRACE",
    b"OPTIONS",
    b"PATCH",
]
VERSIONS = [b"9.9", b"", b"1", b"x.y", b"1.1.1", b"2.0", b"-1.0"]
TARGETS = [
    b"",
    b"*",
    b"//",
    b"/%",
    b"/%zz",
    b"/\x00",
    b"/..%2f..",
    b"http://[",
    b"http://evil/",
    b"/" + b"a" * 9000,
    b"\\",
]
NAMES = [b"%2e%2e", b"%00", b"%ff", b"%0d%0aX:", b"<b>", b"a" * 5000, b""]
HEADERS = [b"X", b": x", b"X : y", b"X\x00: y", b"X: \x00", b" folded", b"X: a\rb", b"\xff: x", b"X: " + b"a" * 200_000]
HEADERS += [
    b"".join(b"X%d: %d\r\n" % (n, n) for n in range(3000)),
    b"Upgrade: websocket\r\nConnection: Upgrade",
    b"Expect: x",
]
LENGTHS = [
    b"-1",
    b"x",
    b"1e3",
    b"9" * 30,
    b"+1",
    b"0x1",
    b"",
    b"1\r\nContent-Length: 2",
    b"4\r\nTransfer-Encoding: chunked",
]
CHUNKS = [
    b"zz\r\n{}\r\n",
    b"-1\r\n",
    b"5\r\nab\r\n0\r\n",
    b"f" * 40 + b"\r\n",
    b"2\r\n{}0\r\n\r\n",
    b"\x00\r\n",
    b"1;" + b"x" * 9000,
]
BODIES = [
    b"{",
    b"[]",
    b"nul",
    b"\xff\xfe",
    b'{"now":' + b"9" * 5000 + b"}",
    b'{"models":["\\ud800","\\u0000"]}',
    b'{"models":{"a":1}}',
]
BODIES += [b"[" * 50_000, b'{"a":' * 50_000, b'{"models":[' * 50_000, b'{"all":[]}', b'{"":1}', b'"' * 2000]
QUERIES = [
    b"n=-1",
    b"n=" + b"9" * 5000,
    b"since=nan",
    b"since=1e999",
    b"n[]=1",
    b"follow=%ff",
    b"%ff=%ff",
    b"n=1&n=x",
    b"a=b&" * 900,
]
HOSTS = [
    b"Host: evil.example",
    b"Host:",
    b"Host: a\r\nHost: b",
    b"Host: [",
    b"Host: \xff",
    b"Host: localhost:9\r\nOrigin: http://[",
    b"X: y",
]
#: Every constant harm there is.
FIXED = [
    *(LINE % (method + b" /") for method in METHODS),
    *(b"GET / HTTP/%s\r\n\r\n" % version for version in VERSIONS),
    *(LINE % (b"GET " + target) for target in TARGETS),
    *(LINE % b"POST /api/v1/models/%s/start" % name for name in NAMES),
    *(GET + header + b"\r\n\r\n" for header in HEADERS),
    *(START + b"Content-Length: %s\r\n\r\n{}" % length for length in LENGTHS),
    *(START + b"Transfer-Encoding: chunked\r\n\r\n" + chunk for chunk in CHUNKS),
    *(START + b"Content-Length: %d\r\n\r\n" % len(body) + body for body in BODIES),
    *(
        START + b"Content-Encoding: %s\r\nContent-Length: 9\r\n\r\n123456789" % how
        for how in (b"gzip", b"deflate", b"br", b"x")
    ),
    *(LOGS % query for query in QUERIES),
    *(b"GET /api/v1/status HTTP/1.1\r\n%s\r\n\r\n" % host for host in HOSTS),
    GET * 100 + b"GARBAGE\r\n\r\n",
    (GET + b"\r\n") * 100 + b"GARBAGE\r\n\r\n",
    START + b"Content-Length: 1000\r\n\r\n{",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
]


def spoil(rng: random.Random) -> bytes:
    """Something nobody should send: one of FIXED as it is, cut short, with bytes changed, or noise."""
    data = bytearray(rng.choice(FIXED))
    match rng.randint(0, 3):
        case 0:
            del data[rng.randint(0, len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        case 2:
            data = bytearray(rng.randbytes(rng.randint(1, 4000)))
    return bytes(data)


async def harm(front: Front, kind: str, data: bytes) -> list[bytes]:
    """Send it, hold the connection until the server ends it; the status lines that came."""
    reader, writer = await front.connect(kind)
    got = b""
    try:
        writer.write(data)
        async with asyncio.timeout(30):
            while chunk := await reader.read(1 << 16):
                got += chunk
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return [line[9:12] for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.")]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_thousand_malformed_requests(tmp_path: Path, kind: str) -> None:
    """None gets 500 or a traceback, none keeps its connection, and who behaves is answered after and meanwhile."""
    rng = random.Random(1)
    async with fronted(tmp_path / "s", SHORT) as front:
        requests = FIXED + [spoil(rng) for _ in range(1000 - len(FIXED))]
        for start in range(0, len(requests), 250):
            group = requests[start : start + 250]
            answers = await asyncio.gather(*(harm(front, kind, data) for data in group))
            for data, statuses in zip(group, answers, strict=True):
                assert not any(status.startswith(b"5") for status in statuses), data[:200]
            assert (await front.tcp.get("/healthz")).status == 200
        assert front.stub.faults == []
        assert (await front.unix.get("/api/v1/status")).status == 200
        await gone(front, 2)


async def gone(front: Front, left: int) -> None:
    """Wait until only `left` connections are there."""
    async with asyncio.timeout(20):
        while front.listeners.connections > left:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_two_hundred_slow_clients(tmp_path: Path, kind: str) -> None:
    """Half a head, a head without its body, one byte now and then: others are answered at once, and all are dropped."""
    async with fronted(tmp_path / "s", Limits(request=1.0)) as front:
        clients = [await front.connect(kind) for _ in range(200)]
        for n, (_, writer) in enumerate(clients):
            writer.write([b"", GET[:18], START + b"Content-Length: 9\r\n\r\n{"][n % 3])
        loop = asyncio.get_running_loop()
        began = loop.time()
        for session in (front.unix, front.tcp):
            assert (await session.get("/api/v1/status")).status == 200
        assert loop.time() - began < 1.0
        while front.listeners.connections > 2 and loop.time() - began < 20:
            for _, writer in clients[:50]:
                if not writer.is_closing():
                    writer.write(b"x")  # a byte now and then does not make a request
            await asyncio.sleep(0.1)
        await gone(front, 2)
        for _, writer in clients:
            writer.transport.abort()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_too_many_connections_are_told_so(tmp_path: Path, kind: str) -> None:
    """503 for the next one on this listener; the other listener, and whoever comes when there is room, is served."""
    async with fronted(tmp_path / "s", Limits(connections=5, web_connections=5)) as front:
        clients = [await front.connect(kind) for _ in range(5)]
        async with asyncio.timeout(20):
            while front.listeners.connections < 5:
                await asyncio.sleep(0.01)
        assert await harm(front, kind, b"") == [b"503"]
        assert (await (front.tcp if kind == "unix" else front.unix).get("/healthz")).status == 200
        for _, writer in clients:
            writer.transport.abort()
        await gone(front, 1)
        assert (await (front.unix if kind == "unix" else front.tcp).get("/healthz")).status == 200


async def test_what_is_no_http_gets_our_kind_of_error(tmp_path: Path) -> None:
    """JSON, and the connection ends."""
    async with fronted(tmp_path / "s") as front:
        reader, writer = await front.connect("tcp")
        writer.write(b"\x00\x01\x02\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
        assert b'"code":"bad-request"' in answer
        writer.transport.abort()


async def test_a_body_that_does_not_come_is_408(tmp_path: Path) -> None:
    """After the limit, not never."""
    async with fronted(tmp_path / "s", SHORT) as front:
        assert await harm(front, "unix", START + b"Content-Length: 9\r\n\r\n{") == [b"408"]
