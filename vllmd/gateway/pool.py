"""The way to an engine: connections to its one endpoint, kept while they are good."""

import asyncio
import contextlib
from collections import deque
from typing import Final
from urllib.parse import urlsplit

from vllmd.gateway.upstream import Connection, EngineGone, Exchange

IDLE_MAX: Final = 3.0  # seconds that a connection is kept: vLLM's server closes its own after 5
KEPT: Final = 1024  # idle connections
CONNECT_LIMIT: Final = 10.0  # seconds


class Pool:
    """Connections to one engine's endpoint ("http://127.0.0.1:8000" or "unix:/path")."""

    def __init__(self, endpoint: str, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._path = endpoint.removeprefix("unix:") if endpoint.startswith("unix:") else None
        address = urlsplit(endpoint)
        self._host, self._port = address.hostname or "", address.port or 0
        self._idle: deque[Connection] = deque()
        self._closed = False

    async def ask(self, head: bytes, body: bytes) -> Exchange:
        """Send a request; returns when its answer is there, or its head. Raises EngineGone. A connection that the engine closed
        while it was idle is no death of the engine: the request goes out on a new one."""
        connection = self._reuse()
        if connection is not None:
            exchange = connection.begin(head, body)
            try:
                await _arrive(exchange)
                return exchange
            except EngineGone as gone:
                if gone.begun or connection.used < 2:
                    raise
        exchange = (await self._connect()).begin(head, body)
        await _arrive(exchange)
        return exchange

    def _reuse(self) -> Connection | None:
        oldest = self._loop.time() - IDLE_MAX
        while self._idle:
            connection = self._idle.pop()  # the last that was used: the others may go idle
            transport = connection.transport
            if connection.idle_since >= oldest and transport is not None and not transport.is_closing():
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(CONNECT_LIMIT):
                if self._path is not None:
                    _, made = await self._loop.create_unix_connection(lambda: Connection(self, self._loop), self._path)
                else:
                    _, made = await self._loop.create_connection(
                        lambda: Connection(self, self._loop), self._host, self._port
                    )
        except (OSError, TimeoutError) as error:
            raise EngineGone(f"cannot be reached ({error or 'no answer'})", begun=False, asked=False) from None
        return made

    def give_back(self, connection: Connection) -> None:
        """An exchange is over and the connection still good."""
        if self._closed or len(self._idle) >= KEPT:
            connection.close()
            return
        connection.idle_since = self._loop.time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """The connection is no more."""
        if connection.exchange is None and self._idle:
            with contextlib.suppress(ValueError):
                self._idle.remove(connection)

    def close(self) -> None:
        """No more requests: idle connections end, those in use when they are done."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


async def _arrive(exchange: Exchange) -> None:
    """Wait for the answer; whoever stops waiting closes the connection, so that the engine stops as well."""
    try:
        await exchange.ready
    except asyncio.CancelledError:
        exchange.abort()
        raise
