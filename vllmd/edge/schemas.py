"""The JSON that the API gives, as tables that people read: one line per field, `name type meaning`.

Types: string, integer, number, boolean, object; bytes is an integer, seconds a number. `T?` may be null, `T[]` is a
list of it, a capital letter names another table. Every listed field is always present; further ones may be added, so
clients ignore what they do not know. OpenAPI, docs/status.md and docs/api.md come from here.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

TABLES: Final[Mapping[str, str]] = {
    "Status": """
daemon          Daemon          the daemon itself
devices         Device[]        GPUs, MIG slices, or the one device "cpu"
models          Model[]         every configured model, in the order of the configuration
""",
    "Daemon": """
version         string          of vllmd
pid             integer         of vllmd
host            string          name of the machine
uptime_s        seconds         since the daemon started
config          string          path of the configuration file
http            string[]        addresses of the gateway and of this API over TCP
spare           bytes           host memory of processes that have imported vLLM beforehand; 0 = none is parked
spare_ready     boolean         one of them can become the next start
access          string          what the caller of this request may do: "read" or "admin"
closing         boolean         everything is being ended
trouble         string          what is wrong with reading the devices; empty = nothing
""",
    "Device": """
id              string          NVML UUID, or "cpu"
kind            string          gpu, mig or cpu
index           integer?        index by PCI bus order; null for "cpu"
label           string          as sentences call it: "GPU 0"
name            string          name of the product
total           bytes           physical memory
budget          bytes           what vllmd may reserve in all: total less reserve, capped by limit
reserve         bytes           kept back
reserved        bytes           sum of all reservations
used            bytes           in use by everybody
external        bytes           in use by processes that are not vllmd's
external_processes Holder[]     the largest of them
free            bytes           what a model could still reserve now
lent            bytes           lent to something else (`vllmctl lend`)
lent_missing    bytes           of that not free yet
lent_for_s      seconds?        until the last loan ends; null = nothing is lent
silent_s        seconds         since the last reading; more than some seconds = the driver does not answer
""",
    "Holder": """
pid             integer         process
name            string          its name
used            bytes           memory of the device that it uses
""",
    "Model": """
name            string          name in the configuration
model           string          hub id or path
category        string[]        as configured
state           string          stopped, waiting, starting, ready, dozing, asleep, waking, draining, stopping, backoff or failed
wanted          boolean         somebody wants it up
autostart       boolean         as configured
pinned          boolean         as configured: never makes room for others
on_demand       boolean         as configured: a request starts it
phase           string?         part of the start: import, download, load, measure, compile, graphs, http
progress        number?         share of the phase, 0 to 1
overall         number?         share of the whole start by past starts, 0 to 1; never falls, 1 only when ready
elapsed_s       seconds?        since the start began
eta_s           seconds?        until ready, by past starts; null = no estimate
usual_s         seconds?        what a start of this model usually takes
silent_s        seconds?        without a sign of life from the starting engine
deadline_s      seconds?        until vllmd ends the present state by itself
since_s         seconds         in this state
pid             integer?        leader of the process tree
pids            integer[]       all of the process tree
endpoint        string?         http://127.0.0.1:8000 or unix:/path of the engine
devices         string[]        ids of the devices it is placed on
per_device      Share[]         its part of each
need            bytes?          what it needs on each of its devices; null = not known yet
need_measured   boolean         the need comes from a good start, not from rules
reserved        bytes           reserved on all devices
used            bytes           measured on all devices
attempt         integer         grows with every spawn
restarts        integer         by vllmd after a crash or a hang, since the daemon started
failures        integer         within the window that the restart rule counts
uptime_s        seconds?        since it became ready
requests_running integer        in the engine
requests_waiting integer        in the engine's queue
tokens_per_s    number          generated, mean of the last looks
requests_in_line integer        requests that wait for it in the gateway
line_since_s    seconds?        since the oldest of them came; null = none waits
idle_s          seconds?        ready and unused for so long; null = in use, or not ready
unloads_in_s    seconds?        until it is stopped for being idle (ttl)
makes_room_for  string?         the model that it empties and ends for
waits_for       string[]        the models that a waiting one waits for
swap_test       SwapTest?       the latest test of its sleep (`vllmctl swap-test`); null = none since the daemon started
why             Why?            why it is not as wanted, or what to know about it; null = all is well
""",
    "SwapTest": """
level           integer         of vLLM's sleep mode
of              integer         times that it is to sleep and wake
cycles          Cycle[]         those that are done
before          object          bytes in use when it began, by device
proved          boolean         it went well: its sleep may be relied on
frees           bytes           what others may have while it sleeps; 0 = nothing to speak of, so it ends instead
result          string          how it ended; empty = it goes on
age_s           seconds         since it began
""",
    "Cycle": """
