"""Memory accounting on a kernel that has it: a model's own limit and the unit's, and what the kernel's kill looks like; a
restart with controllers enabled. Fake engines. memory.py DEB
"""

import sys
from pathlib import Path

from tests.box.stage import BOX, GROUP, UNIT, Service, dropin, fake_engine, install, members, report, run, say


def main() -> None:
    engine = fake_engine()
    dropin("slow", "[Service]\nWatchdogSec=120\n")  # this kernel is
    install(sys.argv[1])
    flag = Path("/var/lib/vllmd/eat")
    service = Service(engine, model=BOX / "weights", vram="1500MiB", env={"FAKE_START_S": "0.3"})
    service.devices = {"limit": "5GiB", "reserve": "64MiB"}
    service.models = {
        "glutton": {"env": {"FAKE_START_S": "0.3", "FAKE_EAT": f"{flag}1"}, "memory_max": "300MiB"},
        "drinker": {
            "env": {"FAKE_START_S": "0.3", "FAKE_EAT": f"{flag}2"},
            "restart": {"backoff": "10s", "backoff_max": "10s"},
        },
        "bystander": {},
    }
    service.restart()
    before = {name: service.up(name)[0] for name in service.models}
    limit = (GROUP / "model-glutton/memory.max").read_text().strip()
    assert limit == str(300 << 20), limit
    assert (GROUP / "model-bystander/memory.oom.group").read_text().strip() == "1"

    for name, number, whose in (("glutton", 1, "its own limit"), ("drinker", 2, "the unit's limit")):
        say(f"{name} eats")
        if number == 2:
            run("systemctl", "set-property", "--runtime", UNIT, "MemoryMax=500M")
        Path(f"{flag}{number}").touch()
        old = before[name]["attempt"]
        crashed = service.wait(name, lambda m, old=old: m["attempt"] > old or m["state"] == "backoff")
        Path(f"{flag}{number}").unlink()
        run("systemctl", "set-property", "--runtime", UNIT, "MemoryMax=infinity")
        after = service.wait(name, lambda m, old=old: m["state"] == "ready" and m["attempt"] > old)
        why = service.why(name)["last_failure"]
        assert "host memory" in why, (why, crashed)
        assert after["restarts"] >= 1
        assert service.look("bystander")["pid"] == before["bystander"]["pid"]
        report(f"out of memory by {whose}: why", why)

    say("killed with controllers enabled")
    pids = sorted(members())
    service.kill()
    assert sorted(members()) == pids
    run("systemctl", "restart", UNIT)
    assert sorted(members()) == pids
    assert (GROUP / "model-glutton/memory.max").read_text().strip() == limit, "a limit outlives the daemon"
    run("systemctl", "stop", UNIT)
    assert not members()


if __name__ == "__main__":
    main()
