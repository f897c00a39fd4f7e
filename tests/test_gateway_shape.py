"""What the gateway reads of a request and what it adds: names, bodies, aliases, errors in the client's words."""

import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmd.gateway.aliases import Names
from vllmd.gateway.body import Wish, read_json, read_multipart, read_wish, rewrite
from vllmd.gateway.errors import Trouble, error_body, error_event, waiting_comment
from vllmd.gateway.paths import PLACES, Dialect, Form
from vllmd.spec import Alias, ModelSpec

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BOUNDARY = "xyz"
KIND = f"multipart/form-data; boundary={BOUNDARY}"


def form(fields: dict[str, bytes]) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n'.encode() + v for k, v in fields.items()
    ]
    return b"\r\n".join([*parts, f"--{BOUNDARY}--\r\n".encode()])


def fields_of(body: bytes) -> dict[str, bytes]:
    """As a strict reader of another make would see it."""
    found = {}
    for part in body.split(f"--{BOUNDARY}".encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        found[head.partition(b'name="')[2].partition(b'"')[0].decode()] = content[:-2]
    return found


# -- bodies -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=10), JSON, max_size=6), st.text(min_size=1), st.none() | st.booleans())
def test_model_and_stream_are_found_in_any_object(value: dict[str, Any], name: str, stream: bool | None) -> None:
    value = {**value, "model": name, "stream": stream}
    assert read_json(json.dumps(value).encode()) == Wish(name, bool(stream))


@given(st.binary(max_size=300) | st.text(alphabet='{}[]",:0truefalsn\\u e', max_size=80).map(str.encode))
def test_whatever_comes_as_json_is_read_or_refused(body: bytes) -> None:
    """Nothing but Trouble(400), and nothing that json would not take for an object."""
    try:
        wish = read_json(body)
    except Trouble as trouble:
        assert trouble.status == 400 and trouble.message
    else:
        assert wish.model is None or isinstance(wish.model, str)


@given(st.binary(max_size=300), st.text(max_size=60) | st.just(KIND))
def test_whatever_comes_as_multipart_is_read_or_refused(body: bytes, kind: str) -> None:
    for tried in (body, f"--{BOUNDARY}".encode() + body):
        try:
            read_multipart(tried, kind)
        except Trouble as trouble:
            assert trouble.status == 400 and trouble.message


def test_of_a_key_that_stands_twice_the_last_counts_as_in_vllm() -> None:
    assert (
        read_json(b'{"model": "a", "model": "b"}').model == "b" == json.loads(b'{"model": "a", "model": "b"}')["model"]
    )


def test_multipart_with_a_file_that_looks_like_a_part() -> None:
    evil = b'\r\n--xyzz\r\nContent-Disposition: form-data; name="model"\r\n\r\nevil\r\n--xy'
    body = form({"model": b"good", "file": evil})
    assert read_multipart(body, KIND).model == "good"


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data", "", 'multipart/form-data; boundary=""'])
def test_a_kind_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(Trouble, match="boundary"):
        read_multipart(form({"model": b"a"}), kind)


@pytest.mark.parametrize(
    "body",
    [b"", b"--xyz", b"--xyz\r\n", b'--xyz\r\nname="model"\r\n\r\na', b"xx" + form({"model": b"a"}), b"--xyz--"[:-1]],
)
def test_a_torn_form_is_refused(body: bytes) -> None:
    with pytest.raises(Trouble):
        read_multipart(body, KIND)


# -- aliases ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1, max_size=3), JSON, max_size=5))
def test_an_alias_fills_forces_and_drops_and_leaves_the_rest(value: dict[str, Any]) -> None:
    alias = Alias("x", {"a": 1, "b": [2]}, {"c": {"d": None}}, ("e", "b"))
    body = json.dumps({**value, "model": "x"}).encode()
    after = json.loads(rewrite(Form.JSON, body, "", "real", alias))
    expected = {"a": 1, "b": [2], **value}
    expected = {key: item for key, item in expected.items() if key not in ("e", "b")}
    assert after == {**expected, "c": {"d": None}, "model": "real"}


def test_what_an_alias_does_not_touch_keeps_its_bytes() -> None:
    body = b'{"temperature": 1.50, "big": 12345678901234567890123, "model": "x"}'
    assert b'"temperature":1.50' in rewrite(Form.JSON, body, "", "real", Alias("x"))
    assert b"12345678901234567890123" in rewrite(Form.JSON, body, "", "real", Alias("x"))


@given(st.binary(max_size=200).filter(lambda data: b"--xyz" not in data))
def test_a_form_is_rewritten_field_by_field(content: bytes) -> None:
    alias = Alias("x", {"language": "de", "n": 2}, {"temperature": 0}, ("seed",))
    before = {"file": content, "model": b"x", "seed": b"1", "n": b"7"}
    after = rewrite(Form.MULTIPART, form(before), KIND, "real", alias)
    assert fields_of(after) == {
        "file": content, "n": b"7", "language": b"de", "temperature": b"0", "model": b"real",
    }  # fmt: skip
    assert read_wish(Form.MULTIPART, after, KIND).model == "real"


def test_names_are_found_and_the_nearest_is_named() -> None:
    names = Names({"dots-ocr": ModelSpec("dots-ocr", "m", aliases=(Alias("gpt-4o"),)), "chat": ModelSpec("chat", "m")})
    assert names.find("gpt-4o")[0].name == "dots-ocr"
    assert names.find("chat") == (ModelSpec("chat", "m"), None)
    for wrong, hint in (("dots_ocr", "dots-ocr"), ("gpt-4", "gpt-4o"), ("zzz", "configured: dots-ocr, chat, gpt-4o")):
        with pytest.raises(Trouble) as caught:
            names.find(wrong)
        assert caught.value.status == 404 and hint in caught.value.hint
    with pytest.raises(Trouble) as caught:
        names.find(None)
    assert caught.value.status == 400


# -- errors -----------------------------------------------------------------------------------------------------------

STATUSES = (400, 401, 403, 404, 408, 413, 429, 500, 502, 503)


@pytest.mark.parametrize("status", STATUSES)
def test_errors_are_openai_shaped(status: int) -> None:
    error = json.loads(error_body(Dialect.OPENAI, Trouble(status, "some_code", "words", "do this"), "id"))["error"]
    assert set(error) == {"message", "type", "param", "code", "hint"}
    assert error["message"] == "words (do this)" and error["type"].endswith("_error")


@pytest.mark.parametrize("status", STATUSES)
def test_errors_are_anthropic_shaped(status: int) -> None:
    value = json.loads(error_body(Dialect.ANTHROPIC, Trouble(status, "some_code", "words"), "id"))
    assert set(value) == {"type", "error", "request_id"} and value["type"] == "error"
    assert set(value["error"]) == {"type", "message"} and value["error"]["type"].endswith(("_error", "_too_large"))


@given(st.text())
def test_nothing_in_a_message_ends_its_event(text: str) -> None:
    """Neither an error nor a comment can forge an event of its own."""
    for dialect in Dialect:
        event = error_event(dialect, Trouble(503, "x", text), "id").decode()
        lines = event.splitlines()
        assert all(line.startswith(("data: ", "event: error")) for line in lines if line)
        comment = waiting_comment(dialect, text).decode("utf-8", "surrogatepass")
        assert comment.split("\n")[0].startswith(": vllmd")
        assert set(comment.split("\n")[1:]) <= {"", "event: ping", 'data: {"type": "ping"}'}


def test_the_paths_are_vllms_and_nothing_that_administers_it() -> None:
    """As its 0.32 serves them."""
    assert len(PLACES) >= 17
    assert not any(
        word in path for path in PLACES for word in ("lora", "sleep", "wake", "rpc", "profile", "invocations")
    )
    assert PLACES["/v1/messages"].dialect is Dialect.ANTHROPIC
    assert PLACES["/v1/audio/transcriptions"].form is Form.MULTIPART
