"""With real vLLM: installed, used by who may, restarted, killed and upgraded under a model that serves, stopped, removed,
purged. package.py DEB NEWER_DEB
"""

import http.client
import json
import re
import sys
import threading
import time
from pathlib import Path

from tests.box.stage import (
    BOX,
    UNIT,
    Service,
    active,
    install,
    members,
    of_user,
    real_engine,
    report,
    run,
    say,
    timed,
    until,
)
from vllmd.edge.logtext import split

PORT = 8101
SECRET = "hf_ThisIsNobodysToken"
SECURITY = 2.0  # the most that `systemd-analyze security` may say


class Asking(threading.Thread):
    """Requests to the model's own port, one after another, until told to end."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.failed: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            try:
                status = complete(4)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(f"{time.monotonic():.1f}: {error!r}")
                continue
            if status != 200:
                self.failed.append(f"{time.monotonic():.1f}: {status}")
            self.times.append(time.monotonic() - began)

    def end(self) -> None:
        self._over.set()
        self.join()


def post(connection: http.client.HTTPConnection, tokens: int, *, stream: bool) -> http.client.HTTPResponse:
    body = {"model": "alpha", "prompt": "Hello", "max_tokens": tokens, "stream": stream, "ignore_eos": True}
    if stream:
        body["stream_options"] = {"include_usage": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection.getresponse()


def complete(tokens: int) -> int:
    """One request; its status."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        response = post(connection, tokens, stream=False)
        response.read()
        return response.status
    finally:
        connection.close()


def use(service: Service) -> None:
    """Who may and who may not; a start; its lines in the journal."""
    run("useradd", "--create-home", "--groups", "vllmd", "member")
    run("useradd", "--create-home", "outsider")
    assert "alpha" in run("vllmctl", "status", user="member").out
    refused = run("vllmctl", "status", user="outsider", check=False)
    assert refused.code != 0 and "group vllmd" in refused.out, refused.out
    with timed("package: vllmctl start of a real model, cold"):
        print(run("vllmctl", "start", "alpha", user="member").out)
    lines = run("journalctl", "-u", "vllmd", "VLLMD_MODEL=alpha", "-o", "cat", "--no-pager").out
    assert "Starting to load model" in lines and "alpha" in lines
    assert "adopted" not in lines
    errors = run("journalctl", "-u", "vllmd", "-p", "warning", "VLLMD_PHASE=import", "-o", "cat", "--no-pager").out
    assert "INFO" not in errors
    print(run("vllmctl", "status").out)
    check_secret(service)


def check_secret(service: Service) -> None:
    """The credential is in the model's environment, and nowhere else."""
    pid = service.look("alpha")["pid"]
    assert f"HF_TOKEN={SECRET}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    shown = [
        run("vllmctl", *words).out for words in (("show", "alpha", "--json"), ("status", "--json"), ("logs", "alpha"))
    ]
    kept = [path.read_text() for path in Path("/var/lib/vllmd").rglob("*.json")]
    for text in (*shown, *kept, run("journalctl", "-u", "vllmd", "-o", "export", "-a").out):
        assert SECRET not in text


def check_security() -> None:
    """The exposure of the unit under which real vLLM serves now."""
    said = run("systemd-analyze", "security", "--no-pager", UNIT).out
    figure = float(re.findall(r"exposure level for \S+: ([\d.]+)", said)[0])
    report("systemd-analyze security, real vLLM serving under it", f"{figure}")
    assert figure <= SECURITY, said


