"""What the HTTP edge needs of the daemon, as a Protocol: the daemon implements it, tests stub it with a dict.

Everything that a listener shows or changes goes through here. What is readable at once is a plain method and must not
block; what has to ask somebody is a coroutine, and may be cancelled when the client leaves: the wish itself goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, Protocol

from aiohttp import web

from vllmd.events import Answer
from vllmd.spec import ApiKey

HIDDEN: Final = "(hidden)"  # in the place of what nobody must see
TYPE_OF_STATUS: Final = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    408: "timeout",
    409: "conflict",
}


class Access(StrEnum):
    """Who may use a route. OPEN needs nothing at all, READ looks, ADMIN changes."""

    OPEN = "open"
    READ = "read"
    ADMIN = "admin"


class Verb(StrEnum):
    """What can be asked of a model."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    SLEEP = "sleep"
    WAKE = "wake"
    SWAP_TEST = "swap-test"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `uid` and `pid` are the kernel's word on a unix socket (SO_PEERCRED), None on TCP."""

    access: Access
    peer: str  # "unix", or the TCP peer's address
    uid: int | None = None
    pid: int | None = None
    key: ApiKey | None = None  # that was shown over TCP


@dataclass(frozen=True, slots=True)
class Tallies:
    """Counts since the daemon started that the status does not hold. Seconds are those of the last good starts."""

    restarts: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (model, class of the cause) -> times
    start_seconds: Mapping[tuple[str, str], float] = field(default_factory=dict)  # (model, phase | "total") -> seconds
    hangs: Mapping[str, int] = field(default_factory=dict)  # model -> times
    overruns: Mapping[str, int] = field(default_factory=dict)  # model -> times
    swaps: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (model that made room, for which) -> times
    idle_stops: Mapping[str, int] = field(default_factory=dict)  # model -> times
    answers: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (model, "2xx") -> requests answered by it
    refusals: Mapping[tuple[str, str], int] = field(default_factory=dict)  # (HTTP status, code) -> requests refused
    retries: Mapping[str, int] = field(default_factory=dict)  # model -> requests asked anew when its engine died
    waits: Mapping[str, int] = field(default_factory=dict)  # model -> requests that stood in line
    wait_seconds: Mapping[str, float] = field(default_factory=dict)  # model -> how long, in all
    held_bytes: int = 0  # of requests in the gateway now


@dataclass(slots=True)
class Refused(Exception):
    """A request that is not followed. `status` as in HTTP, `code` short-with-dashes, `hint` says what to do instead."""

    status: int
    code: str
    message: str
    hint: str = ""
    remedies: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The one shape of every error: {"error": {message, type, code, hint, remedies, data}}."""
        kind = TYPE_OF_STATUS.get(self.status) or ("unavailable" if self.status >= 500 else "invalid_request")
        return {
            "error": {
                "message": self.message,
                "type": "internal" if self.status == 500 else kind,
                "code": self.code,
                "hint": self.hint or "; ".join(self.remedies),
                "remedies": list(self.remedies),
                "data": dict(self.data),
            }
        }


class LogReader(Protocol):
    """A place in a model's log. Neither method raises for what the disk does."""

    async def read(self) -> Sequence[Mapping[str, Any]]:
        """The next lines, oldest first, about 64 KiB of them; the first ones are of the tail that was asked for. None when
        there is nothing more now. Each is {"text"} and what else is known of it ("time", "level", "progress")."""

    def close(self) -> None:
        """Let go of the file."""


class Backend(Protocol):
    """The daemon, as its listeners see it."""

    # -- look: at once, from memory

    def ready(self) -> bool:
        """Whether the configuration is read and events are handled."""

    def status(self) -> dict[str, Any]:
        """{"daemon", "devices", "models"} as docs/status.md; a fresh dict, but for daemon.access, which is set here."""

    def model(self, name: str) -> dict[str, Any]:
        """The whole of a configured model: its row of the status, spec (no secrets), argv, env, files, learned."""

    def why(self, name: str) -> dict[str, Any]:
        """Why a configured model is not as wanted, and what changed since it last was."""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the configuration."""

    def tallies(self) -> Tallies:
        """What is counted beside the status."""

    def log(
        self, name: str, *, lines: int, since: float | None, failed: bool, previous: bool, follow: bool, most: int
    ) -> LogReader:
        """A configured model's log: its last `lines`, none older than `since` seconds, `most` bytes of it at most, of this,
        the last failed or the previous start; with `follow` also what comes. Raises Refused(404) if there is none."""

    # -- act: the answer is known soon, the work takes as long as it takes

    async def act(self, verb: Verb, names: Sequence[str], now: bool, caller: Caller) -> Mapping[str, Answer]:
        """Ask it of configured models; one answer each. `now` skips the drain."""

    async def lend(self, size: int, seconds: float, device: str | None, caller: Caller) -> Answer:
        """Free `size` bytes of a device (None = where the least must go) for something else; 0 takes all back."""

    async def reload(self, dry_run: bool, caller: Caller) -> Answer:
        """Read the configuration again, or only say in `data` what that would do."""

    async def validate(self, text: str) -> dict[str, Any]:
        """{"ok", "problems", "warnings"} of a configuration given as TOML."""

    async def plan(self, names: Sequence[str]) -> dict[str, Any]:
        """Who fits with whom and with which flags; no names = all."""

    # -- tell

    def changed(self, caller: Caller, what: str, names: Sequence[str]) -> None:
        """Somebody is about to change something: for the journal, with uid and pid."""

    def fault(self, ident: str, where: str, error: BaseException) -> None:
        """A handler raised what it should not have; the client was told `ident` only."""


class Front(Protocol):
    """What answers the requests of models' users, on paths of its own. Its answers are sent when it returns."""

    def takes(self, path: str) -> bool:
        """Whether a path is its own."""

    async def answer(self, request: web.BaseRequest, key: ApiKey | None, origin: str) -> web.StreamResponse:
        """Answer. `key`: who asks, None where none is needed; `origin`: a page that may read the answer, or ""."""

    def refusal(
        self, request: web.BaseRequest, status: int, code: str, message: str, hint: str, origin: str = ""
    ) -> web.StreamResponse:
        """Refuse, in the shape that its clients know."""
