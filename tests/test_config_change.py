"""The plan of a reload."""

from pathlib import Path

import pytest

from vllmd.config.change import Change, ModelChange, Verdict, plan
from vllmd.config.load import load
from vllmd.spec import Settings

OLD = """
[daemon]
socket = "/s"
[models.a]
model = "o/a"
vram = "1GiB"
[models.b]
model = "o/b"
"""


def settings(text: str) -> Settings:
    return load(Path("/x.toml"), content=text.encode(), root=True, env={})


def test_the_same_configuration_changes_nothing() -> None:
    """Also where what was left out is now written with its default, or a value is spelled otherwise."""
    same = OLD.replace('"1GiB"', '"1024MiB"\ndrain = "30s"\nargs = {}')
    change = plan(settings(OLD), settings(same))
    assert change == Change({"a": ModelChange(Verdict.UNCHANGED), "b": ModelChange(Verdict.UNCHANGED)})
    assert change.empty


@pytest.mark.parametrize(
    ("line", "verdict", "keys"),
    [
        ('vram = "2GiB"', Verdict.RESTART, ("vram",)),
        ('kv_cache = "2GiB"', Verdict.RESTART, ("kv_cache",)),
        ("max_model_len = 100", Verdict.RESTART, ("max_model_len",)),
        ("gpus = 2", Verdict.RESTART, ("gpus",)),
        ("args = { seed = 1 }", Verdict.RESTART, ("args",)),
        ('env = { A = "1" }', Verdict.RESTART, ("env",)),
        ('executable = "/v"', Verdict.RESTART, ("executable",)),
        ('environment = "e"', Verdict.RESTART, ("environment",)),
        ("port = 8000", Verdict.RESTART, ("port",)),
        ('drain = "1s"', Verdict.RESTART, ("drain",)),
        ("autostart = true", Verdict.LIVE, ("autostart",)),
        ('category = "ocr"', Verdict.LIVE, ("category",)),
        ('hang_after = "60s"', Verdict.LIVE, ("hang_after",)),
        ('stop_timeout = "60s"', Verdict.LIVE, ("stop_timeout",)),
        ("restart = { max_failures = 1 }", Verdict.LIVE, ("restart",)),
        ('hang_after = "60s"\nport = 8000', Verdict.RESTART, ("port", "hang_after")),
    ],
)
def test_a_model_restarts_only_for_what_its_engine_cannot_follow(
    line: str, verdict: Verdict, keys: tuple[str, ...]
) -> None:
    """Keys that end in argv, environment or reservation restart it; the others take effect at once."""
    change = plan(settings(OLD), settings(OLD + line))
    assert change.models == {"a": ModelChange(Verdict.UNCHANGED), "b": ModelChange(verdict, keys)}


def test_a_default_changes_every_model_that_has_no_value_of_its_own() -> None:
    """[defaults] is compared as it arrives in the models."""
    change = plan(settings(OLD), settings(OLD + '[defaults]\nvram = "2GiB"'))
    assert change.models == {"a": ModelChange(Verdict.UNCHANGED), "b": ModelChange(Verdict.RESTART, ("vram",))}


def test_models_come_and_go() -> None:
    """add, remove; a new name is both."""
    change = plan(settings(OLD), settings(OLD.replace("models.b", "models.c")))
    assert {name: c.verdict for name, c in change.models.items()} == {
        "a": Verdict.UNCHANGED,
        "c": Verdict.ADD,
        "b": Verdict.REMOVE,
    }


def test_keys_of_the_daemon_are_live_or_wait_for_its_restart() -> None:
    """Sockets, directories and addresses cannot move under a running daemon; levels and budgets can."""
    text = OLD.replace('"/s"', '"/t"\nlog_level = "debug"') + '[http]\nlisten = []\n[devices.0]\nlimit = "1GiB"'
    change = plan(settings(OLD), settings(text))
    assert change.daemon == ("daemon.socket", "http.listen")
    assert change.live == ("daemon.log_level", "devices.0.reserve", "devices.0.limit")
    assert not change.empty


def test_other_certificates_are_live_and_that_there_are_any_is_not() -> None:
    """A port that is open without TLS stays so until vllmd is restarted, and the plan says it."""
    without, with_tls = settings(OLD), settings(OLD + '[http]\ntls_cert = "/a"\ntls_key = "/b"')
    other = settings(OLD + '[http]\ntls_cert = "/c"\ntls_key = "/b"')
    assert plan(without, with_tls).daemon == ("http.tls_cert", "http.tls_key") == plan(with_tls, without).daemon
    assert (plan(with_tls, other).live, plan(with_tls, other).daemon) == (("http.tls_cert",), ())


def test_who_may_come_in_changes_live() -> None:
    text = (
        OLD
        + '[http]\nhosts = ["h"]\norigins = ["https://o"]\nopen_loopback = false\nmax_body = "1MiB"\nmemory = "1GiB"\n'
    )
    change = plan(settings(OLD), settings(text + f'[keys.a]\nhash = "sha256:{"0" * 64}"'))
    live = ("hosts", "origins", "open_loopback", "max_body", "memory")
    assert change.live == (*(f"http.{key}" for key in live), "keys.a") and change.daemon == ()
