"""A daemon to measure: real vllmd, fake engines, a folder that goes away. Children compile their modules once."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.e2e.daemon import Daemon
from tests.fake.environment import install
from tests.fake.make_model import make_model

UP = 'env = { FAKE_START_S = "0.2", FAKE_METRICS_BYTES = "52000" }\nvram = "1500MiB"\n'
LIMIT = "16GiB"


@contextmanager
def fake_daemon(models: str, *, defaults: str = UP) -> Iterator[Daemon]:
    """A daemon with these tables, started; {models} in them is a folder with the model `tiny`. Ends with nothing left."""
    with prepared(models, defaults=defaults) as daemon:
        daemon.start()
        yield daemon


@contextmanager
def prepared(models: str, *, defaults: str = UP) -> Iterator[Daemon]:
    """The same, not yet started."""
    with scratch() as folder:
        engine = folder / "engine"
        install(engine)
        make_model(engine / "models/tiny")
        with daemon_in(folder, engine, models, defaults=defaults) as daemon:
            yield daemon


@contextmanager
def daemon_in(
    folder: Path,
    engine: Path,
    models: str,
    *,
    defaults: str = "",
    limit: str = LIMIT,
    spare: int = 0,
    web: bool = False,
) -> Iterator[Daemon]:
    """A daemon, not yet started, on the engine of a folder with bin/vllm and models/."""
    daemon = Daemon(folder, engine, folder / "cache", limit=limit, defaults=defaults, spare=spare, web=web)
    daemon.configure(models)
    try:
        yield daemon
    finally:
        daemon.stop()
    daemon.check_nothing_left()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder of our own."""
    folder = Path(tempfile.mkdtemp(prefix="vb-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tables(up: int, configured: int) -> str:
    """Tables of `configured` models, of which the first `up` start with the daemon."""
    return "".join(
        f'[models.m{n:03}]\nmodel = "{{models}}/tiny"\ncategory = ["llm"]\nautostart = {str(n < up).lower()}\n'
        for n in range(configured)
    )


def await_ready(daemon: Daemon, names: list[str]) -> None:
    """Until all serve."""
    for name in names:
        daemon.wait(name, lambda model: model["state"] == "ready")


def compile_modules() -> None:
    """Let children keep their bytecode, as an installed package has it: else each start compiles what was edited."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
