"""Every command against a fake vllmd: what is asked, what is printed, which code comes back."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ctl_daemon import LIMIT, STREAM, Daemon, event
from tests.ctl_status import GIB, device, example, model, status, why
from vllmd.ctl.__main__ import main
from vllmd.ctl.arguments import COMMANDS, parse, visible
from vllmd.ctl.faults import EXIT_CODES

EVENTS = "GET /api/v1/events"


def accepted(*names: str) -> tuple[int, dict[str, Any]]:
    rows = [{"model": n, "status": 202, "message": "", "kind": "", "remedies": [], "data": {}} for n in names]
    return 202, {"results": rows}


def ctl(daemon: Daemon, *argv: str) -> int:
    return main([*argv, "--socket", str(daemon.path)])


@pytest.fixture(autouse=True)
def locale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs are drawn as in most terminals, whatever this one has."""
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


@pytest.fixture
def daemon(tmp_path: Path) -> Any:
    with Daemon(tmp_path) as running:
        running.status = example()
        running.routes = {"GET /api/v1/status": running.status, EVENTS: running.events}
        yield running


def test_status_prints_the_table(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """What is piped has no colour and ends with cause and remedy."""
    assert ctl(daemon, "status") == 0
    text = capsys.readouterr().out
    assert "● dots-ocr" in text and text.endswith("or   vllmctl stop chat nanonets-ocr\n") and "\x1b" not in text


def test_status_json_is_what_vllmd_says(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is added, nothing lost."""
    assert ctl(daemon, "--json", "status") == 0
    assert json.loads(capsys.readouterr().out) == daemon.status


def test_something_else_that_answers_json_is_not_vllmd(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """A status without a daemon in it is none."""
    daemon.routes["GET /api/v1/status"] = {"hello": 1}
    assert ctl(daemon, "status") == 3
    assert "something else" in capsys.readouterr().err


def test_no_daemon_is_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said on standard error with the command that starts it."""
    assert main(["status", "--socket", str(tmp_path / "no.sock")]) == 3
    assert "systemctl start vllmd" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["statsu"], [], ["--json"], ["start"], ["status", "--nope"], ["logs", "-n", "x", "m"], ["status", "--readonly"],
             ["start", "m", "--timeout", "soon"], ["completion", "tcsh"], ["logs"]],
)  # fmt: skip
def test_a_wrong_command_line_is_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is asked of vllmd."""
    assert main([*argv, "--socket", "/nonexistent"] if argv else argv) == 2
    said = capsys.readouterr()
    assert said.err or said.out


def test_a_misspelt_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """The nearest one."""
    assert main(["statsu"]) == 2
    assert "vllmctl status" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "command", "category", "everything"),
    [("--status", "status", None, False), ("--launch-ocr", "start", "ocr", False), ("--launch-vlm", "start", "vlm", False),
     ("--stop-all", "stop", None, True)],
)  # fmt: skip
def test_the_predecessors_spellings_work(old: str, command: str, category: str | None, everything: bool) -> None:
    """One to one."""
    args = parse([old])
    assert (args.command, getattr(args, "category", None), args.all) == (command, category, everything)


@pytest.mark.parametrize("command", visible())
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`vllmctl COMMAND --help` and `vllmctl help COMMAND`."""
    assert main([command, "--help"]) == 0
    assert main(["help", command]) == 0
    assert capsys.readouterr().out.count(f"usage: vllmctl {command}") == 2


def test_the_overview_and_the_page_name_all_commands_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/vllmctl.md cannot fall behind."""
    assert main(["--help"]) == 0
    page = (Path(__file__).parent.parent / "docs" / "vllmctl.md").read_text()
    for text in (capsys.readouterr().out, page):
        assert [name for name in visible() if name not in text] == []
        assert [code for code in EXIT_CODES if f"{code} " not in text] == []
    for name, command in COMMANDS.items():
        flags = [flag for each in command.options for flag in each.split(",") if flag.startswith("--")]
        assert [flag for flag in flags if flag not in page] == [], name


# -- start, stop, restart ---------------------------------------------------------------------------------------------


def later(daemon: Daemon, *models: dict[str, Any]) -> None:
    """Once somebody follows the events, feed these."""

    def feed() -> None:
        assert daemon.streams.acquire(timeout=LIMIT)
        for each in models:
            daemon.feed.put(event("model", each))

    threading.Thread(target=feed, daemon=True).start()


def up(name: str = "qwen3-vl") -> dict[str, Any]:
    return model(name, "ready", reserved=6.2, used=5.9, usual_s=58.0)


def test_start_waits_until_ready(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line has the time, what is usual, and the memory."""
    daemon.status = status([model("qwen3-vl", "starting", elapsed_s=61.0, usual_s=58.0)], [])
    daemon.routes["POST /api/v1/start"] = accepted("qwen3-vl")
    later(daemon, model("qwen3-vl", "starting", phase="load", elapsed_s=61.0), up())
    assert ctl(daemon, "start", "qwen3-vl") == 0
    assert re.fullmatch(r"qwen3-vl ready after 6\d s \(usually 58 s\), 5.9 of 6.2 GiB\n", capsys.readouterr().out)
    assert daemon.asked[0] == ("POST /api/v1/start", {"models": ["qwen3-vl"], "all": False})


