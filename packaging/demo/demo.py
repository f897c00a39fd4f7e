"""`make run`: real vLLM models in one memory budget: two are started and asked, a third is refused, and then swapped in by a
request for it; Ctrl-C ends all.

    demo.py ENGINE [DIR]      ENGINE as engine.sh makes it; configuration, state and logs in DIR (default: .run)

With VLLMD_DEMO_ONCE set, or without a terminal on stdin, all is stopped as soon as it was shown.
"""

import contextlib
import http.client
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from stage import BIN, ROOT, Failed, Stage, clear, prepare, running

ANSWER_WITHIN = 120.0  # seconds
NO_ROOM = 5  # vllmctl's exit code
QUESTION = "What is the memory of a GPU for?"


def show(stage: Stage) -> None:
    """Start two, look, try the third, ask both. Raises Failed."""
    say(f"vllmd runs with {brief(stage.config)}; its log is {brief(stage.log)}")
    if control(stage, "start", "alpha", "beta"):
        raise Failed(f"cannot start both models (see above, and {brief(stage.home / 'log')})")
    control(stage, "status")
    say("\nA third one does not fit into the budget, and is refused at once:")
    if (code := control(stage, "start", "gamma")) != NO_ROOM:
        raise Failed(f"cannot show the refusal: vllmctl ended with code {code}, not {NO_ROOM}")
    say("\nOne chat request through each. Their weights are random: what they say is noise, how they serve is real.")
    for model in read_status(stage)["models"]:
        if model["state"] == "ready":
            began = time.monotonic()
            answer = ask(model)
            say(f"\n{model['name']} at {model['endpoint']}, {time.monotonic() - began:.2f} s")
            say(f"  question: {QUESTION}\n  answer:   {printable(answer)}")
    say("\nA request for gamma at the one endpoint of all models: another makes room, gamma starts and answers.")
    swap(read_status(stage)["daemon"]["http"][0])
    control(stage, "status")


def swap(url: str) -> None:
    """One streamed request for the model that is not up; what the client is told meanwhile. Raises Failed."""
    body = {"model": "gamma", "stream": True, "max_tokens": 24, "messages": [{"role": "user", "content": QUESTION}]}
    say(f"\n$ curl -N {url}/v1/chat/completions -d '{json.dumps(body)}'")
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=ANSWER_WITHIN)
    began = time.monotonic()
    answer = ""
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            text = line.decode(errors="replace").rstrip()
            if text.startswith(":"):
                say(f"{time.monotonic() - began:5.1f} s  {printable(text)}")
            elif text.startswith("data: {"):
                event = json.loads(text.removeprefix("data: "))
                if "error" in event:
                    raise Failed(f"cannot ask gamma: {event['error']['message']}")
                answer += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    except OSError as error:
        raise Failed(f"cannot ask gamma at {url}: {error}") from error
    finally:
        connection.close()
    say(f"{time.monotonic() - began:5.1f} s  answer: {printable(answer)}")


def control(stage: Stage, *words: str) -> int:
    """Run vllmctl, visibly; its exit code."""
    say(f"\n$ vllmctl {shlex.join(words)}")
    return vllmctl(stage, *words).returncode


def read_status(stage: Stage) -> Any:
    """What `vllmctl status --json` prints. Raises Failed."""
    done = vllmctl(stage, "status", "--json", stdout=subprocess.PIPE)
    if done.returncode:
        raise Failed("cannot read the status (see above)")
    return json.loads(done.stdout)


def vllmctl(stage: Stage, *words: str, stdout: int | None = None) -> "subprocess.CompletedProcess[bytes]":
    """Run it to its end, deaf to Ctrl-C."""
    command = [str(BIN / "vllmctl"), "--socket", str(stage.socket), *words]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=stdout, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )  # fmt: skip


def ask(model: dict[str, Any]) -> str:
    """One chat request to the model's own endpoint; the answer. Raises Failed."""
    body = {"model": model["name"], "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 24}
    connection = http.client.HTTPConnection(model["endpoint"].removeprefix("http://"), timeout=ANSWER_WITHIN)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    except OSError as error:
        raise Failed(f"cannot ask {model['name']} at {model['endpoint']}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise Failed(f"cannot ask {model['name']}: HTTP {response.status}: {data.decode(errors='replace')[:300]}")
    return str(json.loads(data)["choices"][0]["message"]["content"])


def printable(text: str) -> str:
    """Noise may be anything; a terminal must not obey it."""
    return "".join(char if char.isprintable() else "\N{MIDDLE DOT}" for char in text)


def say_on(stage: Stage) -> None:
    """How to go on by oneself."""
    ready = next(model for model in read_status(stage)["models"] if model["state"] == "ready")
    body = json.dumps({"model": ready["name"], "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24})
    control_ = shlex.quote(brief(BIN / "vllmctl"))
    url = f"{ready['endpoint']}/v1/chat/completions"
    say(f"""
They serve. In another terminal, in {Path.cwd()}:

    export VLLMD_SOCKET={shlex.quote(str(stage.socket))}
    {control_} status --watch
    {control_} logs -f {ready["name"]}
    curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}
""")


def say(text: str) -> None:
    print(text, flush=True)


def brief(path: Path) -> str:
    """The path as seen from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run(engine: Path, home: Path) -> None:
    """Everything, in its order. Raises Failed, OSError, KeyboardInterrupt when that comes before all was shown."""
    stage = prepare(engine, home)
    try:
        with running(stage) as daemon:
            show(stage)
            say_on(stage)
            if os.environ.get("VLLMD_DEMO_ONCE") or not sys.stdin.isatty():
                say("Stopping everything.")
                return
            with contextlib.suppress(KeyboardInterrupt):
                say("Ctrl-C stops everything.")
                daemon.wait()
                return
            say(" Stopping everything (Ctrl-C again: without letting requests finish).")
    finally:
        clear(stage)


def main(arguments: list[str]) -> int:
    """Exit code 0 when all was shown, 1 when something failed, 2 for a wrong command line, 130 after an early Ctrl-C."""
    if not 1 <= len(arguments) <= 2:
        print("usage: demo.py ENGINE [DIR]", file=sys.stderr)
        return 2
    engine, home = Path(arguments[0]).absolute(), Path(arguments[1] if arguments[1:] else ROOT / ".run").absolute()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        run(engine, home)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; all is stopped", file=sys.stderr)
        return 130
    except (Failed, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    say("All stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
