"""Errors in the client's own shape: as the OpenAI API or the Anthropic API would say them, whole or in a stream that has begun.

What the official clients make of them was read in their sources: openai 3 raises APIError for a `data:` with an `error` in
it, anthropic 2 for an `event: error`.
"""

import json
from collections.abc import Mapping
from typing import Any, Final

from vllmd.gateway.paths import Dialect

_OPENAI: Final[Mapping[int, str]] = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
}  # fmt: skip
_ANTHROPIC: Final[Mapping[int, str]] = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


class Trouble(Exception):
    """A request that is not answered by an engine: HTTP status, code (short_with_underscores), what and why, what to do.

    `retry_after`: seconds after which it may be worth another try; None = nobody knows.
    """

    def __init__(
        self, status: int, code: str, message: str, hint: str = "", retry_after: float | None = None
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.message, self.hint = status, code, message, hint
        self.retry_after = retry_after


def error_value(dialect: Dialect, trouble: Trouble, ident: str) -> dict[str, Any]:
    """The JSON object of an error."""
    message = trouble.message + (f" ({trouble.hint})" if trouble.hint else "")
    if dialect is Dialect.ANTHROPIC:
        kind = _ANTHROPIC.get(trouble.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": ident}
    param = "model" if trouble.code == "model_not_found" else None
    kind = _OPENAI.get(trouble.status, "server_error")
    error = {"message": message, "type": kind, "param": param, "code": trouble.code, "hint": trouble.hint}
    return {"error": error}


def error_body(dialect: Dialect, trouble: Trouble, ident: str) -> bytes:
    """A whole answer."""
    return json.dumps(error_value(dialect, trouble, ident)).encode()


def error_event(dialect: Dialect, trouble: Trouble, ident: str) -> bytes:
    """The end of a stream that has begun."""
    data = json.dumps(error_value(dialect, trouble, ident))
    if dialect is Dialect.ANTHROPIC:
        return f"event: error\ndata: {data}\n\n".encode()
    return f"data: {data}\n\ndata: [DONE]\n\n".encode()


def waiting_comment(dialect: Dialect, text: str) -> bytes:
    """A sign of life for a stream whose model is on its way: a comment, which clients skip; Anthropic's has a ping as well."""
    line = " ".join(text.split())
    ping = 'event: ping\ndata: {"type": "ping"}\n\n' if dialect is Dialect.ANTHROPIC else ""
    return f": vllmd {line}\n\n{ping}".encode()
