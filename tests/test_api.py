"""The API over real listeners: what each route answers, to whom, and how it refuses."""

import asyncio
import gzip
import io
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.stub_backend import NO_ROOM, Front, fronted
from vllmd import __version__
from vllmd.edge.backend import Access, Verb
from vllmd.edge.openapi import api_page, describe
from vllmd.edge.routes import ROUTES
from vllmd.edge.schemas import status_page
from vllmd.events import Answer

DOCS = Path(__file__).parent.parent / "docs"
JSON_ROUTES = [r for r in ROUTES if "/" not in r.answer]


@pytest.fixture
async def front(tmp_path: Path) -> AsyncIterator[Front]:
    async with fronted(tmp_path / "s.sock") as made:
        yield made


async def refusal(answer: Any) -> dict[str, Any]:
    """The error in an answer, which has the one shape of all."""
    assert answer.content_type == "application/json"
    error: dict[str, Any] = (await answer.json())["error"]
    assert set(error) == {"message", "type", "code", "hint", "remedies", "data"}
    return error


async def test_the_status_says_what_the_caller_may_do(front: Front) -> None:
    """daemon.access is admin on the socket and read on TCP."""
    over_unix = await (await front.unix.get("/api/v1/status")).json()
    over_tcp = await (await front.tcp.get("/api/v1/status")).json()
    assert over_unix["daemon"]["access"] == "admin"
    assert over_tcp["daemon"]["access"] == "read"
    assert over_unix["models"] == front.stub.value["models"]


@pytest.mark.parametrize("route", JSON_ROUTES, ids=lambda r: f"{r.method} {r.path}")
async def test_each_route_answers_as_its_schema_says(front: Front, route: Any) -> None:
    """Every JSON route of the table answers, and its answer is what OpenAPI promises."""
    path = route.path.replace("{name}", "alpha")
    takes_names = route.method == "POST" and "models" in [param.name for param in route.params]
    body = {"models": ["alpha"]} if takes_names else {"size": 0} if path.endswith("/lend") else None
    answer = await front.unix.request(route.method, path, json=body)
    assert answer.status in (200, 202), await answer.text()
    schema = {"$ref": f"#/components/schemas/{route.answer}", "components": describe(ROUTES)["components"]}
    jsonschema.Draft202012Validator(schema).validate(await answer.json())


@pytest.mark.parametrize("route", ROUTES, ids=lambda r: f"{r.method} {r.path}")
async def test_what_is_for_admins_is_refused_on_tcp_and_does_nothing(front: Front, route: Any) -> None:
    """On TCP admin routes answer 403 with a hint; what may be read is not refused."""
    if "follow" in [p.name for p in route.params]:
        return
    answer = await front.tcp.request(route.method, route.path.replace("{name}", "alpha"))
    if route.access is Access.ADMIN:
        assert answer.status == 403
        assert "vllmctl" in (await refusal(answer))["hint"]
        assert front.stub.asked == front.stub.changes == []
    else:
        assert answer.status < 400


