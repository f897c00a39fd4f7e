"""From a request to its answer: who asks, may they, what says the table; whatever goes wrong is one kind of JSON.

A page of another site must neither read nor ask, although the browser that shows it runs on this machine: on TCP the
Host header must name us (else a name of the attacker's points here: DNS rebinding), and Origin the same host. An
address that is a literal cannot be rebound, so any is let through. What comes over the unix socket comes from no
browser.
"""

import asyncio
import ipaddress
import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote, urlsplit

from aiohttp import HttpVersion11, web

from vllmd.edge.auth import REMEMBERED, Guard
from vllmd.edge.backend import Access, Backend, Caller, Front, Refused
from vllmd.edge.params import Body, read_object, read_params, read_text
from vllmd.edge.route import Call, Route, reply
from vllmd.edge.routes import LINES, ROUTES, SSE, check_name
from vllmd.edge.stream import EventLog
from vllmd.spec import HttpSpec, Scope

HEADERS: Final = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Server": "vllmd"}
STREAMS: Final = frozenset({SSE, LINES})  # kinds of answers that may have no end
Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may cost. Times in seconds; `connections` on the socket, `web_connections` on TCP."""

    connections: int = 500
    web_connections: int = 4096
    request: float = 30.0  # until a request is complete; also how long a connection may idle
    handshake: float = 10.0  # until TLS is agreed upon; only then a connection counts among `web_connections`
    patience: float = 30.0  # without taking anything of what it is sent
    grace: float = 0.3  # when the daemon ends: until a request that is on its way has come
    goodbye: float = 0.4  # and that a response in progress gets


class Gate:
    """The one handler of a listener. `names` are the hosts that Host may name; None on the unix socket. `front` answers what is
    for models, and `origins` are pages that may ask it."""

    def __init__(
        self,
        backend: Backend,
        events: EventLog,
        names: Collection[str] | None,
        limits: Limits,
        *,
        guard: Guard | None = None,
        front: Front | None = None,
    ) -> None:
        self._backend = backend
        self._events = events
        self._own = None if names is None else frozenset(map(str.lower, names))
        self._names = self._own
        self._origins: frozenset[str] = frozenset()
        self._known_hosts: set[str] = set()  # that were found good: the same few come again and again
        self._limits = limits
        self._guard = guard or Guard(HttpSpec(), {})
        self._front = front

    def reconfigure(self, http: HttpSpec) -> None:
        """What of a reloaded configuration concerns who may ask."""
        self._origins = frozenset(http.origins)
        self._names = None if self._own is None else self._own | frozenset(map(str.lower, http.hosts))
        self._known_hosts = set()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer. Raises nothing but CancelledError: aiohttp would log a traceback for each client that leaves."""
        if self._front is not None and self._front.takes(request.path):
            return await self._to_front(self._front, request)
        response: web.StreamResponse
        try:
            response = await self._answer(request)
        except Refused as refusal:
            response = refuse(refusal)
        except ConnectionError:
            return cut(request)
        except TimeoutError:
            response = refuse(Refused(503, "busy", "the daemon did not answer in time", "try again"))
        except Exception as error:
            ident = secrets.token_hex(4)
            self._backend.fault(ident, f"{request.method} {request.raw_path[:200]}", error)
            if request.writer.output_size > 0:  # a stream has begun: there is no way to say it
                return cut(request)
            hint = f"the journal has the story: journalctl -u vllmd -g {ident}"
            response = refuse(Refused(500, "internal", f"vllmd made an error ({ident})", hint, data={"id": ident}))
        return await self._deliver(request, response)

    async def _to_front(self, front: Front, request: web.BaseRequest) -> web.StreamResponse:
        """A request for a model. Its way is kept short: no task, no timer, no look at the status."""
        origin = ""
        try:
            self._check_host(request)
            if "Origin" in request.headers:
                origin = self._check_origin(request, front=True)
                if request.method == "OPTIONS":
                    return await self._deliver(request, self._preflight(origin))
            key = None if self._names is None else self._guard.key_of(request)
            if key is not None and Scope.INFER not in key.scopes:
                raise Refused(
                    403, "no-scope", f'the key "{key.name}" is not for requests to models', 'scopes = ["infer"]'
                )
            if request.headers.get("Expect"):
                await expect(request, body=request.method == "POST")
        except Refused as refusal:
            said = refusal.message, refusal.hint
            return front.refusal(request, refusal.status, refusal.code, *said, origin)
        except ConnectionError:
            return cut(request)
        return await front.answer(request, key, origin)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self._check_host(request)
        self._check_origin(request, front=False)
        route, words = find(request)
        caller = Caller(Access.OPEN, "") if route.access is Access.OPEN else self._guard.caller(request)
        if route.access is Access.ADMIN and caller.access is not Access.ADMIN:
            hint = 'use vllmctl on this machine, or a key with scopes = ["admin"]'
            raise Refused(403, "read-only", f"{request.method} {route.path} is not allowed over TCP", hint)
        if route.access is Access.READ and caller.access is Access.OPEN:
            raise Refused(403, "no-scope", f"this key may not ask for {route.path}", 'scopes = ["infer", "read"]')
        await expect(request, body=route.body is not Body.NONE)
        text = await read_text(request, self._limits.request) if route.body is not Body.NONE else ""
        body = read_object(text) if route.body is Body.JSON else {}
        args = read_params(route.params, request.query, body)
        name = check_name(words[0], self._backend.status()["models"]) if words else ""
        if request.method == "HEAD" and route.answer in STREAMS:
            return web.Response(content_type=route.answer)  # what comes may have no end, and none of it may be sent
        call = Call(request, caller, self._backend, self._events, self._limits.patience, name, args, text)
        return await route.handler(call)

    def _check_host(self, request: web.BaseRequest) -> None:
        """Raise Refused unless the request is meant for us."""
        if self._names is None:
            return
        hosts = request.headers.getall("Host", [])
        if len(hosts) == 1 and hosts[0] in self._known_hosts:
            return
        if len(hosts) != 1:
            raise Refused(400, "bad-host", "exactly one Host header is needed")
        name = host_name(hosts[0])
        if name not in self._names and not is_address(name):
            hint = f"known names: {', '.join(sorted(self._names))}; add yours to [http] hosts"
            raise Refused(421, "bad-host", f'this is not "{hosts[0][:200]}"', hint)
        if len(self._known_hosts) < REMEMBERED:
            self._known_hosts.add(hosts[0])

    def _check_origin(self, request: web.BaseRequest, *, front: bool) -> str:
        """The page that may read the answer, "" for our own. Raises Refused for a page that must not ask."""
        origins = request.headers.getall("Origin", [])
        if not origins or (not front and request.method in ("GET", "HEAD")):
            return ""
        if len(origins) == 1 and origins[0] in self._origins:
            return origins[0]
        if [origin_host(origin) for origin in origins] == request.headers.getall("Host", [])[:1]:
            return ""
        hint = f'[http] origins = ["{origins[0][:100]}"] would let it' if front else ""
        raise Refused(403, "bad-origin", "a page of another site must not ask this", hint)

    def _preflight(self, origin: str) -> web.Response:
        """What a page may send, told to its browser before it does."""
        allowed = {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": "GET, POST",
            # "*" is for the dozen that the official clients send; it does not cover Authorization.
            "Access-Control-Allow-Headers": "Authorization, *",
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        }
        return web.Response(status=204, headers=allowed if origin else {})

    async def _deliver(self, request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
        """Send it here and not in aiohttp, which would wait for ever for a client that does not read."""
        try:
            async with asyncio.timeout(self._limits.patience):
                if not response.prepared:
                    if self._events.closed:
                        response.force_close()  # the daemon ends: no further request is heard here
                    response.headers.update(HEADERS)
                    await response.prepare(request)
                await response.write_eof()
        except (ConnectionError, TimeoutError):
            return cut(request)
        return response


async def expect(request: web.BaseRequest, *, body: bool) -> None:
    """Tell a client who waits with its body that it may come; not where none is taken. Raises Refused(417)."""
    wanted = request.headers.get("Expect", "")
    if not wanted or request.version < HttpVersion11:
        return
    if wanted.lower() != "100-continue":
        raise Refused(417, "bad-expect", f"cannot meet the expectation {wanted[:80]!r}", "leave the header Expect out")
    if body:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer has not begun


def refuse(refusal: Refused) -> web.Response:
    """A refusal as a response. The connection ends with it: an unread body may stand in the way of the next request."""
    response = reply(refusal.body(), refusal.status, {**HEADERS, **refusal.headers})
    if refusal.status in (400, 408, 413, 417, 421):
        response.force_close()
    return response


def cut(request: web.BaseRequest) -> web.Response:
    """End the connection; what is returned goes nowhere."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def host_name(host: str) -> str:
    """The name in a Host header: without port, brackets and a dot at the end, in lower case."""
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return name.strip("[]").rstrip(".").lower()


def is_address(name: str) -> bool:
    """Whether it is an IP address in letters and not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def origin_host(origin: str) -> str:
    """The host and port of an Origin; "" when it has none ("null")."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def own_names(listen: Collection[str]) -> frozenset[str]:
    """The names under which this machine may be asked, with those that it listens on."""
    node = os.uname().nodename.lower()
    return frozenset({"localhost", node, node.partition(".")[0], *map(str.lower, listen)}) - {""}


def find(request: web.BaseRequest) -> tuple[Route, Words]:
    """The route of a request and what stands for {name}. Raises Refused: 404 no such path, 405 no such method there."""
    path = request.rel_url.raw_path
    method = "GET" if request.method == "HEAD" else request.method
    found = {route.method: (route, words) for route in ROUTES if (words := match(route.path, path)) is not None}
    if method in found:
        return found[method]
    if not found:
        raise Refused(404, "unknown-path", f"nothing is at {path[:200]}", "GET /api/v1/openapi.json lists all paths")
    allowed = ", ".join(sorted(found))
    message = f"{request.method[:40]} is not possible at {path[:200]}"
    raise Refused(405, "unknown-method", message, f"possible: {allowed}", headers={"Allow": allowed})


def match(pattern: str, path: str) -> Words | None:
    """What `path` has in the places of `pattern` in braces; None when it does not fit."""
    parts, given = pattern.split("/"), path.split("/")
    if len(parts) != len(given) or any(p != g and not p.startswith("{") for p, g in zip(parts, given, strict=True)):
        return None
    return tuple(unquote(g) for p, g in zip(parts, given, strict=True) if p.startswith("{"))
