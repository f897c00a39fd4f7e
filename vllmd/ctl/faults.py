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
#: A hint for who has no systemd to start it with.
BY_HAND = "vllmd --config FILE, if you run it by hand"


class Fault(Exception):
    """The command cannot go on. `code` is the exit code, `hints` are things to do, each one line."""

    code = FAILED
    kind = "failed"

    def __init__(self, message: str, *hints: str) -> None:
        super().__init__(message)
        self.message = message
        self.hints = [hint for hint in hints if hint]

    def as_json(self) -> object:
        """The fault as vllmd's own errors look."""
        return {
            "error": {
                "message": self.message,
                "type": "vllmctl",
                "code": self.kind,
                "hint": "; ".join(self.hints),
                "remedies": self.hints,
            }
        }


class Usage(Fault):
    """The command line is wrong in a way that only shows after parsing."""

    code = USAGE
    kind = "usage"


class Unreachable(Fault):
    """No connection to vllmd, or it broke, or nothing came in time."""

    code = UNREACHABLE
    kind = "unreachable"


class Garbled(Unreachable):
    """Something answers, but not as vllmd does."""

    kind = "not-vllmd"


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

    def as_json(self) -> object:
        """vllmd's own answer, as far as it is one."""
        answered = isinstance(self.body, dict) and isinstance(self.body.get("error"), dict)
        return self.body if answered else super().as_json()
