"""What the core's commands become: each is carried out at once, and what takes time is a task that reports an event."""

from typing import TYPE_CHECKING, assert_never

from vllmd.attempt import Attempt
from vllmd.events import (
    Adopt,
    Answer,
    Canary,
    Command,
    Finish,
    Forget,
    Inspect,
    Inspected,
    Keep,
    KillTree,
    Note,
    Open,
    Prove,
    ReadDevices,
    Refuse,
    Remember,
    Save,
    Shut,
    Sleep,
    Spawn,
    Terminate,
    Wake,
)
from vllmd.facts import Inspection
from vllmd.spec import Cause
from vllmd.survivors import to_keep

if TYPE_CHECKING:
    from vllmd.daemon import Daemon


class Deeds:
    """The daemon's hands."""

    def __init__(self, daemon: "Daemon") -> None:
        self.daemon = daemon

    def do(self, command: Command) -> None:
        """Carry out one command; nothing here waits."""
        daemon = self.daemon
        match command:
            case Inspect():
                daemon.tasks.start(self._inspect(command), f"inspection of {command.instance}")
            case Spawn():
                spec = daemon.core.world.instances[command.instance].spec
                attempt = daemon.attempts[command.instance] = Attempt(command, spec, daemon.shared)
                daemon.tasks.start(self._spawn(attempt), f"spawn of {command.instance}")
            case Adopt():
                spec = daemon.core.world.instances[command.instance].spec
                attempt = daemon.attempts[command.instance] = Attempt(command, spec, daemon.shared)
                attempt.adopt(command, daemon.given.pidfds.get(command.instance))
                daemon.lookout.soon()
            case Save():
                inst = daemon.core.world.instances[command.record.id]
                daemon.saver.save(to_keep(command.record, inst.spec, daemon.settings.secrets))
            case Terminate():
                daemon.attempts[command.instance].terminate()
            case KillTree():
                attempt = daemon.attempts[command.instance]
                daemon.tasks.start(
                    attempt.kill(crashed=command.crashed), f"end of {command.instance}#{command.attempt}"
                )
            case Canary() | Sleep() | Wake():
                daemon.attempts[command.instance].inquire(command)
            case ReadDevices():
                daemon.lookout.soon()
            case Answer():
                daemon.tasks.start(self._answer(command), f"answer {command.ticket}")
            case Remember() | Keep() | Prove():
                daemon.unsaved.set()
            case Forget():
                daemon.attempts.pop(command.instance, None)
                daemon.saver.forget(command.instance)
                daemon.voice.removed(command.instance)
            case Note():
                daemon.voice.note(command)
            case Open():
                daemon.gateway.open(command)
            case Shut():
                daemon.gateway.shut(command)
            case Refuse():
                daemon.gateway.refuse(command)
            case Finish():
                daemon.finished.set()
            case _:
                assert_never(command)

    async def _spawn(self, attempt: Attempt) -> None:
        """What is needed to find the process again is on disk before there is one."""
        await self.daemon.saver.saved()
        attempt.start()
        self.daemon.lookout.soon()

    async def _answer(self, command: Answer) -> None:
        """What is accepted is on disk: a wish is not lost with the daemon that took it."""
        await self.daemon.saver.saved()
        future = self.daemon.answers.pop(command.ticket, None)
        if future is not None and not future.done():
            future.set_result(command)

    async def _inspect(self, command: Inspect) -> None:
        inst = self.daemon.core.world.instances.get(command.instance)
        if inst is None:
            return
        found = await self.inspect(inst.spec.name)
        if found is None:
            return
        problem = found if isinstance(found, Cause) else None
        result = found if isinstance(found, Inspection) else None
        self.daemon.post(Inspected(command.instance, command.attempt, result, problem))

    async def inspect(self, model: str) -> Inspection | Cause | None:
        """Preflight of a configured model."""
        world = self.daemon.core.world
        spec = world.settings.models.get(model) or world.instances[model].spec
        taken = {s.port: s.name for s in world.settings.models.values() if s.port and s.name != model}
        taken |= {a.port: name for name, a in self.daemon.attempts.items() if a.port and a.live and name != model}
        return await self.daemon.lookout.preflight(spec, taken, self.daemon.settings.daemon)
