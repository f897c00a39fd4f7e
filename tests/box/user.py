"""A user's own vllmd, under `systemctl --user`, with fake engines: adopted after a kill, ended by a stop. user.py DEB"""

import os
import pwd
import sys
from pathlib import Path

from tests.box.stage import BOX, UNIT, Service, fake_engine, install, of_user, report, run, until

NAME = "ada"


def main() -> None:
    engine = fake_engine()
    install(sys.argv[1])
    run("systemctl", "stop", UNIT)
    run("useradd", "--create-home", NAME)
    user = pwd.getpwnam(NAME)
    runtime = Path(f"/run/user/{user.pw_uid}")
    run("systemctl", "start", f"user@{user.pw_uid}.service")

    def ask(*words: str) -> str:
        return run(*words, user=NAME, XDG_RUNTIME_DIR=str(runtime), HOME=user.pw_dir).out

    def pid() -> int:
        return int(ask("systemctl", "--user", "show", "-p", "MainPID", "--value", UNIT))

    service = Service(engine, model=BOX / "weights", vram="1500MiB", env={"FAKE_START_S": "0.3"})
    service.models = {"a": {"autostart": True}}
    service.socket = runtime / "vllmd/vllmd.sock"
    service.write()
    folder = Path(user.pw_dir) / ".config/vllmd"
    folder.mkdir(parents=True)
    (folder / "vllmd.toml").write_text(Path("/etc/vllmd/vllmd.toml").read_text())
    run("chown", "-R", f"{NAME}:", user.pw_dir)
    others = set(of_user(NAME))
    ask("systemctl", "--user", "start", UNIT)
    before = service.wait("a", "ready")
    assert "ready" in ask("vllmctl", "status")
    assert "/model-a" in Path(f"/proc/{before['pid']}/cgroup").read_text()
    old = pid()
    os.kill(old, 9)
    until(
        lambda: (
            pid() not in (0, old)
            and ask("systemctl", "--user", "show", "-p", "ActiveState", UNIT) == "ActiveState=active\n"
        )
    )
    after = service.wait("a", "ready")
    assert after["pid"] == before["pid"]
    ask("systemctl", "--user", "restart", UNIT)
    assert service.wait("a", "ready")["pid"] == before["pid"]
    ask("systemctl", "--user", "stop", UNIT)
    left = set(of_user(NAME)) - others
    assert not left, left
    report("systemctl --user: adopted after SIGKILL and restart, ended by stop", "yes")


if __name__ == "__main__":
    main()
