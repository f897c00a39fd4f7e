"""What a line of vLLM's log says about a start: the phase it is in, how far, and what memory it measured.

One table of vLLM 0.32's words, for both of its model runners, GPU and CPU. Every line in it is optional: versions and
devices print different ones, so nothing may wait for a certain line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from vllmd.core.logline import parse
from vllmd.facts import Figures, Phase
from vllmd.units import GIB


@dataclass(frozen=True, slots=True)
class Sign:
    """What a line tells. `phase` None: no news on that. `fraction` 0..1 of the phase; `note` its own words.

    `measured`: the engine's measuring of device memory is over. `drained`: told to end, it has finished its requests.
    """

    phase: Phase | None = None
    fraction: float | None = None
    note: str = ""
    figures: Figures | None = None
    measured: bool = False
    drained: bool = False


Reader = Callable[[re.Match[str]], Sign]
_PREFIX = re.compile(r"^\[\w+\] ")  # the part of the model that is compiled: "[backbone] "


def read(line: str) -> Sign | None:
    """The first row of the table that the line matches; None for a line that says nothing, or that says it in numbers
    which are none. Never fails: what an engine prints must not end it."""
    text = _PREFIX.sub("", parse(line).text)
    for pattern, reader in _TABLE:
        if match := pattern.search(text):
            try:
                return reader(match)
            except (ValueError, OverflowError):  # "1.2.3 GiB", a number of a thousand digits
                return None
    return None


def _at(phase: Phase, fraction: float | None = None, note: str = "") -> Reader:
    sign = Sign(phase, fraction, note)
    return lambda _: sign


def _percent(phase: Phase) -> Reader:
    """Groups: percent, and what is done of what."""

    def reader(match: re.Match[str]) -> Sign:
        return Sign(phase, min(1.0, int(match["percent"]) / 100), f"{match['done']} of {match['all']}")

    return reader


def _opened(match: re.Match[str]) -> Sign:
    done = "complete" in match[0]
    return Sign(Phase.HTTP, 1.0 if done else None, measured=True)


def _loaded(match: re.Match[str]) -> Sign:
    return Sign(Phase.MEASURE, figures=Figures(weights=_bytes(match[1])))


def _kv_size(match: re.Match[str]) -> Sign:
    return Sign(figures=Figures(kv_tokens=int(match[1].replace(",", ""))), measured=True)


def _kv_memory(match: re.Match[str]) -> Sign:
    """No `measured` here: each worker prints its own, and others may still measure."""
    return Sign(figures=Figures(kv_bytes=max(0, _bytes(match[1]))))


def _captured(match: re.Match[str]) -> Sign:
    return Sign(Phase.GRAPHS, 1.0, figures=Figures(graphs=_bytes(match[1])), measured=True)


def _usage(match: re.Match[str]) -> Sign:
    figures = Figures(
        kv_bytes=_bytes(match["kv"]), consumed=_bytes(match["consumed"]), peak=_bytes(match["peak"]),
        graphs=_bytes(match["graphs"]),
    )  # fmt: skip
    return Sign(figures=figures, measured=True)


def _cpu_kv(match: re.Match[str]) -> Sign:
    consumed = _bytes(match["consumed"]) if match["consumed"] else None
    return Sign(figures=Figures(kv_bytes=_bytes(match["kv"]), consumed=consumed))


def _bytes(gib: str) -> int:
    return int(float(gib) * GIB)


_SIZES = r"(?P<done>[\d.]+[kMGT]?)/(?P<all>[\d.]+[kMGT]?)"  # as tqdm writes them

_ROWS: tuple[tuple[str, Reader], ...] = (
    # the API server, the engine core and each worker import vLLM anew
    (r"^non-default args: ", _at(Phase.IMPORT, note="API server")),
    (r"^Resolved architecture: ", _at(Phase.IMPORT, note="engine")),
    (r"^Initializing a V\d LLM engine ", _at(Phase.IMPORT, note="worker")),
    (r"world_size=\d+ rank=\d+ local_rank=\d+ ", _at(Phase.IMPORT, note="worker")),
    (rf"^\s*\S+\.(?:safetensors|bin|pt|gguf): +(?P<percent>\d+)%\|.*\| *{_SIZES}", _percent(Phase.DOWNLOAD)),
    (r"Fetching \d+ files: +(?P<percent>\d+)%\|.*\| *(?P<done>\d+)/(?P<all>\d+)", _percent(Phase.DOWNLOAD)),
    (r"^Time spent downloading weights for ", _at(Phase.DOWNLOAD, 1.0)),
    (r"^Starting to load model |^Loading model from scratch", _at(Phase.LOAD)),
    (
        r"Loading .*checkpoint shards: +(?P<percent>\d+)% Completed \| (?P<done>\d+)/(?P<all>\d+)",
        _percent(Phase.LOAD),
    ),
    (r"^Loading weights took ", _at(Phase.LOAD, 1.0)),
    (r"^Model loading took (\d[\d.]*) GiB", _loaded),
    (r"^Encoder cache will be initialized |^Profiling CUDA graph memory", _at(Phase.MEASURE)),
    (
        r"^Using cache directory: .* for vLLM's torch\.compile|^Dynamo bytecode transform time|^Compiling a graph for "
        r"|^Directly load the compiled graph|^Compile and warming up model|^Warming up model for the compilation",
        _at(Phase.COMPILE),
    ),
    (r"^torch\.compile took |^Warming up done", _at(Phase.COMPILE, 1.0)),
    (r"Capturing CUDA graphs?.*: +(?P<percent>\d+)%\|.*\| *(?P<done>\d+)/(?P<all>\d+)", _percent(Phase.GRAPHS)),
    (r"^Graph capturing finished in .* took (-?[\d.]+) GiB", _captured),
    (r"KV cache size: ([\d,]+) tokens", _kv_size),
    (r"^Available KV cache memory: (-?[\d.]+) GiB", _kv_memory),
    (r"^Initial free memory .* reserved ([\d.]+) GiB memory for KV Cache", _kv_memory),
    (
        r"Actual usage is (?P<consumed>[\d.]+) GiB for consumed memory.*, (?P<peak>[\d.]+) GiB for peak activation, and "
        r"(?P<graphs>-?[\d.]+) GiB for CUDAGraph memory.* Current kv cache memory in use is (?P<kv>[\d.]+) GiB",
        _usage,
    ),
    (
        r"(?:Explicitly|Auto) set \((?P<kv>[\d.]+)/[\d.]+\) GiB for KV cache(?:.* (?P<consumed>[\d.]+) GiB memory was "
        r"consumed by non-kv)?",
        _cpu_kv,
    ),
    (r"^init engine \(", lambda _: Sign(measured=True)),
    (r"^EngineCore: request processing complete", lambda _: Sign(drained=True)),
    (
        r"^Starting vLLM (?:API )?server|^Available routes are|^Started server process|^Waiting for application startup"
        r"|^Application startup complete",
        _opened,
    ),
)
_TABLE = tuple((re.compile(pattern), reader) for pattern, reader in _ROWS)
