"""What all long tests share: real tiny models, a vllmd as a process, and a table of the times that were measured."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.daemon import ROOT, Daemon, Start

ENGINE = ROOT / ".engine"
LIMIT = 600  # seconds for one test: a start of a real vLLM takes 25 to 70
_rows = pytest.StashKey[list[tuple[str, str]]]()


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.e2e)
    item.add_marker(pytest.mark.timeout(LIMIT))


@pytest.fixture(scope="session")
def engine() -> Path:
    """A vLLM environment with the models alpha and beta (text)."""
    if not (ENGINE / "bin/vllm").exists() or not (ENGINE / ".engine-stamp").exists():
        pytest.skip("there is no vLLM in .engine (make engine)")
    models = ENGINE / "models"
    subprocess.run(
        [ENGINE / "bin/python", ROOT / "packaging/demo/tiny.py", "llama", models / "alpha", "llama", models / "beta"],
        check=True,
    )
    return ENGINE


class Report:
    """Rows of the table: what was measured, and what came out."""

    def __init__(self, rows: list[tuple[str, str]]) -> None:
        self._rows = rows

    def __call__(self, what: str, value: float | str) -> None:
        """Seconds, or a text."""
        self._rows.append((what, value if isinstance(value, str) else f"{value:.2f} s"))


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    return Report(request.config.stash.setdefault(_rows, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(_rows, [])
    if rows:
        terminalreporter.section("measured with real vLLM")
        wide = max(len(what) for what, _ in rows)
        for what, value in rows:
            terminalreporter.line(f"{what:<{wide}}  {value}")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's caches, the same for all daemons: only the first start is a cold one."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def start(engine: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts daemons that end with the module; each is then seen to leave nothing behind."""
    daemons: list[Daemon] = []

    def begin(models: str, *, limit: str = "3.5GiB", defaults: str = "", web: bool = False, spare: int = 0) -> Daemon:
        folder = tmp_path_factory.mktemp("d")
        daemon = Daemon(folder, engine, cache, limit=limit, defaults=defaults, web=web, spare=spare)
        daemons.append(daemon)
        daemon.configure(models)
        daemon.start()
        return daemon

    yield begin
    for daemon in daemons:
        daemon.stop()
    for daemon in daemons:
        daemon.check_nothing_left()
