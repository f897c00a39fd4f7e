"""A model's log for a reader: its last lines at first, then what comes, also across rotation and a new start."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllmd.edge.logfile import Follower
from vllmd.edge.logread import since as lines_since
from vllmd.edge.logread import tail


class LogView:
    """The LogReader of the API. A line that is added between the tail and the first look may come twice, none is lost."""

    def __init__(self, path: Path, *, lines: int, since: float | None, follow: bool = True) -> None:
        self._follower = Follower(path) if follow else None
        if self._follower is not None:
            self._follower.skip()
        first = tail(path, lines) if since is None else lines_since(path, time.time() - since)[-lines:]
        self._first: list[str] | None = first

    def read(self) -> Sequence[Mapping[str, Any]]:
        """The lines since the last call; the first call gives the tail."""
        if self._first is not None:
            first, self._first = self._first, None
            return [{"text": text} for text in first]
        if self._follower is None:
            return []
        return [{"text": line.text, "progress": line.progress} for line in self._follower.read_new()]

    def close(self) -> None:
        """Let go of the file."""
        if self._follower is not None:
            self._follower.close()


def find_log(directory: Path, name: str, *, failed: bool, previous: bool) -> Path | None:
    """The file of this, the last failed or the previous start; None when there is none."""
    path = directory / (f"{name}.failed.log" if failed else f"{name}.log.1" if previous else f"{name}.log")
    return path if path.is_file() else None
