"""What a child prints, read as it grows: each line to the journal once, the whole of it to whoever reads its signs.

How far it was read is noted beside the records, unsynced: it must survive the daemon, not the machine. A daemon that
comes after another goes on there, so that no line is told twice and none is left out.
"""

import asyncio
import os
from collections.abc import Sequence

from vllmd.core.logline import severity
from vllmd.edge.logfile import READ, Follower, Rotated, keep_failed, rotate
from vllmd.edge.logread import head, tail
from vllmd.edge.logtext import Line
from vllmd.edge.tasks import in_thread
from vllmd.facts import Phase
from vllmd.shared import Shared
from vllmd.veil import Veil

CATCH_UP = 1 << 20  # bytes of a start that are read again for the signs in it
LAST = 4 << 20  # bytes that are still told when nobody writes any more
TURN = 16  # reads, of READ bytes each, until others have their turn and the backlog waits
COPIED, KEPT = 60.0, 5.0  # seconds that a rotation may take, and keeping a failed start
DIAGNOSED, DIAGNOSED_BYTES = 5000, 1 << 20  # lines and bytes of the log's end that are searched for the cause


class Transcript:
    """One attempt's log, being read."""

    def __init__(self, instance: str, attempt: int, shared: Shared, veil: Veil) -> None:
        self.instance, self.attempt = instance, attempt
        self.shared, self.veil = shared, veil
        self.phase: Phase | None = None
        self.path = shared.log_dir / f"{instance}.log"
        self.follower = Follower(self.path)
        self._parts = 0  # how often this attempt's log was rotated
        self._rotation: asyncio.Task[None] | None = None
        self._unread: list[str] = []  # lines that were read while it was rotated
        self._rotate_above = 0
        self._trouble = ""
        self._turns = 0
        self._mark = shared.records_dir / f"{instance}.at"
        self._marked = ""

    def resume(self, *, starting: bool) -> list[str]:
        """Go on where an earlier daemon stopped; returns the lines of a start before that, so that its phases are known."""
        try:
            inode, at, *parts = map(int, self._mark.read_text().split())
        except (OSError, ValueError):
            inode, at, parts = 0, 0, []
        begun = self.follower.begin(at, inode)
        if self.follower.inode == inode and parts:
            self._parts = parts[0]
        return head(self.path, min(begun, CATCH_UP)) if starting else []

    def read(self) -> list[str]:
        """The lines that are new, a progress bar's latest state among them; none while the log is being rotated."""
        if self._rotation is not None:
            return []
        unread, self._unread = self._unread, []
        lines = self.follower.read_new()
        self._tell(lines)
        self._note_place()
        if self.follower.size > max(self.shared.log_size, self._rotate_above):
            self._rotation = self.shared.tasks.start(self._rotate(), f"rotation of {self.instance}#{self.attempt}")
        return unread + [line.text for line in lines]

    def pause(self, usual: float) -> float:
        """Seconds until the next look. What is there is read at once, but not for so long that nothing else is done."""
        self._turns = self._turns + 1 if self.follower.more else 0
        if 0 < self._turns < TURN:
            return 0.0
        self._turns = 0
        return usual

    async def finish(self) -> None:
        """Tell all that is left, when nobody writes any more, and let go of the file."""
        if self._rotation is not None:
            await asyncio.wait([self._rotation], timeout=COPIED)
        for _ in range(LAST // READ if self.shared.lines is not None else 0):
            self._tell(self.follower.read_new())
            if not self.follower.more:
                break
            await asyncio.sleep(0)
        self._tell(self.follower.rest())
        self.close()

    def last_words(self) -> list[str]:
        """The end of what it printed. May block: not on the loop."""
        return tail(self.path, DIAGNOSED, parts=self._parts, most=DIAGNOSED_BYTES)

    async def keep(self) -> None:
        """Keep it as the last failed start."""
        parts = self._parts
        late = f"cannot keep {self.path}: its disk does not answer"
        trouble = await in_thread(lambda: keep_failed(self.path.parent, self.instance, parts), KEPT, late)
        if trouble:
            self.shared.complain(trouble)

    def close(self) -> None:
        """May be called twice."""
        self.follower.close()

    async def _rotate(self) -> None:
        """Keep the file small, however fast it grows and however slow the disk is."""
        at, keep, large = self.follower.at, self.shared.log_keep, self.follower.size
        found = Rotated(trouble=f"cannot rotate {self.path}: its disk does not answer", done=False)
        try:
            found = await in_thread(lambda: rotate(self.path, at, keep), COPIED, found)
            if found.done:
                self._parts += 1
                lines = self.follower.rotated(found)
                self._tell(lines)
                self._unread += [line.text for line in lines]
                self._note_place()
        except Exception as error:
            found = Rotated(trouble=f"cannot rotate {self.path}: {error!r} (a defect of vllmd)", done=False)
        finally:
            self._rotation = None
            self._rotate_above = 0 if found.done else large + self.shared.log_size
        if found.trouble and found.trouble != self._trouble:
            self.shared.complain(found.trouble)
        self._trouble = found.trouble

    def _tell(self, lines: Sequence[Line]) -> None:
        if self.shared.lines is None:
            return
        for line in lines:
            if not line.progress:
                self.shared.lines.send(
                    self.veil(line.text), model=self.instance, attempt=self.attempt, phase=self.phase,
                    priority=severity(line.text),
                )  # fmt: skip

    def _note_place(self) -> None:
        text = f"{self.follower.inode:<20} {self.follower.line_start:<20} {self._parts:<10}\n"
        if text == self._marked:
            return
        try:
            fd = os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, text.encode(), 0)  # of one length always: never half new
            finally:
                os.close(fd)
        except OSError:
            return  # a daemon that comes after this one repeats some lines
        self._marked = text