async def test_who_may_only_look_sees_names_of_the_environment_and_no_values(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A secret may stand under any name."""
    shown = {"name": "alpha", "env": {"A": "x"}, "spec": {"model": "m", "env": {"B": "y"}}, "argv": None}
    monkeypatch.setattr(front.stub, "model", lambda _: shown)
    assert await (await front.unix.get("/api/v1/models/alpha")).json() == shown
    over_tcp = await (await front.tcp.get("/api/v1/models/alpha")).json()
    assert over_tcp == shown | {"env": {"A": "(hidden)"}, "spec": {"model": "m", "env": {"B": "(hidden)"}}}


async def test_a_start_is_accepted_and_logged_with_uid_and_pid(front: Front) -> None:
    """202 at once; the journal hears who asked, by the kernel's word."""
    answer = await front.unix.post("/api/v1/models/alpha/start")
    assert answer.status == 202
    assert (await answer.json())["message"] == "alpha: start"
    (caller, what, names) = front.stub.changes[0]
    assert (caller.uid, caller.pid, what, names) == (os.getuid(), os.getpid(), "start", ("alpha",))


@pytest.mark.parametrize(
    ("query", "body", "now"),
    [
        ("", None, False),
        ("?now=1", None, True),
        ("?now", None, True),
        ("", {"now": True}, True),
        ("?now=1", {"now": False}, False),
    ],
)
async def test_now_comes_from_query_or_body(front: Front, query: str, body: Any, now: bool) -> None:
    """A parameter stands in either; the body wins."""
    await front.unix.post("/api/v1/models/alpha/stop" + query, json=body)
    assert front.stub.asked == [(Verb.STOP, ("alpha",), now)]


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ({"size": "6GiB", "for": "2h", "device": "0"}, (6 << 30, 7200.0, "0")),
        ({"size": 1000, "for": 60}, (1000, 60.0, None)),
        ({"size": "1000", "for": "60"}, (1000, 60.0, None)),
        ({"size": 0}, (0, 0.0, None)),
    ],
)
async def test_a_loan_is_asked_for_in_units_of_people_or_in_bytes(front: Front, asked: Any, meant: Any) -> None:
    """And the journal hears of it."""
    answer = await front.unix.post("/api/v1/lend", json=asked)
    size, seconds, device = meant
    assert (await answer.json())["message"] == f"{size} bytes of {device} for {seconds} s"
    assert [what for _, what, _ in front.stub.changes] == [f"lend of {size} bytes"]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"size": "6GiB"},
        {"for": "2h"},
        {"size": -1, "for": "2h"},
        {"size": "-1GiB", "for": "2h"},
        {"size": 1.5, "for": "2h"},
        {"size": True, "for": "2h"},
        {"size": "6 gigs", "for": "2h"},
        {"size": "9999999TiB", "for": "2h"},
        {"size": "6GiB", "for": "soon"},
    ],
)
async def test_half_a_loan_is_none(front: Front, asked: Any) -> None:
    """How much and for how long: both, and in words that are understood."""
    answer = await front.unix.post("/api/v1/lend", json=asked)
    assert (answer.status, (await refusal(answer))["code"]) == (400, "bad-parameter")
    assert front.stub.changes == []


async def test_no_room_is_409_with_the_sum_and_what_would_help(front: Front) -> None:
    """The refusal of a start keeps the core's words."""
    front.stub.answers["big"] = Answer(1, 409, NO_ROOM, "no-room", ("stop alpha", "lower kv_cache"), {"needs": 5})
    answer = await front.unix.post("/api/v1/models/big/start")
    assert answer.status == 409
    error = await refusal(answer)
    assert (error["message"], error["code"], error["type"]) == (NO_ROOM, "no-room", "conflict")
    assert error["hint"] == "stop alpha; lower kv_cache"
    assert (error["remedies"], error["data"]) == (["stop alpha", "lower kv_cache"], {"needs": 5})


async def test_several_models_get_a_status_each(front: Front) -> None:
    """One refused model does not refuse the others."""
    front.stub.answers["big"] = Answer(1, 409, NO_ROOM, "no-room")
    answer = await front.unix.post("/api/v1/start", json={"models": ["big", "alpha"]})
    assert answer.status == 202
    rows = (await answer.json())["results"]
    assert [(row["model"], row["status"]) for row in rows] == [("alpha", 202), ("big", 409)]


