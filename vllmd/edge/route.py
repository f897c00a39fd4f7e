"""What a row of the API's table is, what its handler is given, and the two ways in which it answers."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from vllmd.edge.backend import Access, Backend, Caller
from vllmd.edge.params import Body, Param
from vllmd.edge.stream import EventLog, encode


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way: who asks what. `name` is the path's {name}, one of the configured models."""

    request: web.BaseRequest
    caller: Caller
    backend: Backend
    events: EventLog
    patience: float  # seconds that a client may take to read what it is sent
    name: str
    args: Mapping[str, Any]
    text: str  # the body of a route that takes TOML


Handler = Callable[[Call], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One row. `answer` names a schema, or a media type for what is not JSON."""

    method: str
    path: str
    access: Access
    handler: Handler
    answer: str
    summary: str
    params: tuple[Param, ...] = ()
    body: Body = Body.NONE


def reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """A JSON answer."""
    return web.Response(text=encode(value) + "\n", status=status, content_type="application/json", headers=headers)


def plain(text: str, status: int = 200) -> web.Response:
    """A text answer."""
    return web.Response(text=text, status=status)
