"""Who is let in over TCP, and to what: keys and their scopes, this machine, pages of other sites, TLS."""

import asyncio
import hashlib
import json
import ssl
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.stub_backend import Stub
from vllmd.config.load import load
from vllmd.ctl.__main__ import main
from vllmd.edge.auth import REMEMBERED, Guard, is_local
from vllmd.edge.backend import Refused, Verb
from vllmd.edge.bind import make_tls
from vllmd.edge.gate import Limits
from vllmd.edge.http import ListenError, Listeners
from vllmd.edge.stream import EventLog
from vllmd.spec import ApiKey, HttpSpec, Scope

LIMIT = 30.0  # seconds; far above what anything here needs
ANY = (("127.0.0.1", 0),)
INFER, READ, ADMIN = Scope.INFER, Scope.READ, Scope.ADMIN


def key(name: str, *scopes: Scope) -> ApiKey:
    """The key of which the secret is "vllmd-NAME"."""
    return ApiKey(name, hashlib.sha256(f"vllmd-{name}".encode()).hexdigest(), frozenset(scopes))


KEYS = {made.name: made for made in (key("infer", INFER), key("read", READ), key("admin", ADMIN), key("all", *Scope))}


class Models:
    """The front: keeps who asked it, and answers 200 or the refusal."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, str]] = []
        self.refused: list[tuple[int, str, str]] = []

    def takes(self, path: str) -> bool:
        return path.startswith("/v1/")

    async def answer(self, request: web.BaseRequest, key: ApiKey | None, origin: str) -> web.StreamResponse:
        self.asked.append((None if key is None else key.name, origin))
        return web.Response(text="answer")

    def refusal(
        self, request: web.BaseRequest, status: int, code: str, message: str, hint: str, origin: str = ""
    ) -> web.StreamResponse:
        self.refused.append((status, code, origin))
        return web.Response(status=status, text="front")


class Served:
    """Listeners that are open, what is behind them, and a client."""

    def __init__(self, listeners: Listeners, stub: Stub, models: Models, client: aiohttp.ClientSession) -> None:
        self.listeners, self.stub, self.models, self.client = listeners, stub, models, client

    async def status(self, path: str = "/v1/x", method: str = "POST", **headers: str) -> int:
        spelled = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.client.request(method, path, headers=spelled) as answer:
            await answer.read()
            return answer.status

    async def shown(self, name: str, path: str, method: str = "GET") -> int:
        return await self.status(path, method, Authorization=f"Bearer vllmd-{name}")


@asynccontextmanager
async def served(
    http: HttpSpec, keys: Mapping[str, ApiKey] = KEYS, limits: Limits | None = None
) -> AsyncIterator[Served]:
    stub, models = Stub(), Models()
    listeners = Listeners(stub, EventLog(), None, http, front=models, keys=keys, limits=limits)
    await listeners.start()
    connector = aiohttp.TCPConnector(ssl=False)  # the certificates here sign themselves
    try:
        async with aiohttp.ClientSession(listeners.urls[0], connector=connector) as client:
            yield Served(listeners, stub, models, client)
    finally:
        await listeners.stop()


# -- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "local"),
    [
        (("127.0.0.1", 1), True),
        (("127.8.9.1", 1), True),
        (("::1", 1, 0, 0), True),
        (("::ffff:127.0.0.1", 1, 0, 0), True),
        ("", True),
        (("10.0.0.1", 1), False),
        (("::ffff:10.0.0.1", 1, 0, 0), False),
        (("fe80::1%eth0", 1, 0, 2), False),
        (None, False),
    ],
)
def test_who_comes_from_this_machine(peer: Any, local: bool) -> None:
    """A unix socket does; of whom nothing is known any more does not."""
    request: Any = SimpleNamespace(transport=SimpleNamespace(get_extra_info=lambda _: peer))
    assert is_local(request) is local


def test_a_client_that_has_gone_is_not_taken_for_a_local_one() -> None:
    request: Any = SimpleNamespace(transport=None, headers={})
    assert not is_local(request)
    with pytest.raises(Refused):
        Guard(HttpSpec(), {}).key_of(request)


@pytest.mark.parametrize(
    ("name", "ask", "look", "change"),
    [
        ("infer", 200, 403, 403),
        ("read", 403, 200, 403),
        ("admin", 403, 200, 202),
        ("all", 200, 200, 202),
        ("nobody", 401, 401, 401),
        (None, 401, 401, 401),
    ],
)
async def test_each_scope_opens_its_own_doors(name: str | None, ask: int, look: int, change: int) -> None:
    """Asking models, looking, changing; without a key, or with a wrong one, none of it. What is open to all stays open."""
    async with served(HttpSpec(ANY, open_loopback=False)) as made:
        for path, method, status in (
            ("/v1/x", "POST", ask),
            ("/api/v1/status", "GET", look),
            ("/metrics", "GET", look),
            ("/api/v1/models/alpha/stop", "POST", change),
            ("/healthz", "GET", 200),
        ):
            found = await (made.status(path, method) if name is None else made.shown(name, path, method))
            assert found == status, path
        assert [verb for verb, *_ in made.stub.asked] == ([Verb.STOP] if change == 202 else [])
        assert made.models.asked == ([(name, "")] if ask == 200 else [])


async def test_what_is_changed_with_a_key_is_told_with_its_name() -> None:
    async with served(HttpSpec(ANY)) as made:
        assert await made.shown("admin", "/api/v1/models/alpha/stop", "POST") == 202
        caller, _, _ = made.stub.changes[0]
        assert caller.key is not None and caller.key.name == "admin" and caller.peer == "127.0.0.1"


async def test_this_machine_needs_no_key_to_ask_and_to_look() -> None:
    """But a wrong one is wrong here too, unless there are none at all: many clients must be given some key."""
    async with served(HttpSpec(ANY)) as made:
        assert [await made.status(), await made.status("/api/v1/status", "GET")] == [200, 200]
        assert await made.status("/api/v1/models/alpha/stop") == 403
        assert await made.shown("nobody", "/v1/x", "POST") == 401
    async with served(HttpSpec(ANY), {}) as made:
        assert await made.shown("nobody", "/v1/x", "POST") == 200
    async with served(HttpSpec(ANY, open_loopback=False), {}) as made:
        assert await made.shown("nobody", "/v1/x", "POST") == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer vllmd-infer"}, 200),
        ({"Authorization": "bearer   vllmd-infer "}, 200),
        ({"x-api-key": "vllmd-infer"}, 200),
        ({"Authorization": "Bearer vllmd-Infer"}, 401),
        ({"Authorization": "Bearer"}, 401),
        ({"Authorization": "Basic dmxsbWQ6aW5mZXI="}, 401),
        ({"Authorization": "Bearer " + KEYS["infer"].digest}, 401),
        ({"x-api-key": "x" * 5000}, 401),
        ({"Authorization": "Bearer nobody", "x-api-key": "vllmd-infer"}, 401),
    ],
)
async def test_how_a_key_is_shown(headers: dict[str, str], status: int) -> None:
    """As OpenAI's clients do or as Anthropic's; what the configuration holds opens nothing."""
    async with served(HttpSpec(ANY, open_loopback=False)) as made:
        assert await made.status(**headers) == status
        assert await made.status(**headers) == status, "the second time it is remembered"
        if status == 401:
            assert [code for _, code, _ in made.models.refused] == ["wrong-key"] * 2


def test_a_flood_of_wrong_keys_is_forgotten_again() -> None:
    """What is remembered is bounded, and the right one is found after it."""
    guard = Guard(HttpSpec(), KEYS)
    for number in range(3 * REMEMBERED):
        shown: Any = SimpleNamespace(headers={"Authorization": f"Bearer {number}"}, transport=None)
        with pytest.raises(Refused):
            guard.key_of(shown)
        assert len(guard._shown) <= REMEMBERED
    right: Any = SimpleNamespace(headers={"Authorization": "Bearer vllmd-infer"})
    assert guard.key_of(right) == KEYS["infer"]


async def test_a_reload_changes_who_may_come_in_at_once() -> None:
    """On connections that are open, and whatever was remembered: keys, this machine, names and pages."""
    async with served(HttpSpec(ANY)) as made:
        page, host = "https://ui.example", "models.example:8400"
        assert await made.shown("infer", "/v1/x", "POST") == 200
        assert await made.status(Origin=page) == 403
        assert await made.status(Host=host) == 421
        http = HttpSpec(ANY, open_loopback=False, hosts=("models.example",), origins=(page,))
        assert made.listeners.reconfigure(http, {"read": KEYS["read"], "new": key("new", INFER)}) == ""
        assert await made.shown("infer", "/v1/x", "POST") == 401
        assert await made.status() == 401
        assert await made.shown("new", "/v1/x", "POST") == 200
        assert await made.status(Authorization="Bearer vllmd-new", Origin=page, Host=host) == 200
        made.listeners.reconfigure(HttpSpec(ANY), KEYS)
        assert await made.status(Host=host) == 421, "a name that was taken out is not remembered"


# -- pages of other sites -----------------------------------------------------------------------------------------------


async def test_a_page_that_may_ask_is_told_so_and_others_are_refused() -> None:
    """Before the request (a preflight carries no key) and with the answer; a refusal can be read by the page as well."""
    page = "https://ui.example"
    async with served(HttpSpec(ANY, origins=(page,), open_loopback=False)) as made:
        wanted = {"Origin": page, "Access-Control-Request-Headers": "authorization,x-stainless-os"}
        async with made.client.options("/v1/x", headers=wanted) as answer:
            assert answer.status == 204
            assert answer.headers["Access-Control-Allow-Origin"] == page and answer.headers["Vary"] == "Origin"
            allowed = {word.strip() for word in answer.headers["Access-Control-Allow-Headers"].split(",")}
            assert allowed == {"Authorization", "*"}, "the star does not cover Authorization"
            assert "Access-Control-Allow-Credentials" not in answer.headers
        assert await made.status(Origin=page, Authorization="Bearer vllmd-infer") == 200
        assert made.models.asked == [("infer", page)]
        assert await made.status(Origin=page) == 401
        assert made.models.refused == [(401, "no-key", page)]
        for other in ("https://ui.example.evil", "http://ui.example", "https://ui.example:444", "null"):
            assert await made.status("/v1/x", "OPTIONS", Origin=other) == 403, other
            assert await made.status(Origin=other, Authorization="Bearer vllmd-infer") == 403, other
        assert len(made.models.asked) == 1


async def test_our_own_page_may_ask_models() -> None:
    async with served(HttpSpec(ANY)) as made:
        assert await made.status(Origin=made.listeners.urls[0]) == 200
        assert made.models.asked == [(None, "")]


# -- TLS --------------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str, *more: str) -> HttpSpec:
    """One that signs itself; `more` words for openssl."""
    cert, private = folder / f"{name}.pem", folder / f"{name}.key"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    names = ["-subj", f"/CN={name}", "-keyout", str(private), "-out", str(cert)]
    subprocess.run([*made, *names, *(more or ["-nodes"])], check=True, capture_output=True, timeout=LIMIT)
    return HttpSpec(ANY, tls_cert=cert, tls_key=private)


def test_files_that_are_no_certificate_are_refused_by_name(tmp_path: Path) -> None:
    good, other = certificate(tmp_path, "a"), certificate(tmp_path, "b")
    missing, text = tmp_path / "missing.pem", tmp_path / "text.pem"
    text.write_text("hello")
    for cert, private, said in (
        (missing, good.tls_key, f"cannot read {missing}: No such file.*that vllmd's user may read"),
        (good.tls_cert, tmp_path, f"cannot read {tmp_path}: Is a directory"),
        (text, good.tls_key, f"cannot use {text} and .* both in PEM"),
        (good.tls_cert, other.tls_key, "KEY_VALUES_MISMATCH.*the key must be the certificate's"),
    ):
        with pytest.raises(ListenError, match=said):
            make_tls(HttpSpec(ANY, tls_cert=cert, tls_key=private))
    made = make_tls(good)
    assert made is not None and made.minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    """OpenSSL would ask at the terminal, and a daemon would hang there."""
    spec = certificate(tmp_path, "a", "-passout", "pass:word")
    with pytest.raises(ListenError, match=f"cannot use {spec.tls_key} for TLS: it has a passphrase"):
        make_tls(spec)


async def test_a_certificate_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    """Also one whose key is another's: half of it must not get into what is in use."""
    async with served(certificate(tmp_path, "one")) as made:
        assert made.listeners.urls[0].startswith("https://")
        assert await made.status() == 200
        one = await shown_by(made.listeners)
        two = certificate(tmp_path, "two")
        broken = HttpSpec(ANY, tls_cert=two.tls_cert, tls_key=tmp_path / "one.key")
        assert made.listeners.reconfigure(broken, KEYS).endswith("; the old certificate stays")
        assert await shown_by(made.listeners) == one
        assert made.listeners.reconfigure(two, KEYS) == ""
        assert await shown_by(made.listeners) == (tmp_path / "two.pem").read_text()