@pytest.mark.parametrize(
    ("wish", "meant"),
    [
        ({"category": "vlm"}, ("alpha",)),
        ({"category": "llm", "models": ["alpha"]}, ("alpha", "big", "b.e-t_a")),
        ({"all": True}, ("alpha", "big", "b.e-t_a")),
        ({"models": ["big", "big"]}, ("big",)),
    ],
)
async def test_models_are_meant_by_name_category_or_all(front: Front, wish: dict[str, Any], meant: Any) -> None:
    """In the order of the configuration, each once."""
    await front.unix.post("/api/v1/stop", json=wish)
    assert front.stub.asked == [(Verb.STOP, meant, False)]


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/api/v1/start", {}, 400, "no-model"),
        ("/api/v1/start", {"models": ["alhpa"]}, 404, "unknown-model"),
        ("/api/v1/start", {"models": "x" * 2000}, 400, "bad-parameter"),
        ("/api/v1/start", {"models": [1]}, 400, "bad-parameter"),
        ("/api/v1/start", {"models": ["alpha"], "now": "perhaps"}, 400, "bad-parameter"),
        ("/api/v1/start", {"category": "x"}, 404, "unknown-category"),
        ("/api/v1/start", {"model": "alpha"}, 400, "unknown-parameter"),
        ("/api/v1/start?folow=1", {"all": True}, 400, "unknown-parameter"),
        ("/api/v1/start", [], 400, "bad-json"),
        ("/api/v1/models/alhpa/start", None, 404, "unknown-model"),
        ("/api/v1/models/%00/start", None, 404, "unknown-model"),
        ("/api/v1/models/alpha/fly", None, 404, "unknown-path"),
        ("/api/v1/status", None, 405, "unknown-method"),
    ],
)
async def test_what_cannot_be_understood_is_refused_and_does_nothing(
    front: Front, path: str, body: Any, status: int, code: str
) -> None:
    """With status, code, and nothing asked of the daemon."""
    answer = await front.unix.post(path, json=body)
    assert (answer.status, (await refusal(answer))["code"]) == (status, code)
    assert front.stub.asked == []


async def test_an_unknown_model_names_the_nearest(front: Front) -> None:
    """A slip of the finger is mended by the message."""
    assert "alpha" in (await refusal(await front.unix.get("/api/v1/models/alhpa")))["hint"]


async def test_a_wrong_method_names_the_right_ones(front: Front) -> None:
    """405 carries Allow."""
    answer = await front.unix.delete("/api/v1/plan")
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, POST")


async def test_bad_json_is_400(front: Front) -> None:
    """Broken, too deep, not UTF-8, packed, too big a number: 400; larger than 1 MiB: 413."""
    for body in (b"{", b"[" * 100_000, b"\xff", b'{"now": 1' + b"0" * 5000 + b"}", b'{"a": NaN}'):
        answer = await front.unix.post("/api/v1/reload", data=body)
        assert answer.status == 400, body[:20]
        await refusal(answer)
    packed = gzip.compress(b"{}")
    answer = await front.unix.post("/api/v1/reload", data=packed, headers={"Content-Encoding": "gzip"})
    assert (answer.status, (await refusal(answer))["code"]) == (400, "bad-body")
    assert front.stub.asked == []
    answer = await front.unix.post("/api/v1/reload", data=io.BytesIO(b"x" * ((1 << 20) + 1)))
    assert (answer.status, (await refusal(answer))["code"]) == (413, "too-large")


async def test_an_internal_error_is_an_id_and_no_traceback(front: Front) -> None:
    """The client gets an id, the journal the story; the next request is answered."""
    front.stub.broken = ZeroDivisionError("secret")
    answer = await front.unix.get("/api/v1/status")
    text = await answer.text()
    assert answer.status == 500
    assert "secret" not in text and "Traceback" not in text
    assert json.loads(text)["error"]["data"]["id"] == front.stub.faults[0][0]
    assert isinstance(front.stub.faults[0][2], ZeroDivisionError)
    front.stub.broken = None
    assert (await front.unix.get("/api/v1/status")).status == 200


async def test_reload_passes_dry_run_and_refuses_with_the_problems(front: Front) -> None:
    """A dry run changes nothing, so it is no change for the journal; 422 keeps all problems."""
    assert (await front.unix.post("/api/v1/reload?dry_run=1")).status == 200
    assert (front.stub.asked, front.stub.changes) == ([("reload", True)], [])
    front.stub.answers["reload"] = Answer(
        1, 422, "the configuration is wrong", "bad-config", data={"problems": ["x:1"]}
    )
    answer = await front.unix.post("/api/v1/reload")
    assert (answer.status, (await refusal(answer))["data"]) == (422, {"problems": ["x:1"]})
    assert front.stub.changes[0][1] == "reload"


async def test_validate_takes_the_text_as_it_is(front: Front) -> None:
    """TOML in the body, any content type."""
    await front.unix.post("/api/v1/validate", data=b"[http]\nlisten = []\n")
    assert front.stub.asked == [("validate", "[http]\nlisten = []\n")]


