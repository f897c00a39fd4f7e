"""Why vllmctl gives up, and the exit code that says so. A fault is a sentence "cannot X: why" and what to do."""

OK, FAILED, USAGE, UNREACHABLE, NO_SUCH_MODEL, NO_ROOM, TIMEOUT, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 78, 130

EXIT_CODES = {
    OK: "done",
    FAILED: "it failed: a model did not start, or vllmd refused",
    USAGE: "the command line is wrong",
    UNREACHABLE: "vllmd cannot be reached, or what answers is not vllmd",
    NO_SUCH_MODEL: "no such model",
    NO_ROOM: "it does not fit now; the message says what would make room",
    TIMEOUT: "--timeout is over; the start or stop goes on",
    BAD_CONFIG: "the configuration is invalid",
    INTERRUPTED: "Ctrl-C; the start or stop goes on",
}


class Fault(Exception):
    """The command cannot go on. `code` is the exit code, `hints` are things to do, each one line."""

    code = FAILED

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.message = message
        self.hints = [hint for hint in hints if hint]


class Usage(Fault):
    """The command line is wrong in a way that only shows after parsing."""

    code = USAGE


class Unreachable(Fault):
    """No connection to vllmd, or it broke, or nothing came in time."""

    code = UNREACHABLE


class Garbled(Unreachable):
    """Something answers, but not as vllmd does."""


class Expired(Fault):
    """The time that the caller gave is over."""

    code = TIMEOUT


class Refused(Fault):
    """vllmd answered with an error: `status` is HTTP's, `kind` vllmd's own word for it, `body` the whole answer."""

    def __init__(self, status: int, message: str, *hints: str, kind: str = "", body: object = None) -> None:
        super().__init__(message, *hints)
        self.status = status
        self.body = body
        if status == 409:
            self.code = NO_ROOM
        elif status == 404 and kind in ("", "unknown-model", "unknown-category"):  # not: no such log
            self.code = NO_SUCH_MODEL
