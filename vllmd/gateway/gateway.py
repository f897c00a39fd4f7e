"""The gateway as the daemon and its listener see it: one endpoint for all models."""

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from aiohttp import web

from vllmd.events import Event, Open, Refuse, Shut
from vllmd.gateway.aliases import Names
from vllmd.gateway.body import read_wish, rewrite
from vllmd.gateway.client import JSON, Client
from vllmd.gateway.doors import Doors
from vllmd.gateway.errors import Trouble, error_body, error_event
from vllmd.gateway.forward import Carrier, Errand
from vllmd.gateway.intake import Intake
from vllmd.gateway.paths import MODELS, PLACES, Dialect, Place
from vllmd.gateway.tallies import Counted
from vllmd.gateway.waiting import Look
from vllmd.spec import ApiKey, HttpSpec, ModelSpec

_IDENT: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~=&%+,:-]{0,2000}")
#: Headers that end here: of the connection, secret, or said anew. All others go on to the engine.
_OURS: Final = frozenset(
    {
        b"host", b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
        b"content-length", b"expect", b"authorization", b"proxy-authorization", b"x-api-key", b"cookie", b"origin",
        b"referer", b"accept-encoding", b"x-request-id", b"x-vllmd-no-wait", b"prefer", b"forwarded",
    }
)  # fmt: skip
_FORWARDED: Final = b"x-forwarded-"
HEADERS_MAX: Final = 64  # of a client's that are handed on
REMEMBERED: Final = 256  # sets of headers of which is known what is handed on
REMEMBERED_SIZE: Final = 4096  # bytes of such a set; clients could fill our memory with larger ones
_RUN: Final = secrets.token_hex(8)  # ids of this run are no other's
_NUMBERS: Final = itertools.count(1)
_kept: dict[tuple[tuple[bytes, bytes], ...], bytes] = {}

Fault = Callable[[str, str, BaseException], None]
Rows = Callable[[], Sequence[Mapping[str, Any]]]


class Gateway:
    """Requests in, answers out. `post` tells the core, `look` says how far a model is, `rows` are those of the status, `fault`
    hears of what should not have happened: an id, where, and the error. Used from the event loop only."""

    def __init__(
        self, post: Callable[[Event], None], look: Look, rows: Rows, fault: Fault, loop: asyncio.AbstractEventLoop
    ) -> None:  # fmt: skip
        self.counted = Counted()
        self.doors = Doors(post, loop)
        self._rows, self._fault = rows, fault
        self._intake = Intake(self.counted, HttpSpec().max_body, HttpSpec().memory)
        self._carrier = Carrier(self.doors, self._intake, look)
        self._names = Names({})
        self._made = int(time.time())

    def configure(self, models: Mapping[str, ModelSpec], http: HttpSpec) -> None:
        """The configuration, at first and after each reload."""
        self._names = Names(models)
        self.doors.configure(models)
        self._intake.max_body, self._intake.memory = http.max_body, http.memory

    def open(self, command: Open) -> None:
        """See the command."""
        self.doors.open(command)

    def shut(self, command: Shut) -> None:
        """See the command."""
        self.doors.shut(command)

    def refuse(self, command: Refuse) -> None:
        """See the command."""
        self.doors.refuse(command)

    def close(self) -> None:
        """The daemon ends: who waits is told so."""
        self.doors.close()

    # -- the listener's side

    def takes(self, path: str) -> bool:
        """Whether a path is ours."""
        return path in PLACES or path == MODELS or path.startswith(MODELS + "/")

    async def answer(self, request: web.BaseRequest, key: ApiKey | None, origin: str) -> web.StreamResponse:
        """Answer a request on one of our paths; raises nothing but CancelledError. `key`: who asks; None where none is needed.
        `origin`: a page that may read the answer, or ""."""
        client = Client(request, _ident(request), origin)
        path = request.path
        place = PLACES.get(path)
        dialect = place.dialect if place is not None else _dialect(request)
        try:
            if place is None:
                self._list(request, client, key, path)
            else:
                await self._carry(request, client, key, place)
        except Trouble as trouble:
            self._say(client, dialect, trouble)
        except ConnectionError:
            self.counted.answers[client.model, "gone"] += 1
            client.cut()
        except asyncio.CancelledError:
            self.counted.answers[client.model, "gone"] += 1
            client.cut()
            raise
        except Exception as error:
            ident = secrets.token_hex(4)
            self._fault(ident, f"{request.method} {path[:200]}", error)
            hint = f"the journal has the story: journalctl -u vllmd -g {ident}"
            self._say(client, dialect, Trouble(500, "internal", f"vllmd made an error ({ident})", hint))
        if client.behind:  # who asks and asks must read as well
            try:
                await client.drain()
            except ConnectionError:
                client.cut()
        return client.sent()

    def refusal(
        self, request: web.BaseRequest, status: int, code: str, message: str, hint: str, origin: str = ""
    ) -> web.StreamResponse:  # fmt: skip
        """A refusal of the listener's, in the client's own shape."""
        client = Client(request, _ident(request), origin)
        place = PLACES.get(request.path)
        dialect = place.dialect if place is not None else _dialect(request)
        self._say(client, dialect, Trouble(status, code.replace("-", "_"), message, hint))
        return client.sent()

    # -- within

    async def _carry(self, request: web.BaseRequest, client: Client, key: ApiKey | None, place: Place) -> None:
        if request.method != "POST":
            raise Trouble(405, "method_not_allowed", f"{request.method[:40]} is not possible here", "POST it")
        body = await self._intake.read(request)
        size = len(body)
        try:
            kind = request.headers.get("Content-Type", "")
            wish = read_wish(place.form, body, kind)
            spec, alias = self._names.find(wish.model)
            client.model = spec.name
            if key is not None and key.models is not None and spec.name not in key.models:
                text = f'this key may not ask for "{wish.model}"'
                raise Trouble(403, "model_not_allowed", text, f"it may ask for: {', '.join(key.models) or 'none'}")
            if alias is not None:
                body = rewrite(place.form, body, kind, spec.name, alias)
                wish = read_wish(place.form, body, kind)  # an alias may force a stream
            head = _head(request, place, client.ident, len(body))
            errand = Errand(
                place, self.doors.entry(spec.name), head, body, key.name if key is not None else "",
                key.priority if key is not None else 0, wish.stream and place.streams, _patient(request),
            )  # fmt: skip
        except BaseException:
            self._intake.forget(size)
            raise
        self.counted.memory += len(body) - size
        del body
        await self._carrier.carry(errand, client)

    def _say(self, client: Client, dialect: Dialect, trouble: Trouble) -> None:
        """Tell the client why there is no answer."""
        self.counted.refusals[str(trouble.status), trouble.code] += 1
        try:
            if client.events:
                client.write(error_event(dialect, trouble, client.ident))
                client.end()
                return
            if client.begun:  # no words of ours may stand in an answer as if they were part of it
                client.cut()
                return
            more = b""
            if trouble.retry_after is not None:
                more = b"Retry-After: %d\r\n" % max(1, round(trouble.retry_after))
            if trouble.status == 401:
                more += b"WWW-Authenticate: Bearer\r\n"
            if trouble.status == 405:
                more += b"Allow: POST\r\n"
            client.whole(trouble.status, JSON, error_body(dialect, trouble, client.ident), more)
        except ConnectionError:
            client.cut()

    def _list(self, request: web.BaseRequest, client: Client, key: ApiKey | None, path: str) -> None:
        """GET /v1/models: all that are configured, with their true state; or one of them."""
        if request.method not in ("GET", "HEAD"):
            raise Trouble(405, "method_not_allowed", f"{request.method[:40]} is not possible here", "GET it")
        cards = list(self._cards(key))
        if path != MODELS:
            name = path.removeprefix(MODELS + "/")
            spec, _ = self._names.find(name)
            value: Any = next((card for card in cards if card["id"] == name), None)
            if value is None:
                raise Trouble(403, "model_not_allowed", f'this key may not ask for "{spec.name}"')
        else:
            value = {"object": "list", "data": cards, "has_more": False}
        client.whole(200, JSON, msgspec.json.encode(value))

    def _cards(self, key: ApiKey | None) -> Iterator[dict[str, Any]]:
        for row in self._rows():
            name = row["name"]
            if key is not None and key.models is not None and name not in key.models:
                continue
            why = row.get("why") or {}
            card = {
                "id": name, "object": "model", "type": "model", "display_name": name, "created": self._made,
                "owned_by": "vllmd", "root": row["model"], "status": row["state"], "category": row["category"],
                "eta_s": row.get("eta_s"), "why": why.get("text", ""),
            }  # fmt: skip
            yield card
            for alias in self._names.aliases_of(name):
                yield card | {"id": alias, "display_name": alias, "alias_of": name}


