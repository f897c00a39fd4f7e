"""How the daemon tells what happens: its own log, and the events that clients follow."""

import time
from collections.abc import Collection

from vllmd.core import view
from vllmd.core.world import World
from vllmd.edge.journal import Log
from vllmd.edge.stream import EventLog
from vllmd.events import DevicesRead, Event, Note


class Voice:
    """Says everything twice: once for the journal, once for whoever listens now."""

    def __init__(self, log: Log, events: EventLog) -> None:
        self.log, self.events = log, events

    def note(self, note: Note) -> None:
        """A note of the core, or of the wiring itself."""
        say = getattr(self.log, note.level)
        say(note.text, model=note.instance, device=note.device, kind=note.kind, attempt=note.attempt)
        self.events.publish(
            "note",
            {
                "time": time.time(),
                "kind": note.kind,
                "level": note.level,
                "text": note.text,
                "model": note.instance,
                "attempt": note.attempt,
                "device": note.device,
            },
        )

    def changed(self, world: World, event: Event | None, touched: Collection[str | None], now: float) -> None:
        """The models that an event touched, whole; the devices when they were read."""
        for name in touched:
            inst = world.instances.get(name) if name else None
            if inst is not None:
                self.events.publish("model", view.model(world, inst, now), key=f"model:{inst.id}")
        if isinstance(event, DevicesRead):
            for device in view.devices(world, now):
                self.events.publish("device", device, key=f"device:{device['id']}")

    def removed(self, name: str) -> None:
        """A model that is not configured any more."""
        self.events.forget(f"model:{name}")
        self.events.publish("removed", {"name": name})
