"""The status, kept up to date from vllmd's events; outlives a lost connection.

A snapshot comes first on every connection, so nothing has to be resumed: what is shown is what vllmd said last.
Between events the times in it are moved on here, by the clock. Sentences with a time in them ("start 2 of 5 in 7 s") only
vllmd can move on: for eyes the status is asked anew each second, as long as any model is on its way.
"""

from __future__ import annotations

import select
import time

from vllmd.ctl.call import checked
from vllmd.ctl.client import Client, Stream, parse
from vllmd.ctl.faults import Fault, Garbled, Unreachable
from vllmd.ctl.words import listed, number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SILENCE = 15.0  # seconds; vllmd sends its clock each 5
RETRY = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts to come back
FRESH = 1.0  # seconds after which a moving picture is asked for anew
MOVING = ("starting", "waiting", "backoff", "dozing", "waking", "draining", "stopping")
RISING, FALLING = ("since_s", "elapsed_s", "silent_s", "uptime_s"), ("eta_s", "deadline_s")


class Feed:
    """`poll()` it; `picture()` is the status as of now. The caller closes it."""

    def __init__(self, client: Client, live: bool = False) -> None:
        """Connect and wait for the first snapshot. `live`: somebody looks on. Raises Unreachable, Refused."""
        self._client = client
        self._live = live
        self._fresh_at = time.monotonic() + FRESH
        self._status: dict[str, Any] = {}
        self._at: dict[str, float] = {}  # model (or "" for the rest) -> when it was told
        self._heard = time.monotonic()
        self._tries = 0
        self._retry_at = 0.0
        self._early: list[tuple[str, Any]] = []  # what came together with the first snapshot
        self._stream: Stream | None = client.stream("/api/v1/events")
        while not self._status:
            if self._stream is None or time.monotonic() - self._heard > SILENCE:
                self.close()
                raise Unreachable("cannot hear vllmd: no first event came")
            self._early += self.poll(1.0)[0]

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @property
    def lost(self) -> float | None:
        """Seconds since vllmd was last heard, while the connection is gone."""
        return None if self._stream is not None else time.monotonic() - self._heard

    def poll(self, timeout: float, keys: int | None = None) -> tuple[list[tuple[str, Any]], bool]:
        """(events as (kind, data), whether the descriptor `keys` can be read), after at most `timeout` seconds."""
        if self._early and self._status:
            early, self._early = self._early, []
            return early, False
        now = time.monotonic()
        if self._stream is None and now >= self._retry_at:
            self._reconnect()
        if self._stream is not None and now - self._heard > SILENCE:
            self._drop()
        watched: list[Any] = [each for each in (self._stream, keys) if each is not None]
        pending = self._stream is not None and self._stream.pending
        if self._stream is None:
            timeout = max(0.0, min(timeout, self._retry_at - now))
        readable = select.select(watched, [], [], 0.0 if pending else timeout)[0]
        events = self._read() if self._stream is not None and (pending or self._stream in readable) else []
        return events + self._refresh(), keys in readable

    def _refresh(self) -> list[tuple[str, Any]]:
        """The status asked anew, as a snapshot, if it is time for that."""
        now = time.monotonic()
        if not self._live or self._stream is None or now < self._fresh_at:
            return []
        if not any(model.get("state") in MOVING for model in self._models()):
            return []
        self._fresh_at = now + FRESH
        try:
            status = checked(self._client.call("GET", "/api/v1/status", timeout=1.0))
        except Fault:  # whether vllmd is away is for the stream to say; a slow one is not asked so often
            self._fresh_at = time.monotonic() + SILENCE / 3
            return []
        self._take("snapshot", status)
        return [("snapshot", status)]

    def picture(self) -> dict[str, Any]:
        """The status with its times moved on to now. The caller must not change what is in it."""
        now = time.monotonic()
        daemon = aged(self._status.get("daemon") or {}, now - self._at[""])
        models = [aged(model, now - self._at.get(str(model.get("name")), now)) for model in self._models()]
        return self._status | {"daemon": daemon, "models": models}

    def model(self, name: str) -> dict[str, Any] | None:
        """One model as of now."""
        return next((each for each in self.picture()["models"] if each.get("name") == name), None)

    def _models(self) -> list[dict[str, Any]]:
        return listed(self._status, "models")

    def _read(self) -> list[tuple[str, Any]]:
        stream, events = self._stream, []
        if stream is None:
            return []
        try:
            for event in stream.read(0.0):
                self._heard = time.monotonic()
                data = parse(event.data) if event.data and event.kind else None
                self._take(event.kind, data)
                events.append((event.kind, data))
        except TimeoutError:
            return []
        except Garbled:
            if not self._status:
                raise
            self._drop()
        if not stream.open:
            self._drop()
        return events

    def _take(self, kind: str, data: Any) -> None:
        now = time.monotonic()
        match kind:
            case "snapshot":
                self._status = checked(data)
                self._at = {"": now} | {str(model.get("name")): now for model in self._models()}
                self._tries = 0
            case "model" if isinstance(data, dict) and self._status:
                self._put("models", "name", data)
                self._at[str(data.get("name"))] = now
            case "removed" if isinstance(data, dict) and self._status:
                kept = [model for model in self._models() if model.get("name") != data.get("name")]
                self._status = self._status | {"models": kept}
            case "device" if isinstance(data, dict) and self._status:
                self._put("devices", "id", data)

    def _put(self, key: str, ident: str, value: dict[str, Any]) -> None:
        """Replace the object of the same name in place, so that the order stays."""
        old = listed(self._status, key)
        new = [value if each.get(ident) == value.get(ident) else each for each in old]
        if value not in new:
            new.append(value)
        self._status = self._status | {key: new}

    def _reconnect(self) -> None:
        try:
            self._stream = self._client.stream("/api/v1/events", timeout=2.0)
            self._heard = time.monotonic()
        except Unreachable:
            self._retry_at = time.monotonic() + RETRY[min(self._tries, len(RETRY) - 1)]
            self._tries += 1

    def _drop(self) -> None:
        self.close()
        self._retry_at = time.monotonic() + RETRY[0]
        self._tries = 1


def aged(values: dict[str, Any], passed: float) -> dict[str, Any]:
    """`values` with its times moved on by `passed` seconds."""
    moved = {key: each + passed for key in RISING if (each := number(values.get(key))) is not None}
    moved |= {key: max(0.0, each - passed) for key in FALLING if (each := number(values.get(key))) is not None}
    return values | moved
