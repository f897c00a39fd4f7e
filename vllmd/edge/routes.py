"""The API: one table of what may be asked, by whom, what answers. Dispatch, OpenAPI and docs/api.md come from it."""

import asyncio
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from vllmd.edge.backend import HIDDEN, Access, Refused, Verb
from vllmd.edge.metrics import CONTENT_TYPE, render
from vllmd.edge.openapi import describe
from vllmd.edge.params import Body, Kind, Param
from vllmd.edge.route import Call, Handler, Route, plain, reply
from vllmd.edge.sse import send_events, send_lines, send_log
from vllmd.events import Answer

ANSWER_WITHIN = 30.0  # seconds until a wish must be answered (not fulfilled)
LINES_MAX = 10_000
LOG_MAX, LOG_MAX_TCP = 4 << 20, 256 << 10  # bytes of a log that are shown at once: to an admin, and over TCP


# -- what is asked for ------------------------------------------------------------------------------------------------


def check_name(name: str, models: list[dict[str, Any]]) -> str:
    """A configured model's name. Raises Refused(404) naming the nearest."""
    return check_names([name], models)[0]


def check_names(names: Sequence[str], models: list[dict[str, Any]]) -> list[str]:
    """Names of configured models. Raises Refused(404) for all that are none, naming the nearest of each."""
    known = [model["name"] for model in models]
    wrong = [name for name in names if name not in known][:20]
    if not wrong:
        return list(names)
    near = list(dict.fromkeys(found for name in wrong if (found := nearest(name, known))))
    meant = " and ".join(f'"{found}"' for found in near)
    hint = f"did you mean {meant}?" if near else f"configured: {', '.join(known[:20]) or 'none'}"
    called = " or ".join(f'"{name[:80]}"' for name in wrong)
    raise Refused(404, "unknown-model", f"no model is called {called}", hint)


def nearest(name: str, known: list[str]) -> str | None:
    """The name that was surely meant: nearly the same, or a name with this one in it."""
    small = name[:100].lower()
    near = difflib.get_close_matches(small, known, 1, 0.7)
    parts = [each for each in known if len(small) >= 3 and small in each]
    return next(iter(near + parts), None)


def select(call: Call) -> list[str]:
    """The models that a bulk request means. Raises Refused when it means none."""
    models = call.backend.status()["models"]
    wanted = set(check_names(call.args["models"], models))
    category = call.args["category"]
    if category is not None:
        named = {model["name"] for model in models if category in model["category"]}
        if not named:
            known = sorted({each for model in models for each in model["category"]})
            hint = f"configured: {', '.join(known) or 'none'}"
            raise Refused(404, "unknown-category", f'no model is of category "{category[:80]}"', hint)
        wanted |= named
    if not (wanted or call.args["all"]):
        raise Refused(400, "no-model", "no model is named", 'give "models", "category" or "all"')
    return [model["name"] for model in models if call.args["all"] or model["name"] in wanted]


# -- looking ----------------------------------------------------------------------------------------------------------


async def status(call: Call) -> web.StreamResponse:
    return reply(seen(call))


def seen(call: Call) -> dict[str, Any]:
    """The status with what this caller may do."""
    value = call.backend.status()
    return value | {"daemon": value["daemon"] | {"access": call.caller.access}}


async def models(call: Call) -> web.StreamResponse:
    return reply({"models": call.backend.status()["models"]})


async def devices(call: Call) -> web.StreamResponse:
    return reply({"devices": call.backend.status()["devices"]})


async def show(call: Call) -> web.StreamResponse:
    value = call.backend.model(call.name)
    return reply(value if call.caller.access is Access.ADMIN else names_only(value))


