"""One request on its way: from a body that is read to an answer that is sent.

It goes through the open door of its model, or waits for it. An engine that dies before the first byte of its answer loses
nothing: the request is asked once more, at the head of the line. After that byte nothing can be done again, and the client
is told, in a stream by an error in its own words, else by a connection that breaks.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

from vllmd.gateway.client import EVENTS, JSON, Client
from vllmd.gateway.doors import Door, Doors, Entry
from vllmd.gateway.errors import Trouble, error_event
from vllmd.gateway.intake import Intake
from vllmd.gateway.paths import Place
from vllmd.gateway.upstream import EngineGone, Exchange
from vllmd.gateway.waiting import Look, not_now, stand
from vllmd.units import span

TOLD_MAX: Final = 2000  # characters of an engine's error that are handed on inside a stream


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
        retried = False
        since = 0.0
        try:
            while True:
                door = None if retried else self._doors.enter(entry)
                if door is None:
                    since = since or asyncio.get_running_loop().time()
                    door = await self._wait(errand, client, since, first=retried)
                try:
                    exchange = await door.pool.ask(errand.head, errand.body)
                    if exchange.status == 503 and not door.open and exchange.whole:
                        raise EngineGone("it is being stopped", begun=False)
                    errand.body = b""
                    self._intake.forget(held)
                    held = 0
                    await self._hand_on(errand, client, exchange)
                    return
                except EngineGone as gone:
                    if gone.begun or retried:
                        raise self._lost(errand, gone) from None
                    retried = True
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
        if exchange.whole:
            body = exchange.take()
            if not client.begun:
                client.whole(exchange.status, kind, body, exchange.more)
                return
            if exchange.status < 400 and kind.startswith(b"text/event-stream"):
                client.write(body)
            else:
                client.write(error_event(errand.place.dialect, _as_trouble(exchange, body), client.ident))
            client.end()
            return
        if client.begun and exchange.status >= 400:
            exchange.abort()
            raise Trouble(exchange.status, "engine_error", "the engine refused the request")
        if not client.begun:
            client.begin(exchange.status, kind, exchange.more)
        try:
            await exchange.pour(client.write, client.drain)
        except EngineGone as gone:
            if not kind.startswith(EVENTS[:17]):
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


def _as_trouble(exchange: Exchange, body: bytes) -> Trouble:
    """What an engine refused, for a client whose stream has begun."""
    return Trouble(exchange.status, "engine_error", body.decode(errors="replace")[:TOLD_MAX])
