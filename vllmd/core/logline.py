"""One line of vLLM's output taken apart: who wrote it, how serious it is, and the words.

vLLM's logger writes `(EngineCore pid=12) ERROR 11-24 01:42:29 [core.py:1] words`, each line of a traceback alike, or
JSON where told to; uvicorn writes `INFO:     words`; progress bars, warnings and uncaught tracebacks come bare.
"""

import json
import re
from dataclasses import dataclass

_RECORD = re.compile(
    r"(?:\((?P<process>[^()]*?) pid=\d+\) )?(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) "
    r"\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?(?P<text>.*)"
)
_BARE = re.compile(r"\((?P<process>[^()]*?) pid=\d+\) (?P<text>.*)")
_UVICORN = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):\s+(?P<text>.*)")


@dataclass(frozen=True, slots=True)
class LogLine:
    """`process` is vLLM's name ("APIServer", "EngineCore_DP0", "Worker_TP1"), `level` as in Python's logging; both ""
    where the line does not tell."""

    process: str
    level: str
    text: str


def parse(line: str) -> LogLine:
    """Never fails: what is no record is bare text."""
    if line.startswith("{") and (record := _from_json(line)) is not None:
        return record
    if match := _RECORD.search(line):  # search: a bar that was being drawn may stand before it
        return LogLine(match["process"] or "", match["level"], match["text"])
    if match := _BARE.match(line):
        return LogLine(match["process"], "", match["text"])
    if match := _UVICORN.match(line):
        return LogLine("", match["level"], match["text"])
    return LogLine("", "", line)


def _from_json(line: str) -> LogLine | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    if not isinstance(fields, dict) or "message" not in fields:
        return None
    process = fields.get("vllm_process_name") or fields.get("processName") or ""
    text = f"{fields['message']}\n{fields['exc_info']}" if fields.get("exc_info") else str(fields["message"])
    return LogLine(str(process), str(fields.get("levelname", "")), text)