async def shown_by(listeners: Listeners) -> str:
    """The certificate, PEM. In a thread: the listener is served by this loop."""
    return (await asyncio.to_thread(ssl.get_server_certificate, listeners.addresses[0])).strip() + "\n"


async def test_that_tls_begins_or_ends_waits_for_a_restart_and_is_said(tmp_path: Path) -> None:
    """Whoever reloads must not believe that a plain port is a safe one now; what else was changed takes effect."""
    spec = certificate(tmp_path, "a")
    for before, after, said in ((HttpSpec(ANY), spec, "to begin TLS"), (spec, HttpSpec(ANY), "to end TLS")):
        async with served(before) as made:
            assert said in made.listeners.reconfigure(after, {})
            assert await made.shown("infer", "/v1/x", "POST") == 200, "no keys any more: none is wrong"
            assert made.listeners.urls[0].startswith("https" if before is spec else "http:")


async def test_who_never_agrees_on_tls_is_cut(tmp_path: Path) -> None:
    async with served(certificate(tmp_path, "a"), limits=Limits(handshake=0.2)) as made:
        reader, writer = await asyncio.open_connection(*made.listeners.addresses[0])
        async with asyncio.timeout(LIMIT):
            assert await reader.read() == b""
        writer.close()
        assert await made.status() == 200


