"""A simulation whose daemon may die: what it saved is all that the next one knows, beside the processes themselves."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace

import cattrs

from tests.sim import PLACES, Sim
from vllmd.core.core import Core
from vllmd.core.states import ALIVE, State
from vllmd.events import Adopt, Answer, Boot, Broken, Command, Event, Forget, Save, Spawn
from vllmd.record import Record, Survivor
from vllmd.spec import Settings


class Mortal(Sim):
    """The core, everything around it, and a disk that outlives it."""

    def __init__(self, config: Settings, *, gpus: dict[str, float] | None = None) -> None:
        self.disk: dict[str, str] = {}
        self.deaths = 0
        super().__init__(config, gpus=gpus)

    def account(self, command: Command) -> None:
        match command:
            case Save():
                self.disk[command.record.id] = json.dumps(asdict(command.record))
            case Forget():
                self.disk.pop(command.instance, None)
            case Spawn():
                record = self.record(command.instance)
                assert (record.attempt, record.launch) == (command.attempt, command.launch), (
                    "spawned before it was saved"
                )
                super().account(command)
            case Adopt():
                assert self.alive.get(command.instance) == command.attempt, "adopted what is not there"
            case _:
                super().account(command)

    def record(self, name: str) -> Record:
        """As the next daemon reads it."""
        return cattrs.structure(json.loads(self.disk[name]), Record)

    def die_at(self, event: Event | None, done: int) -> None:
        """SIGKILL while the commands of an event are carried out, after the first `done` of them."""
        for command in self.core.handle(event, self.now)[:done]:
            self.account(command)
            self.commands.append(command)
        self.handled += 1

    def rise(
        self, config: Settings | None = None, *, dead: Collection[str] = (), changed: Collection[str] = ()
    ) -> None:
        """The next daemon begins. The leaders of `dead` are gone meanwhile; `changed` have another configuration now."""
        self.deaths += 1
        for ticket in range(1, self.tickets + 1):
            self.answers.setdefault(ticket, Answer(ticket, 0, "its connection died with the daemon"))
        survivors = []
        for record in map(self.record, list(self.disk)):
            runs = self.alive.get(record.id) == record.attempt
            if runs and record.pid is None:  # found by its cookie
                record = replace(record, pid=100)
            survivors.append(
                Survivor(
                    record, record.pid is not None, runs and record.id not in dead,
                    ("vram",) if record.model in changed else (),
                )
            )  # fmt: skip
        known = {s.record.id for s in survivors if s.spawned and State(s.record.state) in ALIVE}
        assert set(self.alive) <= known, "a process that no record tells of"
        self.alive |= {s.record.id: s.record.attempt for s in survivors if s.record.id in known}
        settings = config or self.core.world.settings
        self.core = Core(settings, PLACES)
        self.core.handle(self.reading(), self.now)  # nothing is adopted yet: not to be checked
        self.send(Boot(tuple(survivors)))
        for survivor in survivors:
            if survivor.record.id in known and not survivor.alive:
                self.send(Broken(survivor.record.id, survivor.record.attempt, "ended while vllmd was away"))
