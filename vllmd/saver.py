"""Writing records in the background, in order, so that a slow disk holds up nobody but the start that must wait for it.

What changes while a write runs is collected, so that only the latest record of an instance is written.
"""

import asyncio
from collections.abc import Callable

from vllmd.edge.records import Records
from vllmd.edge.tasks import in_thread
from vllmd.record import Record

PATIENCE = 5.0  # seconds that a start waits for its record: a disk that hangs must not keep models from running


class Saver:
    """The latest record of each instance, on its way to disk. `complain` hears of what could not be written."""

    def __init__(self, records: Records, complain: Callable[[str], None]) -> None:
        self._records = records
        self._complain = complain
        self._waiting: dict[str, Record | None] = {}
        self._wanted = asyncio.Event()
        self._round = 0  # of what is collected now; done when _written reaches it
        self._written = asyncio.Condition()
        self._done = -1
        self._trouble = ""

    def save(self, record: Record) -> None:
        """Have it written soon."""
        self._waiting[record.id] = record
        self._wanted.set()

    def forget(self, instance: str) -> None:
        """Have its record removed soon."""
        self._waiting[instance] = None
        self._wanted.set()

    async def saved(self) -> None:
        """Returns when all that was given so far is on disk, or cannot be brought there within PATIENCE."""
        if not self._waiting and self._done >= self._round - 1:
            return
        goal = self._round if self._waiting else self._round - 1
        try:
            async with asyncio.timeout(PATIENCE), self._written:
                await self._written.wait_for(lambda: self._done >= goal)
        except TimeoutError:
            self._complain("records of models are not written: the disk of the state directory does not answer")

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._wanted.wait()
            await self._write()

    async def flush(self, limit: float) -> None:
        """Write what is left, at the end, when `run` has been cancelled."""
        if self._waiting:
            batch, self._waiting = self._waiting, {}
            await in_thread(lambda: self._put(batch), limit, None)

    async def clear(self, limit: float) -> None:
        """Everything has ended as asked: forget all records."""
        self._waiting.clear()
        await in_thread(self._records.clear, limit, None)

    async def _write(self) -> None:
        self._wanted.clear()
        batch, self._waiting = self._waiting, {}
        this, self._round = self._round, self._round + 1
        trouble = await in_thread(lambda: self._put(batch), 60.0, "the disk does not answer")
        if trouble and trouble != self._trouble:
            self._complain(f"{trouble}: a restart of vllmd would not find these models as they are")
        self._trouble = trouble
        async with self._written:
            self._done = this
            self._written.notify_all()

    def _put(self, batch: dict[str, Record | None]) -> str:
        trouble = ""
        for instance, record in batch.items():
            try:
                if record is None:
                    self._records.remove(instance)
                else:
                    self._records.write(record)
            except OSError as error:
                trouble = f"cannot write the record of {instance}: {error.strerror}"
        return trouble