def survive(service: Service, newer: str) -> None:
    """A restart, a kill and an upgrade: same processes, every request answered, a stream unbroken."""
    pids, before = sorted(members("alpha")), service.look("alpha")
    asking = Asking()
    asking.start()
    until(lambda: len(asking.times) >= 3)
    with timed("package: systemctl restart"):
        run("systemctl", "restart", UNIT)
    assert sorted(members("alpha")) == pids
    with timed("package: upgrade"):
        install(newer, apt=True)
    assert active() and sorted(members("alpha")) == pids
    assert service.status()["daemon"]["version"] in newer
    done = len(asking.times)
    until(lambda: len(asking.times) >= done + 3)
    asking.end()
    assert not asking.failed, asking.failed
    report(
        "package: requests answered by the model during restart and upgrade",
        f"{len(asking.times)} of {len(asking.times)}",
    )
    report("... the slowest", max(asking.times))
    after = service.look("alpha")
    for key in ("pid", "attempt", "endpoint", "reserved", "restarts"):
        assert after[key] == before[key], key

    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    response = post(connection, 400, stream=True)
    pieces = [response.readline()]
    say("killing vllmd under a stream")
    service.kill()
    pieces += response.read().split(b"\n")
    told = [json.loads(piece[6:]) for piece in pieces if piece.startswith(b"data: {")]
    tokens = next(each["usage"]["completion_tokens"] for each in reversed(told) if each.get("usage"))
    assert any(piece == b"data: [DONE]" for piece in pieces) and tokens == 400, tokens
    connection.close()
    report("SIGKILL of vllmd under a stream of real vLLM: tokens of 400 that came", f"{tokens}")
    assert sorted(members("alpha")) == pids
    service.wait("alpha", "ready")


def check_journal() -> None:
    """Every line of the model's log is in the journal, once and in order, whatever befell the daemon."""
    run("journalctl", "--sync")
    logged = [line for line in split(Path("/var/log/vllmd/alpha.log").read_bytes()) if line.strip()]
    told = run("journalctl", "-u", "vllmd", "-t", "vllmd/alpha", "-o", "cat", "-a", "--no-pager").out.splitlines()
    told = [line for line in told if line.strip()]
    assert told == logged[: len(told)] and len(told) >= len(logged) - 20, (
        len(told),
        len(logged),
        told[-3:],
        logged[-3:],
    )
    report("lines of the model's log in the journal, each once", f"{len(told)} of {len(logged)}")
    shown = run("vllmctl", "logs", "alpha", "-n", "5").out.splitlines()
    assert set(shown) <= set(logged)


def stop(service: Service) -> None:
    """A stop that the daemon does not live to see is finished; then a stop of all."""
    with timed("real vLLM, killed while it stops: gone"):
        assert service.act("stop", "alpha")[0] == 202
        service.kill()
        service.wait("alpha", "stopped")
    assert members("alpha") == []
    run("vllmctl", "start", "alpha")
    with timed("package: systemctl stop, a real model serving"):
        run("systemctl", "stop", UNIT)
    assert members() == [] and of_user() == []
    assert run("systemctl", "show", "-p", "Result", "--value", UNIT).out.strip() == "success"


def leave() -> None:
    """Removed: the configuration stays. Purged: nothing does."""
    run("apt-get", "remove", "-y", "vllmd")
    assert Path("/etc/vllmd/vllmd.toml").exists() and not Path("/usr/bin/vllmd").exists()
    assert not active() and of_user() == []
    run("apt-get", "purge", "-y", "vllmd")
    for path in ("/etc/vllmd", "/var/lib/vllmd", "/var/cache/vllmd", "/var/log/vllmd", "/run/vllmd", "/run/vllmd.sock"):
        assert not Path(path).exists(), path


def main() -> None:
    deb, newer = sys.argv[1:]
    engine = real_engine()
    with timed("package: apt install, until active"):
        install(deb, apt=True)
        until(active)
    print(run("vllmctl", "status").out)
    Path("/etc/vllmd/credentials/hf-token").write_text(SECRET + "\n")
    service = Service(engine, env={"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_TOKEN": "${credential:hf-token}"})
    service.models["alpha"] = {"model": BOX / "models/alpha", "port": PORT}
    service.restart()
    use(service)
    check_security()
    survive(service, newer)
    check_journal()
    stop(service)
    leave()


if __name__ == "__main__":
    main()