sleep_s         seconds         to fall asleep
wake_s          seconds         to wake
same            boolean?        it answered as before; null = it answers nothing that could be compared
residual        object          bytes in use while it slept, by device
""",
    "Share": """
id              string          device
reserved        bytes           reserved there
used            bytes           measured there
""",
    "Why": """
class           string          kind of the cause, short-with-dashes: "no-room", "kv-too-small", "crashed"
text            string          the whole sentence
short           string          at most 24 characters of it, for a table
age_s           seconds?        since it happened
remedies        Remedy[]        what helps, best first
""",
    "Remedy": """
text            string          what to do
action          object?         {"method", "path"} of this API, where vllmd itself could do it
""",
    "Models": """
models          Model[]         as in the status
""",
    "Devices": """
devices         Device[]        as in the status
""",
    "Answer": """
model           string          whom it is about
status          integer         as in HTTP: 202 accepted, 200 nothing to do, 409 no room, 422 cannot
message         string          what happens now, or why not
kind            string          the same, short-with-dashes
remedies        string[]        what would help
data            object          further figures
""",
    "Answers": """
results         Answer[]        one for each model that was asked for, in that order
""",
    "ReloadAnswer": """
status          integer         200 done, 202 going on
message         string          what changed
data            object          the plan: what happens to which model
""",
    "Validation": """
ok              boolean         whether it could be loaded
problems        Problem[]       all that is wrong
warnings        string[]        what is allowed but surely not meant
""",
    "Problem": """
file            string          where
line            integer         where in it; 0 = the whole file
key             string          path of the key
message         string          what is wrong
hint            string          what is right
text            string          all of it in one line
""",
    "Line": """
text            string          one line of the log, without control characters
""",
    "Error": """
error           ErrorBody       what went wrong
""",
    "ErrorBody": """
message         string          the whole sentence
type            string          invalid_request, forbidden, not_found, timeout, conflict, unavailable, internal
code            string          what exactly, short-with-dashes
hint            string          what to do about it; may be empty
remedies        string[]        the same as a list
data            object          further figures
""",
}

#: Answers whose fields the configuration or a plan decides.
FREE: Final[Mapping[str, str]] = {
    "Show": "The model's row of the status and all that is known of it: spec, argv, env, files, learned need.",
    "Because": "`why` as in the status, and what is known beside it.",
    "Plan": "Who fits with whom, with the flags that would be used.",
    "Schema": "JSON schema of the configuration.",
    "OpenAPI": "This description.",
}

PLAIN: Final[Mapping[str, Mapping[str, str]]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "object": {"type": "object"},
    "bytes": {"type": "integer", "x-unit": "bytes"},
    "seconds": {"type": "number", "x-unit": "seconds"},
}


class Row(NamedTuple):
    """One field of a table."""

    name: str
    type: str
    meaning: str


def rows(table: str) -> list[Row]:
    """The fields of a table, in order."""
    return [Row(*line.split(None, 2)) for line in TABLES[table].strip().splitlines()]


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON schema of a type as the tables write it."""
    if kind.endswith("?"):
        inner = schema_of(kind[:-1])
        if "$ref" in inner:
            return {"anyOf": [inner, {"type": "null"}]}
        return inner | {"type": [inner["type"], "null"]}
    if kind.endswith("[]"):
        return {"type": "array", "items": schema_of(kind[:-2])}
    if kind in PLAIN:
        return dict(PLAIN[kind])
    return {"$ref": f"#/components/schemas/{kind}"}


def schemas() -> dict[str, Any]:
    """All tables as JSON schemas (2020-12), by name."""
    made: dict[str, Any] = {name: {"type": "object", "description": text} for name, text in FREE.items()}
    for table in TABLES:
        fields = rows(table)
        made[table] = {
            "type": "object",
            "properties": {row.name: schema_of(row.type) | {"description": row.meaning} for row in fields},
            "required": [row.name for row in fields],
        }
    return made


def status_page() -> str:
    """The text of docs/status.md."""
    lines = [
        "# The status as JSON",
        "",
        "`vllmctl status --json` = `GET /api/v1/status`. Printed from `vllmd/edge/schemas.py`; do not edit.",
        "",
        "Sizes are bytes, times are seconds; `?` means that it may be null. Every field listed is always there; others",
        "may be added, so ignore what you do not know. The words of `state`, `kind` and `class` are stable.",
    ]
    for table in ("Status", "Daemon", "Device", "Holder", "Model", "SwapTest", "Cycle", "Share", "Why", "Remedy"):
        lines += ["", f"## {table}", "", "| field | type | meaning |", "|---|---|---|"]
        lines += [f"| {row.name} | {row.type} | {row.meaning} |" for row in rows(table)]
    return "\n".join(lines) + "\n"