def _ident(request: web.BaseRequest) -> str:
    """The client's own id of the request where it is sane, else a new one."""
    given = request.headers.get("X-Request-Id")
    if given is not None and _IDENT.fullmatch(given):
        return given
    return f"req-{_RUN}{next(_NUMBERS):x}"


def _dialect(request: web.BaseRequest) -> Dialect:
    return Dialect.ANTHROPIC if "anthropic-version" in request.headers else Dialect.OPENAI


def _patient(request: web.BaseRequest) -> bool:
    headers = request.headers
    if "X-Vllmd-No-Wait" in headers:
        return False
    return "respond-async" not in headers.get("Prefer", "")


def _head(request: web.BaseRequest, place: Place, ident: str, length: int) -> bytes:
    """The head of the request as the engine gets it: our path, our length, and what of the client's concerns it."""
    target = place.path
    if query := request.rel_url.raw_query_string:
        if not _QUERY.fullmatch(query):
            raise Trouble(400, "invalid_query", "the query has characters that do not belong there")
        target += "?" + query
    raw = request.raw_headers
    kept = _kept.get(raw)
    if kept is None:
        named = ",".join(request.headers.getall("Connection", ())).lower()
        kept = _handed_on(raw, frozenset(named.replace(" ", "").encode().split(b",")))
        if len(_kept) >= REMEMBERED:
            _kept.clear()
        if sum(len(name) + len(value) for name, value in raw) <= REMEMBERED_SIZE:
            _kept[raw] = kept
    line = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {ident}\r\nContent-Length: {length}\r\n"
    return line.encode() + kept


def _handed_on(raw: Iterable[tuple[bytes, bytes]], named: frozenset[bytes]) -> bytes:
    """What of a client's headers the engine gets, and the end of the head. `named`: those that are of its connection only."""
    lines = []
    for name, value in itertools.islice(raw, HEADERS_MAX):
        low = name.lower()
        if low in _OURS or low in named or low.startswith(_FORWARDED):
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines) + b"\r\n"
