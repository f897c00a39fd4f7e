"""The shapes of vLLM's answers: completions whole and as events, errors as OpenAI's."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

from tests.fake.front import Answer
from tests.fake.texts import DEAD, DRAINED


class Refusal(Exception):
    """A request that ends in an error; its answer."""

    def __init__(self, status: int, message: str, kind: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.shape = {"error": {"message": message, "type": kind, "param": param, "code": status}}

    def answer(self) -> Answer:
        """As a response."""
        return dump(self.shape, self.status)


class EngineDead(Refusal):
    """The engine is gone, or went."""

    def __init__(self) -> None:
        super().__init__(500, DEAD, "InternalServerError")


class Draining(Refusal):
    """The server is on its way out and takes nothing new."""

    def __init__(self) -> None:
        super().__init__(500, DRAINED, "InternalServerError")


class Talk:
    """The shapes of a completion."""

    def __init__(self, chat: bool, body: dict[str, Any], prompt: int, words: list[str], finish: str) -> None:
        self.chat, self.body, self.prompt, self.words, self.finish = chat, body, prompt, words, finish
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(8).hex()}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": body.get("model"),
        }

    def usage(self) -> dict[str, Any]:
        """Tokens in and out."""
        made = len(self.words)
        return {"prompt_tokens": self.prompt, "total_tokens": self.prompt + made, "completion_tokens": made}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        text = " ".join(self.words)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0} | said | {"logprobs": None, "finish_reason": self.finish, "stop_reason": None}
        return self.head | {"choices": [choice], "usage": self.usage() | {"prompt_tokens_details": None}}

    def stream(self, first: int, source: Iterator[int]) -> Iterator[bytes]:
        """The answer as server-sent events; an engine that dies is told of in one, under the 200 already sent."""
        if self.chat:
            yield self.event({"delta": {"role": "assistant", "content": ""}})
        at = 0
        try:
            yield from self.events(at, first)
            at += first
            for made in source:
                yield from self.events(at, at + made)
                at += made
        except EngineDead as trouble:
            yield sse(trouble.shape)
            yield b"data: [DONE]\n\n"
            return
        if (self.body.get("stream_options") or {}).get("include_usage"):
            yield sse(self.head | {"object": self.kind(), "choices": [], "usage": self.usage()})
        yield b"data: [DONE]\n\n"

    def events(self, start: int, end: int) -> Iterator[bytes]:
        """One for each word."""
        for n in range(start, min(end, len(self.words))):
            text = ("" if n == 0 else " ") + self.words[n]
            last = self.finish if n == len(self.words) - 1 else None
            yield self.event({"delta": {"content": text}} if self.chat else {"text": text}, last)

    def event(self, said: dict[str, Any], finish: str | None = None) -> bytes:
        """One chunk."""
        choice = {"index": 0} | said | {"logprobs": None, "finish_reason": finish}
        return sse(self.head | {"object": self.kind(), "choices": [choice]})

    def kind(self) -> str:
        """The `object` of a chunk."""
        return "chat.completion.chunk" if self.chat else "text_completion"


def sse(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


def dump(value: Any, status: int = 200) -> Answer:
    """A JSON answer."""
    return Answer(status, json.dumps(value, separators=(",", ":")).encode())