def names_only(value: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a model without what its environment holds: a secret may stand under any name."""

    def without(table: Mapping[str, Any]) -> dict[str, Any]:
        env = table.get("env")
        return {**table, "env": dict.fromkeys(env, HIDDEN)} if isinstance(env, Mapping) else dict(table)

    shown = without(value)
    return {**shown, "spec": without(spec)} if isinstance(spec := value.get("spec"), Mapping) else shown


async def why(call: Call) -> web.StreamResponse:
    return reply(call.backend.why(call.name))


async def plan(call: Call) -> web.StreamResponse:
    known = call.backend.status()["models"]
    return reply(await call.backend.plan(check_names(call.args["models"], known)))


async def schema(call: Call) -> web.StreamResponse:
    return reply(call.backend.schema())


async def validate(call: Call) -> web.StreamResponse:
    return reply(await call.backend.validate(call.text))


async def logs(call: Call) -> web.StreamResponse:
    args = call.args
    reader = call.backend.log(
        call.name,
        lines=min(args["n"], LINES_MAX),
        since=args["since"],
        failed=args["failed"],
        previous=args["previous"],
        follow=args["follow"],
        most=LOG_MAX if call.caller.access is Access.ADMIN else LOG_MAX_TCP,
    )
    try:
        if args["follow"]:
            return await send_log(call.request, call.events, reader, call.patience)
        return await send_lines(call.request, reader, call.patience)
    finally:
        reader.close()


async def events(call: Call) -> web.StreamResponse:
    after = call.args["after"]
    last = call.request.headers.get("Last-Event-ID", "")
    if after is None and last.isascii() and last.isdigit() and len(last) <= 16:
        after = int(last)
    if call.args["follow"]:
        return await send_events(call.request, call.events, lambda: seen(call), after, call.patience)
    found = call.events.after(call.events.last - LINES_MAX if after is None else after)
    text = "".join(f'{{"id":{event.id},"event":"{event.kind}","data":{event.data}}}\n' for event in found)
    return web.Response(text=text, content_type="application/x-ndjson")


async def metrics(call: Call) -> web.StreamResponse:
    return web.Response(body=render(call.backend), headers={"Content-Type": CONTENT_TYPE})


async def openapi(call: Call) -> web.StreamResponse:
    return reply(describe(ROUTES))


async def healthz(call: Call) -> web.StreamResponse:
    return plain("ok\n")


async def readyz(call: Call) -> web.StreamResponse:
    return plain("ready\n") if call.backend.ready() else plain("starting\n", 503)


async def root(call: Call) -> web.StreamResponse:
    return plain("vllmd: see `vllmctl status`, /api/v1/status and /api/v1/openapi.json\n")


# -- changing ---------------------------------------------------------------------------------------------------------


async def ask(call: Call, verb: Verb, names: list[str]) -> list[dict[str, Any]]:
    """What the daemon says to `verb` for each name, as rows of Answers."""
    call.backend.changed(call.caller, verb, names)
    async with asyncio.timeout(ANSWER_WITHIN):
        answers = await call.backend.act(verb, names, call.args["now"], call.caller)
    return [as_row(name, answers[name]) for name in names]


def as_row(name: str, answer: Answer) -> dict[str, Any]:
    """An Answer as JSON."""
    return {
        "model": name,
        "status": answer.status,
        "message": answer.message,
        "kind": answer.kind,
        "remedies": list(answer.remedies),
        "data": answer.data,
    }


def ask_one(verb: Verb) -> Handler:
    """Handler of POST /api/v1/models/{name}/VERB: a refusal is an error, with the sum and what would help."""

    async def handler(call: Call) -> web.StreamResponse:
        (row,) = await ask(call, verb, [call.name])
        if row["status"] >= 400:
            raise Refused(row["status"], row["kind"], row["message"], remedies=tuple(row["remedies"]), data=row["data"])
        return reply(row, row["status"])

    return handler


def ask_many(verb: Verb) -> Handler:
    """Handler of POST /api/v1/VERB: each row has its own status; 202 if any is on its way."""

    async def handler(call: Call) -> web.StreamResponse:
        rows = await ask(call, verb, select(call))
        return reply({"results": rows}, 202 if any(row["status"] == 202 for row in rows) else 200)

    return handler


async def reload(call: Call) -> web.StreamResponse:
    if not call.args["dry_run"]:
        call.backend.changed(call.caller, "reload", ())
    async with asyncio.timeout(ANSWER_WITHIN):
        answer = await call.backend.reload(call.args["dry_run"], call.caller)
    if answer.status >= 400:
        raise Refused(answer.status, answer.kind, answer.message, remedies=answer.remedies, data=answer.data)
    return reply({"status": answer.status, "message": answer.message, "data": answer.data}, answer.status)


async def lend(call: Call) -> web.StreamResponse:
    size, seconds = call.args["size"], call.args["for"]
    if size is None or (size > 0 and seconds is None):
        raise Refused(
            400, "bad-parameter", "how much, and for how long?", 'give "size" ("6GiB"; 0 = take all back) and "for"'
        )
    call.backend.changed(call.caller, f"lend of {size} bytes", ())
    async with asyncio.timeout(ANSWER_WITHIN):
        answer = await call.backend.lend(size, seconds or 0.0, call.args["device"], call.caller)
    if answer.status >= 400:
        raise Refused(answer.status, answer.kind or "no-room", answer.message, remedies=answer.remedies)
    return reply({"status": answer.status, "message": answer.message, "data": answer.data}, answer.status)


# -- the table --------------------------------------------------------------------------------------------------------

MODEL = "/api/v1/models/{name}"
NOW = Param("now", Kind.FLAG, "do not wait for running requests", False)
MODELS = Param("models", Kind.NAMES, "names of models", ())
SOME = (
    MODELS,
    Param("category", Kind.STRING, "all models of this category"),
    Param("all", Kind.FLAG, "all models", False),
    NOW,
)
AFTER = Param("after", Kind.INTEGER, "resume behind this id (also as the header Last-Event-ID)")
FOLLOW = Param("follow", Kind.FLAG, "0: only what is there, as JSON lines; 1: a stream that does not end", True)
LOG = (
    Param("n", Kind.INTEGER, f"the last n lines, at most {LINES_MAX}", 100),
    Param("since", Kind.DURATION, "none older than this"),
    Param("failed", Kind.FLAG, "of the last failed start", False),
    Param("previous", Kind.FLAG, "of the start before this one", False),
    Param("follow", Kind.FLAG, "go on with what comes, as server-sent events", False),
)
LOAN = (
    Param("size", Kind.SIZE, "so much; 0 takes all back"),
    Param("for", Kind.DURATION, "for so long"),
    Param("device", Kind.STRING, "its index or UUID; the one where the least must go"),
)
SSE, LINES, TEXT = "text/event-stream", "application/x-ndjson", "text/plain"
OPEN, READ, ADMIN = Access.OPEN, Access.READ, Access.ADMIN

ROUTES: tuple[Route, ...] = (
    Route("GET", "/api/v1/status", READ, status, "Status", "Everything at one moment"),
    Route("GET", "/api/v1/models", READ, models, "Models", "All models"),
    Route("GET", MODEL, READ, show, "Show", "All that is known of a model; secrets are redacted"),
    Route("GET", MODEL + "/why", READ, why, "Because", "Why a model is not as wanted"),
    Route("GET", MODEL + "/logs", READ, logs, LINES, "A model's log", LOG),
    Route("POST", MODEL + "/start", ADMIN, ask_one(Verb.START), "Answer", "Start a model", (NOW,), Body.JSON),
    Route("POST", MODEL + "/stop", ADMIN, ask_one(Verb.STOP), "Answer", "Stop a model", (NOW,), Body.JSON),
    Route("POST", MODEL + "/restart", ADMIN, ask_one(Verb.RESTART), "Answer", "Restart a model", (NOW,), Body.JSON),
    Route("POST", MODEL + "/sleep", ADMIN, ask_one(Verb.SLEEP), "Answer", "Have it sleep", (NOW,), Body.JSON),
    Route("POST", MODEL + "/wake", ADMIN, ask_one(Verb.WAKE), "Answer", "Wake it, or start it", (NOW,), Body.JSON),
    Route("POST", MODEL + "/swap-test", ADMIN, ask_one(Verb.SWAP_TEST), "Answer", "Test its sleep", (NOW,), Body.JSON),
    Route("POST", "/api/v1/start", ADMIN, ask_many(Verb.START), "Answers", "Start several", SOME, Body.JSON),
    Route("POST", "/api/v1/stop", ADMIN, ask_many(Verb.STOP), "Answers", "Stop several", SOME, Body.JSON),
    Route("POST", "/api/v1/restart", ADMIN, ask_many(Verb.RESTART), "Answers", "Restart several", SOME, Body.JSON),
    Route("GET", "/api/v1/plan", READ, plan, "Plan", "Who fits with whom; no models = all", (MODELS,)),
    Route("POST", "/api/v1/plan", READ, plan, "Plan", "The same, for long lists", (MODELS,), Body.JSON),
    Route("GET", "/api/v1/devices", READ, devices, "Devices", "All devices"),
    Route("GET", "/api/v1/events", READ, events, SSE, "What happens, live and resumable", (AFTER, FOLLOW)),
    Route("POST", "/api/v1/reload", ADMIN, reload, "ReloadAnswer", "Read the configuration again",
          (Param("dry_run", Kind.FLAG, "only say what it would do", False),), Body.JSON),
    Route("POST", "/api/v1/lend", ADMIN, lend, "ReloadAnswer", "Free memory for something else, for some time", LOAN,
          Body.JSON),
    Route("POST", "/api/v1/validate", ADMIN, validate, "Validation", "Check a configuration", (), Body.TOML),
    Route("GET", "/api/v1/schema", READ, schema, "Schema", "JSON schema of the configuration"),
    Route("GET", "/api/v1/openapi.json", OPEN, openapi, "OpenAPI", "This description"),
    Route("GET", "/healthz", OPEN, healthz, TEXT, "The daemon handles events"),
    Route("GET", "/readyz", OPEN, readyz, TEXT, "The configuration is read; 503 before that"),
    Route("GET", "/metrics", READ, metrics, TEXT, "For Prometheus"),
    Route("GET", "/", OPEN, root, TEXT, "Where to look"),
)  # fmt: skip
