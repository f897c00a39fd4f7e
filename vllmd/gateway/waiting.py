"""A client whose model is not up: it stands in line, and is told how far things are.

A stream has its head at once and a comment every ten seconds, so that nobody in between takes the silence for death. Others are
held for the model's queue_timeout; a stream is as long as its model is on its way.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vllmd.gateway.client import EVENTS, Client
from vllmd.gateway.doors import AGAIN, Door, Entry
from vllmd.gateway.errors import Trouble, waiting_comment
from vllmd.gateway.line import Place
from vllmd.gateway.paths import Dialect
from vllmd.units import span

COMMENT_EVERY: Final = 10.0  # seconds
HEARD: Final = 0.02  # seconds in which the core has heard of the line, so that what is told first is no old news


@dataclass(frozen=True, slots=True)
class Outlook:
    """How far a model is that does not serve: its state, a sentence, and the seconds that are left if that is known."""

    state: str
    text: str
    eta: float | None = None


Look = Callable[[str], Outlook]


async def stand(
    place: Place, entry: Entry, client: Client, dialect: Dialect, look: Look, *, stream: bool, since: float
) -> Door:
    """Wait for one's turn. Raises Trouble: what the core says, or 503 when the time is over."""
    loop = asyncio.get_running_loop()
    name = entry.spec.name
    done, _ = await asyncio.wait((place.turn,), timeout=HEARD)
    while not done:
        if stream:
            if not client.begun:
                client.begin(200, EVENTS)
            client.write(waiting_comment(dialect, spell(name, entry, look(name))))
        left = since + entry.spec.queue_timeout - loop.time()
        pause = min(COMMENT_EVERY, left) if stream else left
        if left <= 0:
            pause = COMMENT_EVERY if stream and look(name).state == "starting" else 0.0
        if pause <= 0:
            raise too_long(name, entry, look(name))
        done, _ = await asyncio.wait((place.turn,), timeout=pause)
    return place.turn.result()


def spell(name: str, entry: Entry, outlook: Outlook) -> str:
    """The state as one line: "ocr is starting: loading weights 38 %, about 25 s left; 3 requests in line"."""
    rest = f", about {span(outlook.eta)} left" if outlook.eta is not None and " left" not in outlook.text else ""
    more = f"; {entry.line.length} requests in line" if entry.line.length > 1 else ""
    return f"{name} is {outlook.state}" + (f": {outlook.text}" if outlook.text else "") + rest + more


def too_long(name: str, entry: Entry, outlook: Outlook) -> Trouble:
    """Its time is over, and the model not up."""
    text = f"waited {span(entry.spec.queue_timeout)} (queue_timeout): {spell(name, entry, outlook)}"
    return Trouble(503, "not_ready", text, "try again later; the model goes on loading", outlook.eta or AGAIN)


def not_now(name: str, entry: Entry, outlook: Outlook) -> Trouble:
    """A client that does not want to wait."""
    hint = "try again later; the model is on its way"
    return Trouble(503, "not_ready", spell(name, entry, outlook), hint, outlook.eta or AGAIN)
