"""Engines for the gateway's tests: scripted HTTP servers in the same loop, and the gateway before them, without a daemon.

A script is an async function that gets each request (its bytes are read) and a writer; nothing is paced by the clock.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, TCPConnector, web

from vllmd.edge.gate import Limits
from vllmd.edge.http import Factory
from vllmd.events import Event, Open, Refuse, Shut, Used, Wanted
from vllmd.gateway.gateway import Gateway
from vllmd.gateway.waiting import Outlook
from vllmd.spec import ApiKey, Cause, HttpSpec, ModelSpec

LIMIT = 60.0  # seconds; generous, the machine is shared


@dataclass
class Asked:
    """One request as an engine got it."""

    line: str
    headers: dict[str, str]
    body: bytes
    writer: asyncio.StreamWriter
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the other side has closed

    def answer(self, body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> None:
        """A whole answer."""
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
        self.writer.write(head.encode() + body)

    def begin(self, kind: str = "text/event-stream") -> None:
        """The head of a chunked answer."""
        self.writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())

    def chunk(self, data: bytes) -> None:
        self.writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end(self) -> None:
        self.writer.write(b"0\r\n\r\n")

    def die(self) -> None:
        """The engine is killed: its connection breaks."""
        self.writer.transport.abort()


Script = Callable[[Asked], Awaitable[None]]


async def echo(asked: Asked) -> None:
    """Says which model was asked and by which path."""
    model = json.loads(asked.body).get("model") if asked.body.startswith(b"{") else None
    asked.answer(json.dumps({"model": model, "path": asked.line.split()[1], "bytes": len(asked.body)}).encode())


class Engine:
    """One scripted engine. `asked` are all requests that it got."""

    def __init__(self, script: Script = echo) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.connections = 0
        self.endpoint = ""
        self._server: asyncio.Server | None = None
        self._news = asyncio.Condition()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, path: str = "") -> "Engine":
        if path:
            self._server = await asyncio.start_unix_server(self._serve, path)
            self.endpoint = f"unix:{path}"
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.endpoint = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def stop(self) -> None:
        """No process, no port."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def has(self, count: int) -> list[Asked]:
        """Wait until so many requests have come."""
        async with asyncio.timeout(LIMIT), self._news:
            await self._news.wait_for(lambda: len(self.asked) >= count)
        return self.asked

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {n.lower(): v.strip() for n, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                asked = Asked(head[0], headers, body, writer)
                async with self._news:
                    self.asked.append(asked)
                    self._news.notify_all()
                watch = asyncio.ensure_future(self._watch(reader, asked))  # noqa: TID251
                try:
                    await self.script(asked)
                    await writer.drain()
                finally:
                    if not watch.done():
                        watch.cancel()
                        await asyncio.gather(watch, return_exceptions=True)
                    elif not watch.cancelled():
                        watch.exception()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    @staticmethod
    async def _watch(reader: asyncio.StreamReader, asked: Asked) -> None:
        """Tells when the other side leaves during an answer."""
        while not reader.at_eof() and reader.exception() is None:
            transport = asked.writer.transport
            if transport.is_closing():
                break
            await asyncio.sleep(0.005)  # asyncio tells nobody else of it
        asked.gone.set()


class Front:
    """A gateway that listens, and what the core is told by it."""

    def __init__(self, *models: ModelSpec, http: HttpSpec | None = None) -> None:
        self.events: list[Event] = []
        self.faults: list[BaseException] = []
        self.outlooks: dict[str, Outlook] = {}
        self.models = {model.name: model for model in models}
        self.http = http or HttpSpec()
        self.key: ApiKey | None = None
        self.attempt = 0
        self._news = asyncio.Condition()

    async def start(self) -> "Front":
        loop = asyncio.get_running_loop()
        self.gateway = Gateway(
            self._hear, lambda name: self.outlooks.get(name, Outlook("stopped", "")), self._rows,
            lambda ident, where, error: self.faults.append(error), loop,
        )  # fmt: skip
        self.gateway.configure(self.models, self.http)
        server = web.Server(self._handle, handler_cancellation=True)
        self._web = server
        factory = Factory(server, Limits(), 4096)
        self._server = await loop.create_server(factory, "127.0.0.1", 0, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self.session = ClientSession(f"http://127.0.0.1:{self.port}", connector=TCPConnector(limit=0))
        return self

    async def stop(self) -> None:
        self.gateway.close()
        await self.session.close()
        self._server.close()
        await self._web.shutdown(1.0)
        assert self.faults == []

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.gateway.answer(request, self.key, "")

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {"name": n, "model": s.model, "state": self.outlooks.get(n, Outlook("stopped", "")).state, "category": []}
            for n, s in self.models.items()
        ]

    def _hear(self, event: Event) -> None:
        self.events.append(event)

    # -- the core's part

    def open(self, model: str, engine: Engine) -> int:
        self.attempt += 1
        self.gateway.open(Open(model, self.attempt, model, engine.endpoint))
        self.outlooks[model] = Outlook("ready", "")
        return self.attempt

    def shut(self, model: str, state: str = "draining") -> None:
        self.outlooks[model] = Outlook(state, "")
        self.gateway.shut(Shut(model, self.attempt, model))

    def refuse(self, model: str, text: str = "it cannot be", after: float | None = None) -> None:
        self.gateway.refuse(Refuse(model, Cause("no-room", text, "no room"), after))

    async def until(self, what: Callable[[], object]) -> None:
        """Wait until it is so; looked at with every turn of the loop."""
        async with asyncio.timeout(LIMIT):
            while not what():
                await asyncio.sleep(0.002)

    @property
    def lines(self) -> list[tuple[str, int]]:
        return [(e.model, e.waiting) for e in self.events if isinstance(e, Wanted)]

    @property
    def use(self) -> list[tuple[str, int, int]]:
        return [(e.instance, e.running, e.begun) for e in self.events if isinstance(e, Used)]

    def waiting(self, model: str) -> int:
        return dict(self.gateway.doors.lengths())[model]

    # -- clients

    async def post(self, body: Any, path: str = "/v1/chat/completions", **more: Any) -> tuple[int, Any, Any]:
        """Status, headers and the answer, JSON where it is."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | more.pop("headers", {})
        async with self.session.post(path, data=data, headers=headers, **more) as answer:
            raw = await answer.read()
            value = json.loads(raw) if answer.content_type == "application/json" and raw else raw
            return answer.status, answer.headers, value


@asynccontextmanager
async def fronted(*models: ModelSpec, http: HttpSpec | None = None) -> AsyncIterator[Front]:
    front = await Front(*models, http=http).start()
    try:
        yield front
    finally:
        await front.stop()


def model(name: str, **more: Any) -> ModelSpec:
    return ModelSpec(name, f"/m/{name}", **more)