# -- vllmctl key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alice", "a.b-c_1"])
def test_a_made_key_opens_what_its_lines_say(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines into the file, the key to the client: that is all. Into a pipe go the lines alone."""
    assert main(["key", name, "--scope", "infer", "--scope", "read", "--model", "ocr"]) == 0
    said = capsys.readouterr()
    secret = said.err.strip()
    assert secret.startswith("vllmd-") and len(secret) == 49 and secret not in said.out
    file = tmp_path / "vllmd.toml"
    file.write_text(said.out + '[models.ocr]\nmodel = "a/b"\n')
    settings = load(file, root=False, env={"HOME": str(tmp_path)})
    made = settings.keys[name]
    assert (made.scopes, made.models) == (frozenset({INFER, READ}), ("ocr",))
    request: Any = SimpleNamespace(headers={"x-api-key": secret})
    assert Guard(settings.http, settings.keys).key_of(request) == made


def test_no_two_keys_are_the_same_and_a_terminal_sees_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = set()
    for _ in range(3):
        main(["key", "a", "--json"])
        value = json.loads(capsys.readouterr().out)
        assert tomllib.loads(value["toml"]) == {"keys": {"a": {"hash": value["hash"], "scopes": ["infer"]}}}
        made.add(value["key"])
    assert len(made) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(["key", "a"])
    said = capsys.readouterr()
    assert "vllmd-" in said.out and "[keys.a]" in said.out and said.err == ""


@pytest.mark.parametrize("name", ["Alice", "", "a b", "x" * 64, "ä"])
def test_a_name_that_the_configuration_would_refuse_makes_no_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", name]) == 2
    said = capsys.readouterr()
    assert "vllmd-" not in said.out and "lower-case letters" in said.err
