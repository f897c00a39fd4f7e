"""Named tasks that are kept and whose errors are not lost, and work in threads that can be given up. The only place that
starts either."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """A group of background tasks. An error in one is a bug: it is given to `failed`, once, with the task's name."""

    def __init__(self, failed: Callable[[str, BaseException], None]) -> None:
        self._failed = failed
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` in the background under `name`."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failed(task.get_name(), error)

    async def end(self) -> None:
        """Cancel all and wait until they are gone."""
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def in_thread(work: Callable[[], T], limit: float, default: T) -> T:
    """The result of `work`, run in a thread of its own; `default` when it raises OSError or takes longer than `limit`
    seconds, or when there is no thread to be had. The thread is a daemon: an executor's would keep the program from
    ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:  # carried over to the caller
            error = caught
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    try:
        threading.Thread(target=run, name="vllmd-aside", daemon=True).start()
    except RuntimeError:  # "can't start new thread"
        return default
    try:
        async with asyncio.timeout(limit):  # wait_for loses a cancellation before Python 3.12
            return await future
    except (OSError, TimeoutError):
        return default
