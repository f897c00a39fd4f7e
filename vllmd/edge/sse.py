"""Server-sent events: the daemon's events and a model's log, each as one endless response; and a log to its end.

Every stream carries the clock each five seconds (a client that hears nothing for 15 s has lost us), and ends with
`bye` when the daemon does. A client that takes nothing for `patience` seconds is cut off.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from vllmd.edge.backend import LogReader
from vllmd.edge.stream import Event, EventLog, encode, frame

CLOCK_EVERY = 5.0
LOG_POLL = 0.25  # a file cannot be awaited; this is paid only while somebody follows
HEADERS = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Accel-Buffering": "no",
    "Server": "vllmd",
}


class Feed:
    """One open stream to one client."""

    def __init__(self, request: web.BaseRequest, patience: float, headers: Mapping[str, str] = HEADERS) -> None:
        self._request = request
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._clock_due = self._loop.time() + CLOCK_EVERY
        self.response = web.StreamResponse(headers=headers)

    async def open(self) -> None:
        """Send the head, and how long to wait before coming back."""
        await self.response.prepare(self._request)
        await self.send(b"retry: 1000\n\n")

    @property
    def pause(self) -> float:
        """Seconds until the clock is due."""
        return max(0.0, self._clock_due - self._loop.time())

    async def send(self, data: bytes) -> None:
        """Write, or cut the client off. Raises ConnectionError when it is gone."""
        try:
            async with asyncio.timeout(self._patience):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def tick(self) -> None:
        """Send the clock if it is due."""
        if self.pause == 0.0:
            self._clock_due = self._loop.time() + CLOCK_EVERY
            await self.send(frame(Event(None, "clock", encode({"time": time.time()}))))

    async def end(self) -> web.StreamResponse:
        """Say goodbye: the daemon ends."""
        await self.send(frame(Event(None, "bye", encode({"time": time.time()}))))
        await self.response.write_eof()
        return self.response


async def send_events(
    request: web.BaseRequest, log: EventLog, status: Callable[[], Mapping[str, Any]], after: int | None, patience: float
) -> web.StreamResponse:
    """Everything after the id `after`, for ever. Without one, and after `lost`, a `snapshot` comes first."""
    feed = Feed(request, patience)
    await feed.open()
    reader = log.subscribe(after)

    def snapshot() -> bytes:
        return frame(Event(reader.place, "snapshot", encode(status())))

    if after is None:
        await feed.send(snapshot())
    while (events := await reader.take(feed.pause)) is not None:
        if events:
            await feed.send(b"".join(map(frame, events)) + (snapshot() if events[0].kind == "lost" else b""))
        await feed.tick()
    return await feed.end()


async def send_log(request: web.BaseRequest, log: EventLog, reader: LogReader, patience: float) -> web.StreamResponse:
    """A model's log from where `reader` stands, for ever: one `line` event per line."""
    feed = Feed(request, patience)
    await feed.open()
    while not log.closed:
        lines = await reader.read()
        if lines:
            await feed.send(b"".join(frame(Event(None, "line", encode(line))) for line in lines))
        else:
            await asyncio.sleep(LOG_POLL)
        await feed.tick()
    return await feed.end()


async def send_lines(request: web.BaseRequest, reader: LogReader, patience: float) -> web.StreamResponse:
    """A model's log to where it ends now, one JSON object per line, piece by piece: none is held for who reads slowly."""
    feed = Feed(request, patience, {**HEADERS, "Content-Type": "application/x-ndjson"})
    await feed.response.prepare(request)
    while lines := await reader.read():
        await feed.send("".join(encode(line) + "\n" for line in lines).encode())
    await feed.response.write_eof()
    return feed.response
