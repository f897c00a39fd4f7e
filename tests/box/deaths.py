"""SIGKILL of vllmd, again and again, under fake engines: when idle, while a model starts, stops, restarts, and at random
moments. deaths.py DEB COUNT SEED
"""

import random
import sys
import time

from tests.box.stage import BOX, Service, dropin, fake_engine, install, members, of_user, report, say

MOMENTS = (("", ""), ("start", "starting"), ("stop", "draining"), ("restart", "stopping"))


def check(service: Service, wanted: dict[str, bool]) -> None:
    """Every model as it should be: none twice, none lost, no process besides."""
    for name, up in wanted.items():
        service.wait(name, "ready" if up else "stopped")
        assert len(service.leaders(name)) == (1 if up else 0), f"{name}: {service.leaders(name)}"
    strangers = set(of_user()) - set(members()) - {service.pid}
    assert not strangers, f"processes of nobody: {strangers}\n{service.story()}"


def die(service: Service, verb: str, name: str, state: str, pause: float) -> None:
    """Ask for something, kill the daemon in the middle of it, and look."""
    if verb:
        code, answer = service.act(verb, name)
        assert code in (200, 202), answer
    if state:
        service.wait(name, lambda m: m["state"] in (state, "ready", "stopped"))
    time.sleep(pause)  # the moment is the test's stimulus
    wanted = {model["name"]: model["wanted"] for model in service.status()["models"]}
    service.kill()
    assert service.socket.is_socket(), "systemd holds the socket over a crash"
    check(service, wanted)


def main() -> None:
    deb, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    engine = fake_engine()
    dropin("fast", "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestartSec=50ms\n")
    install(deb)
    service = Service(engine, model=BOX / "weights", vram="1500MiB", env={"FAKE_START_S": "0.3"})
    service.models = {"a": {"autostart": True}, "b": {"env": {"FAKE_START_S": "0.8"}}, "c": {"port": "auto"}}
    service.restart()
    service.wait("a", "ready")
    service.up("b")
    for verb, state in MOMENTS:
        say(f"killed {state or 'idle'}")
        die(service, verb, "c" if verb == "start" else "b", state, 0.0)
    dice = random.Random(seed)
    began = time.monotonic()
    for turn in range(count):
        verb, name = dice.choice(("start", "stop", "restart", "")), dice.choice("abc")
        pause = dice.random() ** 2
        say(f"{turn}: {verb or 'idle'} {name}, killed after {pause:.3f} s")
        die(service, verb, name, "", pause)
    report(f"deaths of vllmd at random moments (seed {seed}), each model as configured after it", f"{count}")
    report("... a death until all is as it should be, mean", (time.monotonic() - began) / max(count, 1))


if __name__ == "__main__":
    main()
