"""The body of a request on its way in: all of it, once, within bounds of size, of memory over all requests, and of time."""

import asyncio
from typing import Final

from aiohttp import ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from vllmd.gateway.errors import Trouble
from vllmd.gateway.tallies import Counted
from vllmd.units import gib

SILENT_MAX: Final = 30.0  # seconds without a byte of a body
LATER: Final = 2.0  # seconds after which memory may be free again


class Intake:
    """Reads bodies, and keeps the account of what is held."""

    def __init__(self, counted: Counted, max_body: int, memory: int) -> None:
        self.counted, self.max_body, self.memory = counted, max_body, memory

    async def read(self, request: web.BaseRequest) -> bytes:
        """The body; what it takes is on the account until `forget`. Raises Trouble: 400, 408, 413, 503."""
        content = request.content
        self._check(request.content_length or 0, 0)
        try:
            if content.is_eof():  # a small one came along with its head
                body = content.read_nowait()
                self._check(len(body), 0)
                self.counted.memory += len(body)
                return body
            return await self._collect(request)
        except (ClientPayloadError, HttpProcessingError) as error:
            raise Trouble(400, "invalid_body", f"the body is not as its headers say: {str(error)[:200]}") from None

    async def _collect(self, request: web.BaseRequest) -> bytes:
        pieces: list[bytes] = []
        size = 0
        try:
            while True:
                async with asyncio.timeout(SILENT_MAX):
                    piece = await request.content.readany()
                if not piece:
                    return b"".join(pieces)
                self._check(size + len(piece), size)
                size += len(piece)
                self.counted.memory += len(piece)
                pieces.append(piece)
        except TimeoutError:
            self.forget(size)
            raise Trouble(408, "body_timeout", f"no byte of the body came for {SILENT_MAX:.0f} s") from None
        except BaseException:
            self.forget(size)
            raise

    def forget(self, size: int) -> None:
        """So many bytes are held no more."""
        self.counted.memory -= size

    def _check(self, size: int, held: int) -> None:
        """`size` bytes, of which `held` are on the account already."""
        if size > self.max_body:
            raise Trouble(413, "body_too_large", f"the body has more than {gib(self.max_body)} ([http] max_body)")
        if self.counted.memory + size - held > self.memory:
            text = f"{gib(self.counted.memory)} of requests are held already ([http] memory)"
            raise Trouble(503, "out_of_memory", text, "try again later", LATER)