def test_the_events_are_opened_after_the_wish(daemon: Daemon) -> None:
    """Else a failure from before could be taken for the end of this start."""
    daemon.status = status([up()], [])
    daemon.routes["POST /api/v1/start"] = accepted("qwen3-vl")
    assert ctl(daemon, "start", "qwen3-vl") == 0
    assert [what for what, _ in daemon.asked] == ["POST /api/v1/start", EVENTS]


def test_a_start_that_fails_says_why(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Code 1, the sentence and the remedies on standard error."""
    daemon.status = status([model("m", "starting")], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")
    later(daemon, model("m", "failed", why=why("x", "the flag --fast is unknown", "remove args.fast")))
    assert ctl(daemon, "start", "m") == 1
    assert capsys.readouterr().err.endswith(
        "vllmctl: cannot start m: the flag --fast is unknown\n  try: remove args.fast\n"
    )


def test_a_crash_on_the_way_is_not_the_end(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Backoff goes on by itself, so the waiting does."""
    daemon.status = status([model("m", "starting")], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")
    later(daemon, model("m", "backoff", why=why("x", "crashed")), model("m", "waiting"), up("m"))
    assert ctl(daemon, "start", "m") == 0
    assert "m: backoff: crashed" in capsys.readouterr().err


def test_no_room_is_code_5_with_the_sum(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused at once, with what would make room."""
    text = "cannot start m: needs 5.0 GiB on GPU 0, 1.1 of 11.4 GiB left: dots-ocr 9.8 GiB"
    row = {"model": "m", "status": 409, "message": text, "kind": "no-room", "remedies": ["vllmctl stop dots-ocr"]}
    daemon.routes["POST /api/v1/start"] = {"results": [row]}
    assert ctl(daemon, "start", "m") == 5
    assert capsys.readouterr().err == f"vllmctl: {text}\n  try: vllmctl stop dots-ocr\n"


def test_an_unknown_model_is_code_4_with_the_nearest(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """As vllmd names it."""
    error = {
        "message": 'no model is called "dots"',
        "code": "unknown-model",
        "hint": 'did you mean "dots-ocr"?',
        "remedies": [],
    }
    daemon.routes["POST /api/v1/start"] = (404, {"error": error})
    assert ctl(daemon, "start", "dots") == 4
    assert 'did you mean "dots-ocr"?' in capsys.readouterr().err


def test_different_ends_are_code_1(daemon: Daemon) -> None:
    """One does not fit, one comes up: the command as a whole has failed."""
    daemon.status = status([up("a")], [])
    rows = accepted("a")[1]["results"] + [{"model": "b", "status": 409, "message": "no room"}]
    daemon.routes["POST /api/v1/start"] = (202, {"results": rows})
    assert ctl(daemon, "start", "--category", "ocr") == 1
    assert daemon.asked[0][1] == {"models": [], "all": False, "category": "ocr"}


def test_a_question_is_not_a_thing_to_try(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """A hint that asks or lists stands by itself; a command is to be tried."""
    for hint, shown in (
        ('did you mean "dots-ocr"?', '  did you mean "dots-ocr"?\n'), ("configured: a, b", "  configured: a, b\n"),
        ("vllmctl start a", "  try: vllmctl start a\n"), ("try again", "  try again\n"),
    ):  # fmt: skip
        error = {"message": "no", "code": "unknown-model", "hint": hint, "remedies": []}
        daemon.routes["POST /api/v1/start"] = (404, {"error": error})
        assert ctl(daemon, "start", "dots") == 4
        assert capsys.readouterr().err == f"vllmctl: no\n{shown}"


def test_a_wild_guess_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """A word that is like a command by chance."""
    assert main(["stall"]) == 2
    assert capsys.readouterr().err == 'vllmctl: cannot run: no command "stall"\n  try: vllmctl --help\n'


@pytest.mark.parametrize("verb", ["start", "stop", "restart"])
@pytest.mark.parametrize(
    ("given", "named"),
    [(["--category", "vlm", "-a"], "--category and --all"), (["m", "--all"], "names and --all"),
     (["m", "-c", "ocr"], "names and --category"), (["m", "-c", "ocr", "-a"], "names and --category and --all")],
)  # fmt: skip
def test_whom_it_means_is_said_in_one_way(
    daemon: Daemon, capsys: pytest.CaptureFixture[str], verb: str, given: list[str], named: str
) -> None:
    """Else one of the two is surely a slip, and --all is the more costly one."""
    assert ctl(daemon, verb, *given) == 2
    assert f"cannot {verb}: {named} exclude each other" in capsys.readouterr().err
    assert daemon.asked == []


def test_a_start_of_what_is_starting_is_waited_for(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """vllmd accepts it (202), whoever has begun it; its time counts from its beginning."""
    daemon.status = status([model("m", "starting", elapsed_s=30.0)], [])
    row = {"model": "m", "status": 202, "message": "m is starting already", "kind": "", "remedies": [], "data": {}}
    daemon.routes["POST /api/v1/start"] = (202, {"results": [row]})
    later(daemon, up("m"))
    assert ctl(daemon, "start", "m") == 0
    assert re.match(r"m ready after 3\d s", capsys.readouterr().out)


def test_a_message_that_names_the_model_does_not_get_its_name_again(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever way vllmd says it."""
    for message in ("m is ready already", "m: is ready already"):
        daemon.routes["POST /api/v1/start"] = {"results": [{"model": "m", "status": 200, "message": message}]}
        assert ctl(daemon, "start", "m") == 0
        assert capsys.readouterr().out == f"{message}\n"


def test_the_end_of_vllmd_is_named_as_the_reason(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Not somebody's wish; and nothing is waited for after the result."""
    for closing in (True, None):
        daemon.status = status([model("m", "starting")], [])
        daemon.routes["POST /api/v1/start"] = accepted("m")
        ends = status([model("m", "stopped")], [])
        ends["daemon"]["closing"] = closing
        daemon.routes["GET /api/v1/status"] = ends

        def end(closing: bool | None = closing) -> None:
            assert daemon.streams.acquire(timeout=LIMIT)
            stopped = event("model", model("m", "stopped"))
            # with its end in the same breath, or with the model's end before vllmd's
            daemon.feed.put(stopped if closing else stopped + event("bye", {}))
            daemon.feed.put(None)

        threading.Thread(target=end, daemon=True).start()
        assert ctl(daemon, "start", "m") == 1
        said = capsys.readouterr().err
        assert "vllmctl: cannot start m: vllmd has ended\n" in said and "come back" not in said


def test_a_model_that_somebody_stops_is_told_so(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """While vllmd goes on."""
    daemon.status = status([model("m", "starting")], [])
    daemon.routes |= {"POST /api/v1/start": accepted("m"), "GET /api/v1/status": status([model("m")], [])}
    later(daemon, model("m", "stopped"))
    assert ctl(daemon, "start", "m") == 1
    assert "cannot start m: it is stopped, by somebody else's wish" in capsys.readouterr().err


def test_what_is_up_already_is_no_failure(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """200: nothing to do, nothing to wait for."""
    row = {"model": "m", "status": 200, "message": "is ready already"}
    daemon.routes["POST /api/v1/start"] = {"results": [row]}
    assert ctl(daemon, "start", "m") == 0
    assert capsys.readouterr().out == "m: is ready already\n"
    assert EVENTS not in [what for what, _ in daemon.asked]


def test_timeout_is_code_6_and_the_start_goes_on(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Says what it was doing and how to end it."""
    daemon.status = status([model("m", "starting", why=why("weights 62 %, 55 s left"))], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")
    assert ctl(daemon, "start", "m", "--timeout", "200ms") == 6
    said = capsys.readouterr().err
    assert "m goes on starting (weights 62 %, 55 s left)" in said and "vllmctl stop m" in said
    assert [what for what, _ in daemon.asked if what.startswith("POST")] == ["POST /api/v1/start"]


def test_no_wait_returns_at_once(daemon: Daemon) -> None:
    """Accepted is enough."""
    daemon.routes["POST /api/v1/stop"] = accepted("m")
    assert ctl(daemon, "stop", "m", "--now", "--no-wait") == 0
    assert daemon.asked == [("POST /api/v1/stop", {"models": ["m"], "all": False, "now": True})]


def test_stop_says_what_came_back(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The memory that the model had."""
    daemon.status = status([model("m", "draining", reserved=6.2, used=5.9)], [])
    daemon.routes["POST /api/v1/stop"] = accepted("m")
    later(daemon, model("m", "stopping", reserved=6.2, used=0.2), model("m", "stopped"))
    assert ctl(daemon, "stop", "m") == 0
    assert re.fullmatch(r"m stopped after \d s, 5.9 GiB back\n", capsys.readouterr().out)


def test_waiting_survives_a_restart_of_vllmd(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The stream ends, the next one begins with a snapshot that has the end."""
    daemon.status = status([model("m", "starting")], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")

    def restart() -> None:
        assert daemon.streams.acquire(timeout=LIMIT)
        daemon.status = status([up("m")], [])
        daemon.feed.put(event("bye", {}))
        daemon.feed.put(None)

    threading.Thread(target=restart, daemon=True).start()
    assert ctl(daemon, "start", "m") == 0
    said = capsys.readouterr()
    assert "m ready" in said.out and "vllmd has ended; waiting for it to come back" in said.err


def test_json_of_a_start_is_its_outcomes(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """One list, nothing else on standard output or error."""
    daemon.status = status([up("m")], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")
    assert ctl(daemon, "start", "m", "--json") == 0
    said = capsys.readouterr()
    (row,) = json.loads(said.out)
    assert (row["model"], row["code"], row["state"], said.err) == ("m", 0, "ready", "")


def test_ctrl_c_ends_the_waiting_and_not_the_start(daemon: Daemon) -> None:
    """Code 130; nothing is sent to vllmd, and the caller is told."""
    daemon.status = status([model("m", "starting")], [])
    daemon.routes["POST /api/v1/start"] = accepted("m")
    command = [sys.executable, "-m", "vllmd.ctl", "start", "m", "--socket", str(daemon.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "m: starting\n"
        process.send_signal(signal.SIGINT)
        assert "m goes on starting" in process.stderr.read()
        assert process.wait(LIMIT) == 130
    assert [what for what, _ in daemon.asked] == ["POST /api/v1/start", EVENTS]


# -- the others -------------------------------------------------------------------------------------------------------


def test_logs_asks_for_what_is_named(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines are printed clean: a model's output cannot steer the terminal."""
    lines = b'{"text": "one\\tx"}\n{"text": "\\u001b[31mtwo\\u202e"}\n'
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(lines)}\r\n\r\n".encode()
    daemon.routes["GET /api/v1/models/a%2Fb/logs"] = head + lines
    assert ctl(daemon, "logs", "--failed", "--previous", "-n", "5", "--since", "10m", "a/b") == 0
    assert daemon.asked[0][0] == "GET /api/v1/models/a%2Fb/logs?n=5&since=600&failed=1&previous=1"
    assert capsys.readouterr().out == "one     x\n\N{REPLACEMENT CHARACTER}[31mtwo\N{REPLACEMENT CHARACTER}\n"


def test_following_a_log_ends_with_vllmd(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines as they come; the end of vllmd is not the end of the model, and said so."""
    raw = STREAM + event("line", {"text": "x"}) + event("clock", {}) + event("line", {"text": "y"}) + event("bye", {})
    daemon.routes["GET /api/v1/models/m/logs"] = raw
    assert ctl(daemon, "logs", "-f", "m") == 3
    said = capsys.readouterr()
    assert said.out == "x\ny\n" and "vllmd has ended" in said.err


def test_events_are_sentences_or_json(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Notes for people; everything for programs, which resume by id."""
    note = {"time": 0, "kind": "state", "level": "error", "text": "starting → failed", "model": "m", "attempt": 2}
    raw = STREAM + event("model", model("m"), 7) + event("note", note, 8) + event("bye", {}) + b"0\r\n\r\n"
    daemon.routes[EVENTS] = raw
    assert ctl(daemon, "events", "--since-id", "6") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].endswith("error: m: starting → failed") and lines[1].endswith("vllmd ends")
    assert daemon.asked[0][0] == EVENTS + "?after=6"
    daemon.routes[EVENTS] = STREAM + event("lost", {"after": 1}) + event("lost", {"after": 9}) + event("bye", {})
    assert ctl(daemon, "events", "--since-id", "1") == 0
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("vllmd does not remember event 1 (too old, or of an earlier run): on from now")
    assert second.endswith("some events were lost: this reader is too slow")
    daemon.routes[EVENTS] = raw
    assert ctl(daemon, "events", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["event"]) for row in rows] == [("7", "model"), ("8", "note"), ("8", "bye")]


def test_why_gives_the_story(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentence, remedies, what the log says, what changed."""
    said = why("x", "context does not fit", "max_model_len = 9584", kind="kv-too-small") | {"age_s": 540.0}
    daemon.routes["GET /api/v1/models/m/why"] = {
        "name": "m", "state": "failed", "why": said, "detail": "ValueError: \x1b[31mKV", "changed": ["max_model_len"],
    }  # fmt: skip
    assert ctl(daemon, "why", "m") == 0
    text = capsys.readouterr().out
    assert text.startswith("× m is failed, 9 min ago\n  context does not fit\n  try: max_model_len = 9584\n")
    assert "class: kv-too-small" in text and "changed since it last ran: max_model_len" in text and "\x1b" not in text


def test_show_spells_a_command_line_to_be_pasted(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Quoted for a shell; sizes with units; nothing empty."""
    shown = {
        "name": "m",
        "argv": ["vllm", "serve", "a b"],
        "need": 5 * GIB,
        "since_s": 90,
        "env": {"A": "1"},
        "pid": None,
    }
    daemon.routes["GET /api/v1/models/m"] = shown
    assert ctl(daemon, "show", "m") == 0
    assert capsys.readouterr().out == "name: m\nargv: vllm serve 'a b'\nneed: 5.0 GiB\nsince: 90 s\nenv:\n  A: 1\n"


def test_show_spells_settings_as_one_would_write_them(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Durations with their unit and nothing rounded away, ranges as ranges; a rate is no time."""
    spec = {
        "replicas": [1, 1], "start_stall": 180.0, "hang_after": 90.0, "ttl": 5400.0, "drain": 0.0, "port": 0,
        "vram": {"part": 0.5}, "restart": {"backoff": 1.0, "backoff_max": 0.25, "max_failures": 5, "window": 86400.0},
    }  # fmt: skip
    learned = {"base": GIB, "phases": {"import": 15.5}, "total": 61.0}
    daemon.routes["GET /api/v1/models/m"] = {"tokens_per_s": 412.5, "spec": spec, "learned": learned}
    assert ctl(daemon, "show", "m") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tokens_per_s: 412.5", "spec:", "  replicas: 1", "  start_stall: 3 min", "  hang_after: 90 s", "  ttl: 90 min",
        "  drain: 0 s", "  port: auto", "  vram: 50 % of the budget", "  restart:", "    backoff: 1 s",
        "    backoff_max: 250 ms", "    max_failures: 5", "    window: 1 d", "learned:", "  base: 1.0 GiB", "  phases:",
        "    import: 15.5 s", "  total: 61 s",
    ]  # fmt: skip
    daemon.routes["GET /api/v1/models/m"] = {"spec": {"replicas": [0, 2], "port": 8000}}
    assert ctl(daemon, "show", "m") == 0
    assert capsys.readouterr().out == "spec:\n  replicas: 0 to 2\n  port: 8000\n"


def test_a_plan_of_all_has_a_cross_only_for_what_can_never_run(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence that says how to read it comes first; what fits alone says so, and with whom it would."""
    base = {"devices": [], "flags": [], "parts": [], "text": "", "need": None, "fits": False, "alone": False}
    fits = base | {"fits": True, "alone": True, "devices": ["GPU 0"]}
    rows = [
        fits | {"model": "a", "need": 5 * GIB, "beside": ["b"]},
        fits | {"model": "b", "need": 4 * GIB, "beside": ["a"], "fits_now": False},
        fits | {"model": "c", "need": 9 * GIB, "beside": []},
        base | {"model": "d", "text": "cannot start d: /none does not exist", "beside": []},
    ]
    daemon.routes["GET /api/v1/plan"] = {"models": rows, "text": "4 models, each for itself"}
    assert ctl(daemon, "plan") == 0
    assert capsys.readouterr().out.splitlines() == [
        "4 models, each for itself",
        "● a fits on GPU 0: 5.0 GiB (estimated)",
        "    beside: b",
        "● b fits on GPU 0: 4.0 GiB (estimated), but not beside what runs now",
        "    beside: a",
        "○ c fits alone on GPU 0: 9.0 GiB (estimated)",
        "× d: /none does not exist",
    ]
    daemon.routes["POST /api/v1/plan"] = {"models": [rows[2]]}
    assert ctl(daemon, "plan", "c") == 0
    assert capsys.readouterr().out == "● c fits on GPU 0: 9.0 GiB (estimated)\n"
    daemon.routes["POST /api/v1/plan"] = {"models": [rows[2], rows[2]]}
    assert ctl(daemon, "plan", "c", "c") == 0
    assert "○" not in capsys.readouterr().out
    left_out = base | {"model": "e", "need": GIB, "alone": True, "text": "cannot start e: needs 1.0 GiB; it fits alone"}
    daemon.routes["POST /api/v1/plan"] = {"models": [rows[0], left_out]}
    assert ctl(daemon, "plan", "a", "e") == 5
    assert capsys.readouterr().out.endswith("○ e: needs 1.0 GiB; it fits alone\n")


def test_a_plan_that_does_not_fit_is_code_5(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """For the models that were named; the plan of all is only told."""
    fits = {"model": "a", "fits": True, "devices": ["GPU 0"], "need": 5 * GIB, "measured": True, "text": "",
            "flags": ["--gpu-memory-utilization", "0.42"], "parts": [{"label": "weights", "size": 3 * GIB}]}  # fmt: skip
    blocked = {
        "model": "b",
        "fits": False,
        "devices": [],
        "need": 9 * GIB,
        "flags": [],
        "parts": [],
        "text": "cannot start b: no room",
    }
    daemon.routes |= {"POST /api/v1/plan": {"models": [fits, blocked]}, "GET /api/v1/plan": {"models": [fits, blocked]}}
    assert ctl(daemon, "plan", "a", "b") == 5
    text = capsys.readouterr().out
    assert (
        "● a fits on GPU 0: 5.0 GiB (measured)\n    weights 3.0 GiB\n    flags: --gpu-memory-utilization 0.42\n" in text
    )
    assert "× b: no room" in text
    assert ctl(daemon, "plan") == 0


def test_devices_name_every_byte(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of a device add up to it."""
    assert ctl(daemon, "devices") == 0
    text = capsys.readouterr().out
    rows = [line.split("  ") for line in text.splitlines() if line.startswith("  ")]
    assert sum(float(part) for row in rows for part in row if part.strip().replace(".", "").isdigit()) == pytest.approx(
        12.0
    )
    assert "Xorg[977]" in text
    daemon.routes["GET /api/v1/devices"] = {"devices": [device()]}
    assert ctl(daemon, "devices", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"devices": [device()]}


def test_a_broken_file_at_reload_is_code_78_with_all_problems(
    daemon: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    """vllmd keeps the old one; the places are printed."""
    problem = '/etc/vllmd/vllmd.toml:31: models.ocr.vram: "9 Gb" is not a size (try "9GiB")'
    error = {"message": "cannot reload: 1 problem", "code": "bad-config", "hint": "", "data": {"problems": [problem]}}
    daemon.routes["POST /api/v1/reload"] = (422, {"error": error})
    assert ctl(daemon, "reload", "--dry-run") == 78
    assert problem in capsys.readouterr().err
    assert daemon.asked[0][1] == {"dry_run": True}


def test_reload_says_what_happens_to_whom(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """The message and the plan."""
    answer = {
        "status": 200,
        "message": "reloaded",
        "data": {"models": {"chat": "restart (vram)", "x": "unchanged"}, "live": ["log_level"]},
    }
    daemon.routes["POST /api/v1/reload"] = answer
    assert ctl(daemon, "reload") == 0
    said = "  chat: restarts (vram)\n  1 model unchanged\n  changes live: log_level\n"
    assert capsys.readouterr().out == f"reloaded\n{said}"
    answer["message"] = "nothing was changed"
    assert ctl(daemon, "reload", "--dry-run") == 0
    assert capsys.readouterr().out == f"would do:\n{said}"
    answer["data"] = {
        "models": {"ocr": "live (restart)", "a": "add", "b": "remove", "c": "restart (vram, args)", "d": "live"},
        "warnings": ["/x.toml:3: odd", "/x.toml:4: odder"],
    }
    assert ctl(daemon, "reload", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "would do:", "  ocr: changes live: restart", "  a: is added", "  b: is removed", "  c: restarts (vram, args)",
        "  d: changes live", "  warning: /x.toml:3: odd", "  warning: /x.toml:4: odder",
    ]  # fmt: skip
    answer["data"] = {"models": {"a": "unchanged", "b": "unchanged"}, "warnings": ["/x.toml:3: odd"]}
    assert ctl(daemon, "reload", "--dry-run") == 0
    assert capsys.readouterr().out == "would change nothing\n  2 models unchanged\n  warning: /x.toml:3: odd\n"


# -- validate ----------------------------------------------------------------------------------------------------------

CONFIG = '[models.a]\nmodel = "o/m"\nenv = { HF_TOKEN = "${credential:hf}" }\n'


def text_or_json(raw: bytes) -> Any:
    """The body of a request, which for this route is no JSON."""
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode()


@pytest.fixture
def config(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the running vllmd, which knows the credential in it."""
    file = tmp_path / "vllmd.toml"
    file.write_text(CONFIG)
    daemon.status["daemon"]["config"] = str(file)
    daemon.routes["POST /api/v1/validate"] = {"ok": True, "problems": [], "warnings": ["odd"]}
    monkeypatch.setattr("tests.ctl_daemon.json", SimpleNamespace(loads=text_or_json, dumps=json.dumps))
    for name in ("CREDENTIALS_DIRECTORY", "VLLMD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return file


def test_a_running_vllmd_is_asked_about_its_own_file(
    daemon: Daemon, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Named, by another path, or not named at all: it knows what is filled in."""
    (config.parent / "link.toml").symlink_to(config)
    for named in ([str(config)], [str(config.parent / "link.toml")], []):
        daemon.asked.clear()
        assert ctl(daemon, "validate", *named) == 0
        said = capfd.readouterr()
        assert said.out == f"{config}: good, says the running vllmd\n" and said.err == "warning: odd\n"
        assert daemon.asked[-1] == ("POST /api/v1/validate", CONFIG)


def test_its_problems_are_printed_as_those_found_here(
    daemon: Daemon, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Code 78, all of them; with --json the same object."""
    row = {"file": "f", "line": 3, "key": "k", "message": "m", "hint": "", "text": "f:3: k: \x1bm"}
    daemon.routes["POST /api/v1/validate"] = {"ok": False, "problems": [row], "warnings": []}
    assert ctl(daemon, "validate") == 78
    assert capfd.readouterr().err == f"f:3: k: \N{REPLACEMENT CHARACTER}m\ncannot use {config}: 1 problem\n"
    assert ctl(daemon, "validate", "--json") == 78
    assert json.loads(capfd.readouterr().out) == {
        "ok": False, "file": str(config), "problems": [row], "warnings": []
    }  # fmt: skip


def test_another_file_is_checked_here_with_what_is_not_known_as_a_warning(
    daemon: Daemon, config: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the file of $VLLMD_CONFIG, and any where no vllmd runs or answers that."""
    other = config.with_name("other.toml")
    other.write_text(CONFIG)

    def checked_here(*argv: str) -> None:
        assert main(["validate", *argv]) == 0
        said = capfd.readouterr()
        assert "good, 1 model\n" in said.out and '"${credential:hf}": not known here' in said.err

    checked_here(str(other), "--socket", str(daemon.path))
    checked_here(str(config), "--socket", "/none")
    monkeypatch.setenv("VLLMD_CONFIG", str(other))
    checked_here("--socket", str(daemon.path))
    daemon.routes["POST /api/v1/validate"] = (404, {})
    checked_here(str(config), "--socket", str(daemon.path))


def test_a_file_that_vllmd_cannot_be_sent_is_checked_here(
    daemon: Daemon, config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One that is no text."""
    config.write_bytes(b"# caf\xe9\n")
    assert ctl(daemon, "validate") == 78
    assert "is not UTF-8" in capfd.readouterr().err


# -- --json when something is wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [name for name in visible() if name not in ("completion", "key", "validate", "schema", "version")]
)
def test_json_is_there_when_vllmd_is_not(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same exit code, the sentence on standard error, and an object for the program that reads."""
    operands = {"MODEL": ["m"], "MODELS": ["m"], "SIZE?": ["1GiB", "--for", "1h"]}
    operand = operands.get(COMMANDS[command].operand, [])
    assert main([command, *operand, "--json", "--socket", str(tmp_path / "none")]) == 3
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert error["code"] == "unreachable" and error["message"] in said.err and error["remedies"]
    assert set(error) == {"message", "type", "code", "hint", "remedies"}


def test_json_of_a_refusal_is_vllmds_own(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing of it is lost; for a wrong command line there is one too."""
    error = {"error": {"message": "no", "type": "not_found", "code": "unknown-model", "hint": "", "data": {"x": 1}}}
    for what in ("POST /api/v1/start", "GET /api/v1/models/m/why", "GET /api/v1/models/m/logs"):
        daemon.routes[what] = (404, error)
    for argv in (["start", "m"], ["why", "m"], ["logs", "-f", "m"]):
        assert ctl(daemon, *argv, "--json") == 4
        assert json.loads(capsys.readouterr().out) == error
    daemon.routes["POST /api/v1/reload"] = (422, {"error": {"message": "no", "data": {"problems": ["p"]}}})
    assert ctl(daemon, "reload", "--json") == 78
    assert json.loads(capsys.readouterr().out)["error"]["data"] == {"problems": ["p"]}
    for argv in (["start"], ["statsu"], ["logs"], ["start", "m", "--all"]):
        assert ctl(daemon, *argv, "--json") == 2
        assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_version_works_without_a_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And names both with one."""
    assert main(["version", "--socket", str(tmp_path / "x")]) == 0
    assert "not reachable" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_traceback(daemon: Daemon) -> None:
    """`vllmctl status | head -0`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vllmd.ctl", "status", "--socket", str(daemon.path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=LIMIT, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_status_imports_nothing_that_costs(daemon: Daemon) -> None:
    """The budget of a start is spent on imports; the daemon's packages and these are not among them."""
    code = "import sys; from vllmd.ctl.__main__ import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "status", "--socket", str(daemon.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=True)
    bare = [sys.executable, "-c", "import sys; print(*sys.modules)"]  # what this interpreter's site brings along
    loaded = set(done.stderr.split()) - set(subprocess.check_output(bare, text=True, timeout=LIMIT).split())
    banned = {"typing", "dataclasses", "inspect", "http.client", "ssl", "asyncio", "urllib", "email", "pathlib", "subprocess",
              "difflib", "termios", "aiohttp", "logging"}  # fmt: skip
    assert loaded & banned == set()
    assert {name for name in loaded if name.startswith("vllmd.") and not name.startswith("vllmd.ctl")} == set()


LOCALES = [
    ({"LANG": "C.UTF-8"}, "●"), ({"LANG": "de_DE.UTF-8"}, "●"), ({"LC_CTYPE": "C.UTF-8", "LANG": "C"}, "●"), ({}, "●"),
    ({"LC_ALL": "C"}, "*"), ({"LC_ALL": "C", "LANG": "C.UTF-8"}, "*"), ({"LANG": "C"}, "*"), ({"LC_CTYPE": "POSIX"}, "*"),
    ({"LANG": "de_DE.ISO-8859-1"}, "*"), ({"LC_ALL": "C.utf8", "LANG": "C"}, "●"),
]  # fmt: skip


@pytest.mark.parametrize(("env", "sign"), LOCALES, ids=str)
def test_signs_are_those_of_the_locale(daemon: Daemon, env: dict[str, str], sign: str) -> None:
    """As it was set, not as Python makes it: for LC_ALL=C that turns to UTF-8."""
    command = [sys.executable, "-m", "vllmd.ctl", "status", "--socket", str(daemon.path)]
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, capture_output=True, env=env | path, timeout=LIMIT, check=True)
    lines = done.stdout.decode().splitlines()
    assert lines[4].startswith(f"{sign} dots-ocr") and (sign == "●" or done.stdout.isascii())


def test_a_complaint_too_is_in_the_letters_of_the_locale(tmp_path: Path) -> None:
    """With the signs' twins, not with question marks."""
    error = {"error": {"message": "a → b · 3 … größer"}}
    with Daemon(tmp_path, {"GET /api/v1/status": (500, error)}) as running:
        command = [sys.executable, "-m", "vllmd.ctl", "status", "--socket", str(running.path)]
        done = subprocess.run(
            command, capture_output=True, env=os.environ | {"LC_ALL": "C"}, timeout=LIMIT, check=False
        )
    assert done.stderr == b"vllmctl: a -> b - 3 ~ gr??er\n"