async def test_plan_takes_names_in_query_or_body(front: Front) -> None:
    """Lists are written with commas in a query."""
    await front.tcp.get("/api/v1/plan?models=alpha,%20big")
    await front.tcp.post("/api/v1/plan", json={"models": ["big"]})
    assert front.stub.asked == [("plan", ("alpha", "big")), ("plan", ("big",))]


async def test_logs_are_json_lines(front: Front) -> None:
    """The tail that was asked for; the file is let go."""
    answer = await front.tcp.get("/api/v1/models/alpha/logs?n=7&since=10m&failed=1")
    assert answer.content_type == "application/x-ndjson"
    assert [json.loads(line) for line in (await answer.text()).splitlines()] == [{"text": "one"}, {"text": "two"}]
    assert front.stub.asked == [("log", "alpha", 7, 600.0, True, False)]
    assert front.stub.shown == (False, 256 << 10)  # who may only look is not given more at once
    assert front.stub.lines.closed.is_set()
    assert (await front.tcp.get("/api/v1/models/alpha/logs?previous=1")).status == 404


async def test_readiness_health_root_and_metrics(front: Front) -> None:
    """healthz: alive; readyz: 503 until ready; / says where to look."""
    assert (await front.tcp.get("/healthz")).status == 200
    assert (await front.tcp.get("/readyz")).status == 200
    front.stub.is_ready = False
    assert (await front.tcp.get("/readyz")).status == 503
    assert "vllmctl" in await (await front.tcp.get("/")).text()
    answer = await front.tcp.get("/metrics")
    assert answer.content_type == "text/plain"
    assert "vllmd_model_state{" in await answer.text()


async def test_head_is_get_without_a_body(front: Front) -> None:
    """As HTTP wants it."""
    answer = await front.tcp.head("/api/v1/status")
    assert (answer.status, await answer.read()) == (200, b"")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/v1/events", "text/event-stream"),
        ("/api/v1/models/alpha/logs", "application/x-ndjson"),
        ("/api/v1/models/alpha/logs?follow=1", "application/x-ndjson"),
    ],
)
async def test_head_of_a_stream_is_over_at_once(front: Front, path: str, kind: str) -> None:
    """It has no body, so none may be waited for; and nothing is opened for it."""
    async with asyncio.timeout(5):
        answer = await front.tcp.head(path)
    assert (answer.status, answer.content_type) == (200, kind)
    assert front.stub.asked == []
    assert (await front.tcp.head("/api/v1/models/alhpa/logs")).status == 404


async def test_who_waits_with_the_body_is_told_to_send_it(front: Front) -> None:
    """Expect: 100-continue, as curl sends it with a large body; refused where the answer is clear without the body."""
    reader, writer = await front.connect("unix")
    head = b"POST /api/v1/%s HTTP/1.1\r\nHost: x\r\nExpect: %s\r\nContent-Length: 2\r\n\r\n"
    writer.write(head % (b"reload", b"100-continue"))
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert front.stub.asked == [("reload", False)]
    writer.close()
    for listener, what, status in (("tcp", b"100-continue", b"403"), ("unix", b"the moon", b"417")):
        reader, writer = await front.connect(listener)
        writer.write((head % (b"reload", what)).replace(b"Host: x", b"Host: localhost"))
        async with asyncio.timeout(5):
            assert (await reader.readline()).split()[1] == status
        writer.close()


async def test_openapi_lists_every_route(front: Front) -> None:
    """The description is made from the table; its references lead somewhere."""
    document = await (await front.tcp.get("/api/v1/openapi.json")).json()
    assert document["info"]["version"] == __version__
    listed = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(route.method, route.path) for route in ROUTES}
    for answer in {route.answer for route in JSON_ROUTES} | {"Error"}:
        assert answer in document["components"]["schemas"]


def test_the_docs_are_printed_from_the_tables() -> None:
    """docs/api.md and docs/status.md = `python -m vllmd.edge.openapi api|status`."""
    assert (DOCS / "api.md").read_text() == api_page(ROUTES)
    assert (DOCS / "status.md").read_text() == status_page()
