"""What the gateway must know of a body, read once: the model, and whether a stream is wanted. The rest is skipped, not parsed
into objects, and goes to the engine as it came, unless an alias adds to it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from vllmd.gateway.errors import Trouble
from vllmd.gateway.paths import Form
from vllmd.spec import Alias

PARTS_MAX: Final = 200  # parts of a multipart body
VALUE_MAX: Final = 4096  # bytes of a part that is a name or a flag
_BOUNDARY: Final = re.compile(r'boundary=(?:"([^"\r\n]{1,200})"|([^\s;,"]{1,200}))', re.IGNORECASE)
_NAME: Final = re.compile(rb'\bname="([^"\r\n]*)"', re.IGNORECASE)


class Wish(NamedTuple):
    """What is asked for: of which model, and as a stream or not."""

    model: str | None
    stream: bool


class _Head(msgspec.Struct):
    model: Any = None
    stream: Any = None


_decode_head: Final = msgspec.json.Decoder(_Head).decode
_decode_table: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_wish(form: Form, body: bytes, content_type: str) -> Wish:
    """The wish in a body. Raises Trouble(400) for what is malformed, with what is wrong."""
    return read_json(body) if form is Form.JSON else read_multipart(body, content_type)


def read_json(body: bytes) -> Wish:
    """Of a JSON object; of a key that stands twice the last counts, as in vLLM."""
    try:
        head = _decode_head(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Trouble(400, "invalid_json", f"the body is no JSON object: {str(error)[:200]}") from None
    model, stream = head.model, head.stream
    if model is not None and not isinstance(model, str):
        raise Trouble(400, "invalid_model", '"model" must be a string')
    if stream is not None and not isinstance(stream, bool):
        raise Trouble(400, "invalid_stream", '"stream" must be true or false')
    return Wish(model, bool(stream))


def read_multipart(body: bytes, content_type: str) -> Wish:
    """Of multipart/form-data."""
    fields: dict[str, str] = {}
    for name, start, end in parts(body, boundary_of(content_type)):
        if name in ("model", "stream"):
            if end - start > VALUE_MAX:
                raise Trouble(400, "invalid_multipart", f'the part "{name}" is too long')
            try:
                fields[name] = body[start:end].decode().strip()
            except UnicodeDecodeError:
                raise Trouble(400, "invalid_multipart", f'the part "{name}" is not UTF-8') from None
    return Wish(fields.get("model"), fields.get("stream", "").lower() in ("true", "1"))


def boundary_of(content_type: str) -> bytes:
    """The boundary. Raises Trouble(400)."""
    match = _BOUNDARY.search(content_type)
    if not content_type.lower().startswith("multipart/form-data") or match is None:
        raise Trouble(400, "invalid_multipart", "the body must be multipart/form-data with a boundary")
    return (match[1] or match[2]).encode("latin-1", "replace")


def parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, int, int]]:
    """Name and place of the content of each part. Raises Trouble(400) for what is no such body."""
    mark = b"--" + boundary
    if not body.startswith(mark):
        raise Trouble(400, "invalid_multipart", "the body does not begin with its boundary")
    at = len(mark)
    for _ in range(PARTS_MAX):
        if body[at : at + 2] == b"--":
            return
        if body[at : at + 2] != b"\r\n":
            raise Trouble(400, "invalid_multipart", "a boundary of the body is not followed by a line")
        head_end = body.find(b"\r\n\r\n", at)
        end = _delimiter(body, b"\r\n" + mark, at)
        if head_end < 0 or end < 0 or head_end > end or head_end - at > VALUE_MAX:
            raise Trouble(400, "invalid_multipart", "a part of the body has no end")
        name = _NAME.search(body[at : head_end + 2])
        yield (name[1].decode("utf-8", "replace") if name else ""), head_end + 4, end
        at = end + 2 + len(mark)
    raise Trouble(400, "invalid_multipart", f"the body has more than {PARTS_MAX} parts")


def _delimiter(body: bytes, mark: bytes, start: int) -> int:
    """Where the next delimiter begins, -1 for nowhere. What only begins like one is content, as it is to vLLM's parser."""
    at = body.find(mark, start)
    while at >= 0 and body[at + len(mark) : at + len(mark) + 2] not in (b"\r\n", b"--"):
        at = body.find(mark, at + 1)
    return at


def rewrite(form: Form, body: bytes, content_type: str, name: str, alias: Alias) -> bytes:
    """The body for the model `name`, with what the alias fills in, forces and drops. All other values keep their bytes."""
    if form is Form.MULTIPART:
        return _rewrite_multipart(body, content_type, name, alias)
    try:
        table = _decode_table(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Trouble(400, "invalid_json", f"the body is no JSON object: {str(error)[:200]}") from None
    values: dict[str, Any] = {**alias.defaults, **table}
    for key in alias.drop:
        values.pop(key, None)
    values |= dict(alias.force)
    values["model"] = name
    return msgspec.json.encode(values)


def _rewrite_multipart(body: bytes, content_type: str, name: str, alias: Alias) -> bytes:
    mark = b"--" + boundary_of(content_type)
    found = list(parts(body, mark[2:]))
    replaced = {"model", *alias.drop, *alias.force}
    given = {part for part, _, _ in found}
    fields: Mapping[str, Any] = {
        **{key: value for key, value in alias.defaults.items() if key not in given and key not in alias.drop},
        **alias.force, "model": name,
    }  # fmt: skip
    pieces: list[bytes] = []
    at = 0
    for part, _, end in found:
        if part not in replaced:
            pieces.append(body[at : end + 2])
        at = end + 2
    for key, value in fields.items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        head = f'\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{text}\r\n'
        pieces.append(mark + head.encode())
    return b"".join(pieces) + mark + b"--\r\n"
