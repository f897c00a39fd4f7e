"""A daemon as its clients see it: asked, told, waited for by its events. Whose it is and how it was started is another's.

Waiting is on the daemon's own event stream, never on the clock; each wait has a generous limit.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vllmd.ctl.client import Client
from vllmd.ctl.feed import Feed

LIMIT = 60.0  # seconds; far above what anything here needs
Model = dict[str, Any]
Until = Callable[[Model], object]


def toml(value: Any) -> str:
    """A value as TOML."""
    match value:
        case dict():
            return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def table(name: str, values: Model) -> str:
    """A table of a configuration file."""
    return "\n".join([f"[{name}]", *(f"{key} = {toml(value)}" for key, value in values.items()), ""])


class Remote:
    """A vllmd behind a socket."""

    socket: Path

    def story(self) -> str:
        """What it has said, for when a test fails."""
        return ""

    # -- look

    @property
    def client(self) -> Client:
        return Client(str(self.socket), LIMIT)

    def status(self) -> Model:
        """As `vllmctl status --json`."""
        return dict(self.client.get("/api/v1/status"))

    def look(self, name: str) -> Model:
        """One model of the status."""
        return next(each for each in self.status()["models"] if each["name"] == name)

    def why(self, name: str) -> Model:
        """As `vllmctl why --json`."""
        return dict(self.client.get(f"/api/v1/models/{name}/why"))

    def device(self) -> Model:
        """The first device of the status."""
        return dict(self.status()["devices"][0])

    def last_event(self) -> int:
        """Where the events stand: `states` looks from there on."""
        lines = self.client.fetch("GET", "/api/v1/events?follow=0")[1].splitlines()
        return int(json.loads(lines[-1])["id"]) if lines else 0

    def happened(self, kind: str, after: int = 0) -> list[Model]:
        """The events of a kind since `after`."""
        lines = self.client.fetch("GET", f"/api/v1/events?follow=0&after={after}")[1].splitlines()
        return [event["data"] for event in map(json.loads, lines) if event["event"] == kind]

    def states(self, name: str, after: int = 0) -> list[str]:
        """The model's state at each change of it since `after`."""
        mine = [each["state"] for each in self.happened("model", after) if each["name"] == name]
        return [state for at, state in enumerate(mine) if not at or state != mine[at - 1]]

    # -- act

    def act(self, verb: str, name: str, **body: Any) -> tuple[int, Model]:
        """POST .../NAME/VERB: HTTP status and the answer (its row, or its error)."""
        response, raw = self.client.fetch("POST", f"/api/v1/models/{name}/{verb}", body)
        answer = json.loads(raw)
        return response.status, answer.get("error", answer)

    def up(self, *names: str) -> list[Model]:
        """Start them and wait until all are ready."""
        for name in names:
            code, answer = self.act("start", name)
            assert code in (200, 202), answer
        return [self.wait(name, "ready") for name in names]

    def wait(self, name: str, until: Until | str, limit: float = LIMIT) -> Model:
        """The model once it is so (a state, or a test of the model); every event is looked at."""
        test: Until = (lambda m: m["state"] == until) if isinstance(until, str) else until
        for models in self._pictures(limit):
            for model in models:
                if model["name"] == name and test(model):
                    return model
        raise AssertionError(f"{name} is still not {until}: {self.look(name)}{self.story()}")

    def _pictures(self, limit: float) -> Iterator[list[Model]]:
        """All models at first, then each one as it changes, and all when nothing does; ends at the limit."""
        feed = Feed(self.client)
        end = time.monotonic() + limit
        try:
            yield feed.picture()["models"]
            while time.monotonic() < end:
                changed = [data for kind, data in feed.poll(0.2)[0] if kind == "model"]
                yield changed or feed.picture()["models"]
        finally:
            feed.close()
