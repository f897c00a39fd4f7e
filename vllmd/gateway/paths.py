"""What of vLLM's HTTP API clients may ask through the gateway: an allow-list, path by path. Everything else stays inside:
vLLM's development endpoints, its loading of adapters, /invocations (vLLM 0.32: entrypoints/serve, entrypoints/openai)."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Dialect(StrEnum):
    """Whose API a path belongs to: errors and waiting are told in its way."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class Form(StrEnum):
    """How a body names its model."""

    JSON = "json"
    MULTIPART = "multipart"


@dataclass(frozen=True, slots=True)
class Place:
    """One path. `streams`: it answers `"stream": true` with server-sent events."""

    path: str
    dialect: Dialect = Dialect.OPENAI
    form: Form = Form.JSON
    streams: bool = False


MODELS: Final = "/v1/models"
_STREAMING: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_WHOLE: Final = (
    "/v1/embeddings", "/v2/embed", "/v1/score", "/score", "/rerank", "/v1/rerank", "/v2/rerank", "/pooling", "/classify",
    "/tokenize", "/detokenize",
)  # fmt: skip
_AUDIO: Final = ("/v1/audio/transcriptions", "/v1/audio/translations")
_ANTHROPIC: Final = (("/v1/messages", True), ("/v1/messages/count_tokens", False))

PLACES: Final[Mapping[str, Place]] = {
    place.path: place
    for place in (
        *(Place(path, streams=True) for path in _STREAMING),
        *(Place(path) for path in _WHOLE),
        *(Place(path, form=Form.MULTIPART, streams=True) for path in _AUDIO),
        *(Place(path, Dialect.ANTHROPIC, streams=streams) for path, streams in _ANTHROPIC),
    )
}
