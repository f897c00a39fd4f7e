"""What a child prints, read as it grows: each line to the journal once, the whole of it to whoever reads its signs.

How far it was read is noted beside the records, unsynced: it must survive the daemon, not the machine. A daemon that
comes after another goes on there, so that no line is told twice and none is left out.
"""

import os

from vllmd.core.logline import severity
from vllmd.edge.logfile import Follower
from vllmd.edge.logread import head
from vllmd.facts import Phase
from vllmd.shared import Shared

CATCH_UP = 4 << 20  # bytes of a start that are read again for the signs in it


class Transcript:
    """One attempt's log, being read."""

    def __init__(self, instance: str, attempt: int, shared: Shared) -> None:
        self.instance, self.attempt = instance, attempt
        self.shared = shared
        self.phase: Phase | None = None
        self.path = shared.log_dir / f"{instance}.log"
        self.follower = Follower(self.path)
        self._mark = shared.records_dir / f"{instance}.at"
        self._marked = ""

    def resume(self) -> list[str]:
        """Go on where an earlier daemon stopped; returns the lines before that, so that a start's phases are known."""
        try:
            inode, at = map(int, self._mark.read_text().split())
        except (OSError, ValueError):
            inode, at = 0, 0
        begun = self.follower.begin(at, inode)
        return head(self.path, min(begun, CATCH_UP))

    def read(self) -> list[str]:
        """The lines that are new, a progress bar's latest state among them."""
        lines = self.follower.read_new()
        self._tell([line.text for line in lines if not line.progress])
        self._note_place()
        return [line.text for line in lines]

    def rest(self) -> None:
        """Tell all that is left, when nobody writes any more."""
        while True:
            lines = self.follower.read_new()
            self._tell([line.text for line in lines if not line.progress])
            if not self.follower.more:
                break
        self._tell([line.text for line in self.follower.rest()])

    def rotate(self) -> None:
        """Keep the file small."""
        before = self.follower.trouble
        lines = self.follower.rotate(self.shared.log_size, self.shared.log_keep)
        self._tell([line.text for line in lines if not line.progress])
        self._note_place()
        if self.follower.trouble and self.follower.trouble != before:
            self.shared.complain(self.follower.trouble)

    def close(self) -> None:
        """May be called twice."""
        self.follower.close()

    def _tell(self, lines: list[str]) -> None:
        if self.shared.lines is None:
            return
        for text in lines:
            self.shared.lines.send(
                text, model=self.instance, attempt=self.attempt, phase=self.phase, priority=severity(text)
            )  # fmt: skip

    def _note_place(self) -> None:
        text = f"{self.follower.inode:<20} {self.follower.line_start:<20}\n"
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
