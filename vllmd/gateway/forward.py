"""One request on its way: from a body that is read to an answer that is sent.

It goes through the open door of its model, or waits for it. An engine that dies before the first byte of its answer loses
nothing: the request is asked once more, at the head of the line. After that byte nothing can be done again, and the client
is told, in a stream by an error in its own words, else by a connection that breaks.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

import msgspec

from vllmd.gateway.client import JSON, STREAM, Client
from vllmd.gateway.doors import Door, Doors, Entry
from vllmd.gateway.errors import Trouble, error_event
from vllmd.gateway.intake import Intake
from vllmd.gateway.paths import Place
from vllmd.gateway.upstream import EngineGone, Exchange
from vllmd.gateway.waiting import Look, not_now, stand
from vllmd.units import span

TOLD_MAX: Final = 2000  # characters of an engine's error that are handed on inside a stream
REFUSAL_MAX: Final = 64 << 10  # bytes of it that are read
#: Of vLLM 0.32: its engine died under the API server; the API server drains.
LAST_WORDS: Final = (b"EngineCore encountered", b"EngineDeadError", b"cannot schedule new futures after shutdown")


@dataclass(slots=True)
class Errand:
    """One request. `head` and `body` are what is sent to the engine; `patient` False = the client will not wait."""

    place: Place
    entry: Entry
    head: bytes
    body: bytes
    key: str
    priority: int
    stream: bool
    patient: bool


class Carrier:
    """Carries errands out."""

    def __init__(self, doors: Doors, intake: Intake, look: Look) -> None:
        self._doors, self._intake, self._look = doors, intake, look

    async def carry(self, errand: Errand, client: Client) -> None:
        """Until the answer is sent. Raises Trouble where there is none, ConnectionError where the client is gone."""
        entry, counted = errand.entry, self._intake.counted
        held = len(errand.body)
        again = retried = False
        since = 0.0
        try:
            while True:
                door = None if again else self._doors.enter(entry)
                if door is None:
                    since = since or asyncio.get_running_loop().time()
                    door = await self._wait(errand, client, since, first=again)
                try:
                    exchange = await door.pool.ask(errand.head, errand.body)
                    if exchange.status >= 500 and exchange.whole and _dying(exchange, door):
                        raise EngineGone("it is being stopped", begun=False)
                    errand.body = b""
                    self._intake.forget(held)
                    held = 0
                    await self._hand_on(errand, client, exchange)
                    return
                except EngineGone as gone:
                    self._doors.doubt(entry, door)
                    if gone.begun or (gone.asked and retried):
                        raise self._lost(errand, gone) from None
                    again = True
                    if gone.asked:
                        retried, since = True, 0.0  # its time at the engine was no time in line
                        counted.retries[entry.spec.name] += 1
                finally:
                    self._doors.end(entry, door)
        finally:
            self._intake.forget(held)

    async def _wait(self, errand: Errand, client: Client, since: float, *, first: bool) -> Door:
        entry, counted = errand.entry, self._intake.counted
        name = entry.spec.name
        place = self._doors.join(entry, errand.key, errand.priority, since, first=first)
        try:
            if not errand.patient:
                await asyncio.sleep(0)  # the core hears of it first
                if not place.turn.done():
                    raise not_now(name, entry, self._look(name))
            door = await stand(
                place, entry, client, errand.place.dialect, self._look, stream=errand.stream, since=since
            )  # fmt: skip
        except BaseException:
            self._doors.leave(entry, place)
            raise
        counted.waits[name] += 1
        counted.wait_seconds[name] += asyncio.get_running_loop().time() - since
        return door

    async def _hand_on(self, errand: Errand, client: Client, exchange: Exchange) -> None:
        """The engine's answer to the client."""
        kind = exchange.kind or JSON
        counted = self._intake.counted
        counted.answers[errand.entry.spec.name, f"{exchange.status // 100}xx"] += 1
        if client.begun:
            if exchange.status >= 400 or not kind.startswith(STREAM):
                trouble = await _refused(exchange)
                client.write(error_event(errand.place.dialect, trouble, client.ident))
                client.end()
                return
        elif exchange.whole:
            client.whole(exchange.status, kind, exchange.take(), exchange.more)
            return
        else:
            client.begin(exchange.status, kind, exchange.more)
        try:
            await exchange.pour(client.write, client.drain)
        except EngineGone as gone:
            if not client.events:
                client.cut()
                return
            client.write(error_event(errand.place.dialect, self._lost(errand, gone), client.ident))
        except BaseException:
            exchange.abort()
            raise
        client.end()

    def _lost(self, errand: Errand, gone: EngineGone) -> Trouble:
        """The engine is gone for good, as far as this request goes."""
        name = errand.entry.spec.name
        outlook = self._look(name)
        what = "in the middle of its answer" if gone.begun else "twice before it answered"
        text = f"the engine of {name} was lost {what}: {gone}"
        if outlook.state != "ready":
            text += f"; {name} is {outlook.state}" + (f": {outlook.text}" if outlook.text else "")
        after = outlook.eta
        return Trouble(502, "engine_lost", text, f"try again in {span(after)}" if after else "try again", after)


def _dying(exchange: Exchange, door: Door) -> bool:
    """Whether an engine says that it cannot answer any more. vLLM's API server outlives its engine for a moment, and while it
    drains; it has 500 for both."""
    if exchange.status == 503:
        return not door.open
    body = b"".join(exchange.pieces)
    return exchange.status == 500 and any(words in body for words in LAST_WORDS)


async def _refused(exchange: Exchange) -> Trouble:
    """What an engine said instead of a stream, for a client whose stream has begun."""
    pieces: list[bytes] = []

    def sink(data: bytes) -> bool:
        pieces.append(data)
        if sum(map(len, pieces)) > REFUSAL_MAX:
            exchange.abort()
        return True

    async def drain() -> None:
        """Never needed: the sink is never full."""

    try:
        await exchange.pour(sink, drain)
    except EngineGone:
        pass  # what came of it has to do
    except BaseException:
        exchange.abort()
        raise
    if exchange.status >= 400:
        return Trouble(exchange.status, "engine_error", _sentence(b"".join(pieces)))
    kind = exchange.kind.decode(errors="replace") or "nothing"
    return Trouble(502, "engine_error", f"the engine answered with {kind} instead of a stream")


def _sentence(body: bytes) -> str:
    """The engine's own words out of the JSON that vLLM, its Anthropic API or FastAPI puts around them."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        value = None
    inner = value.get("error", value) if isinstance(value, dict) else None
    said = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
    return (said if isinstance(said, str) and said else body.decode(errors="replace"))[:TOLD_MAX]
