"""The API's description, made from its table: OpenAPI 3.1 for machines, docs/api.md for people.

`python -m vllmd.edge.openapi api|status` prints docs/api.md and docs/status.md.
"""

from collections.abc import Sequence
from typing import Any

from vllmd import __version__
from vllmd.edge.backend import Access
from vllmd.edge.params import Body, Kind, Param
from vllmd.edge.route import Route
from vllmd.edge.schemas import schemas

SCHEMA_OF_KIND: dict[Kind, dict[str, Any]] = {
    Kind.FLAG: {"type": "boolean"},
    Kind.INTEGER: {"type": "integer", "minimum": 0},
    Kind.SIZE: {"type": ["string", "integer"], "examples": ["6GiB", 6442450944]},
    Kind.DURATION: {"type": ["string", "number"], "examples": ["10m", 600]},
    Kind.STRING: {"type": "string", "maxLength": 1000},
    Kind.NAMES: {"type": "array", "items": {"type": "string"}},
}


def describe(routes: Sequence[Route]) -> dict[str, Any]:
    """The OpenAPI document of the table."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vllmd",
            "version": __version__,
            "description": "Served on the unix socket, where every caller is an admin, and on TCP, where a key says what one "
            "may do; on this machine one may read without.",
        },
        "paths": paths,
        "security": [{"key": []}, {"x-api-key": []}, {}],
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def operation(route: Route) -> dict[str, Any]:
    """One row as an OpenAPI operation."""
    made: dict[str, Any] = {
        "operationId": name_of(route),
        "summary": route.summary,
        "x-access": route.access,
        "responses": {"200": ok(route), "default": {"description": "refused", "content": content("Error")}},
    }
    if route.answer in ("Answer", "Answers", "ReloadAnswer"):
        made["responses"]["202"] = ok(route) | {"description": "accepted: progress comes as events"}
    parameters: list[dict[str, Any]] = []
    if "{name}" in route.path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    if route.body is not Body.JSON:
        parameters += [query(param) for param in route.params]
    if parameters:
        made["parameters"] = parameters
    if route.body is Body.TOML:
        made["requestBody"] = {"required": True, "content": {"application/toml": {"schema": {"type": "string"}}}}
    elif route.body is Body.JSON:
        fields = {param.name: schema_of(param) for param in route.params}
        schema = {"type": "object", "properties": fields, "additionalProperties": False}
        made["requestBody"] = {"required": False, "content": {"application/json": {"schema": schema}}}
    return made


def name_of(route: Route) -> str:
    """An operationId: "get_models_name_logs"."""
    words = route.path.removeprefix("/api/v1").replace("{", "").replace("}", "").replace(".", "_").split("/")
    return "_".join([route.method.lower(), *filter(None, words)])


def ok(route: Route) -> dict[str, Any]:
    """The good answer of a route."""
    return {"description": route.summary, "content": content(route.answer)}


def content(answer: str) -> dict[str, Any]:
    """A response's content: JSON by a named schema, or text of a media type."""
    if "/" in answer:
        return {answer: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{answer}"}}}


def query(param: Param) -> dict[str, Any]:
    """A parameter in the query; a list is written with commas."""
    made = {"name": param.name, "in": "query", "description": param.meaning, "schema": schema_of(param)}
    return made | ({"style": "form", "explode": False} if param.kind is Kind.NAMES else {})


def schema_of(param: Param) -> dict[str, Any]:
    """A parameter's schema with its default."""
    schema = SCHEMA_OF_KIND[param.kind] | {"description": param.meaning}
    return schema if param.default in (None, ()) else schema | {"default": param.default}


def api_page(routes: Sequence[Route]) -> str:
    """The text of docs/api.md."""
    lines = [*INTRODUCTION.splitlines(), "", "## Routes", "", "| | path | access | answer | |", "|---|---|---|---|---|"]
    lines += [f"| {r.method} | `{r.path}` | {r.access} | {r.answer} | {r.summary} |" for r in routes]
    lines += ["", "## Parameters", "", "| of | name | kind | default | |", "|---|---|---|---|---|"]
    for route in routes:
        of = f"{route.method} `{route.path.removeprefix('/api/v1')}`"
        lines += [f"| {of} | {p.name} | {p.kind} | {default_of(p)} | {p.meaning} |" for p in route.params]
    return "\n".join(lines) + "\n"


def default_of(param: Param) -> str:
    """A default as people write it."""
    match param.default:
        case None | ():
            return ""
        case bool():
            return str(param.default).lower()
        case _:
            return str(param.default)


INTRODUCTION = f"""# The API

Printed from `vllmd/edge/routes.py` (`python -m vllmd.edge.openapi api`); do not edit. The same for machines, with all
schemas: `GET /api/v1/openapi.json`. The status field by field: [status.md](status.md).

HTTP and JSON on the unix socket (`/run/vllmd.sock`) and on the addresses of `[http] listen`:

    curl --unix-socket /run/vllmd.sock http://vllmd/api/v1/status
    curl --unix-socket /run/vllmd.sock -X POST http://vllmd/api/v1/models/NAME/start

**Access.** `{Access.OPEN}` routes answer everybody who reaches them. On the unix socket everybody is an admin whom its file
mode lets in (root, the user that vllmd runs as, group vllmd). Over TCP `Authorization: Bearer KEY` or `x-api-key: KEY` says
who asks: a key with the scope `read` opens `{Access.READ}` routes, `admin` all. Who comes from this machine may use
`{Access.READ}` routes without a key, unless `open_loopback = false`. 401 = a key is needed, or is not known; 403 = it is
not for this. Every change is logged with the caller's uid and pid, or the name of the key.

On TCP the Host header must name this machine (421 otherwise; `[http] hosts` adds names) and Origin, where a browser sends
it, the same host: a page of another site can neither read nor ask. With `tls_cert` TCP speaks TLS only. The paths for
models (`/v1/...`): [gateway.md](gateway.md).

**Asking.** Parameters stand in the query (`?now=1`, lists with commas) or in a JSON object as the body; the body
wins. Unknown ones are refused. A wish is answered at once: 202 = accepted, its progress comes over the events; 200 =
nothing to do; 409 = no room, with the sum in `message` and what would make room in `remedies`; 422 = cannot ever work
as it is. When several models are asked for, each row of `results` has its own `status`.

**Errors** have one shape: `{{"error": {{"message", "type", "code", "hint", "remedies", "data"}}}}`. `code` and `type`
are stable. Status 500 carries an id under which the journal has the story.

**Events** (`GET /api/v1/events`) are server-sent: `snapshot` (the whole status) first, then `model` and `device`
(whole objects, at most two a second for each, a change of state at once), `note` (what an operator may read: time,
kind, level, text, model, attempt, device), `removed` (a model that is not configured any more), `clock` each 5 s
(nothing for 15 s = lost), `bye` when the daemon ends. `Last-Event-ID` or `?after=ID` resumes without a snapshot; what
is older than the last 2000 events, or of an earlier run, gives `lost` and a snapshot. A reader that is too slow gets
the same. `?follow=0` gives what is remembered as JSON lines.

**Bounds.** Body 1 MiB, a header line 8 KiB, 128 header lines; a request must be complete within 30 s; a client that
takes nothing for 30 s is cut off; 500 connections on the socket and 4096 on TCP, further ones get 503."""


if __name__ == "__main__":
    import sys

    from vllmd.edge.routes import ROUTES
    from vllmd.edge.schemas import status_page

    sys.stdout.write(status_page() if sys.argv[1:] == ["status"] else api_page(ROUTES))
