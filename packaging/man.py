"""The manual pages, from what the programs say of themselves: man.py DIRECTORY writes vllmd.8, vllmctl.1, vllmd.toml.5.

Commands come from argparse's own data, the configuration from vllmd.config.manual (docs/config.md): no second text.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vllmd import __version__
from vllmd.__main__ import parser, sweep_parser
from vllmd.config.manual import page
from vllmd.ctl.arguments import GLOBAL, build, visible
from vllmd.ctl.faults import EXIT_CODES

FILES_8 = {
    "/etc/vllmd/vllmd.toml": "the configuration; further files in vllmd.toml.d/ beside it",
    "/etc/vllmd/credentials/NAME": "a secret, root's alone, used in the configuration as ${credential:NAME}",
    "/run/vllmd.sock": "the control socket, for root and the members of group vllmd",
    "/var/lib/vllmd": "what is known of running models, and what was measured",
    "/var/log/vllmd": "what the models print",
    "/var/cache/vllmd": "downloaded models and compiled kernels; may be removed while vllmd is stopped",
}
OUTLIVE = """Under systemd models outlive the daemon: a crash, `systemctl restart vllmd` and an upgrade of the package leave
them serving, and the next daemon takes them over. `systemctl stop vllmd` ends them. Without systemd, SIGTERM and SIGINT
end all models, after their running requests; a second one does not wait for these. SIGHUP reads the configuration again."""


# -- roff


def plain(text: str) -> str:
    """Text that roff prints as it is."""
    text = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga").replace("^", "\\(ha")
    )
    return "\n".join("\\&" + line if line.startswith(".") else line for line in text.split("\n"))


def styled(text: str) -> str:
    """Markdown inside a line: `code` and **bold** are bold, *emphasis* is italic, [text](link) is its text."""
    parts = re.split(r"(`[^`]+`|\*\*[^*]+\*\*|\*[^*]+\*)", re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", text))
    out = []
    for part in parts:
        if part[:1] == "`" and len(part) > 1:
            out.append(f"\\fB{plain(part[1:-1])}\\fR")
        elif part[:2] == "**" and len(part) > 3:
            out.append(f"\\fB{plain(part[2:-2])}\\fR")
        elif part[:1] == "*" and len(part) > 2:
            out.append(f"\\fI{plain(part[1:-1])}\\fR")
        else:
            out.append(plain(part))
    return "".join(out).replace("\n.", "\n\\&.")


def head(name: str, section: int, summary: str) -> list[str]:
    """Title and NAME."""
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    title = f'.TH "{plain(name.upper())}" {section} "{day}" "vllmd {__version__}"'
    return [title, ".nh", ".ad l", ".SH NAME", f"{plain(name)} \\- {plain(summary)}"]


def items(rows: dict[str, str]) -> Iterator[str]:
    """A list of terms and what they are."""
    for term, text in rows.items():
        yield from (".TP", f"\\fB{plain(term)}\\fR", plain(text))


def block(text: str) -> list[str]:
    """As it stands, indented."""
    return [".PP", ".RS 4", ".nf", plain(text.rstrip()), ".fi", ".RE"]


def see_also(*others: str) -> list[str]:
    return [".SH SEE ALSO", ", ".join(f"\\fB{plain(o[:-3])}\\fR{o[-3:]}" for o in others)]


# -- argparse


def value_of(action: argparse.Action) -> str:
    """What follows an option, in italics; "" for a switch."""
    if action.nargs == 0:
        return ""
    names = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    name = f"\\fI{plain(str(names))}\\fR"
    name = f"[{name}]" if action.nargs == "?" else name + " ..." if action.nargs in ("*", "+") else name
    return f" {name}" if action.option_strings else name


def term_of(action: argparse.Action) -> str:
    return ", ".join(f"\\fB{plain(o)}\\fR" for o in action.option_strings) + value_of(action)


def own(found: argparse.ArgumentParser, besides: frozenset[str] = frozenset({"--help"})) -> list[argparse.Action]:
    """Its options and operands."""
    return [a for a in found._actions if a.help != argparse.SUPPRESS and not besides & set(a.option_strings)]


def synopsis(command: str, found: argparse.ArgumentParser, besides: frozenset[str] = frozenset({"--help"})) -> str:
    words = [
        f"[{term_of(a).split(', ')[-1]}]" if a.option_strings else value_of(a).replace(" ...", "\\ ...")
        for a in own(found, besides)
    ]
    return " ".join([f"\\fB{plain(command)}\\fR", *words])


def options(found: argparse.ArgumentParser, besides: frozenset[str] = frozenset({"--help"})) -> Iterator[str]:
    for action in own(found, besides):
        if action.option_strings:
            yield from (".TP", term_of(action), plain((action.help or "") % {"default": action.default}))


# -- pages


def vllmd_8() -> list[str]:
    root = parser()
    subs = {"sweep": sweep_parser()}
    out = [*head("vllmd", 8, "supervise vLLM models on one machine"), ".SH SYNOPSIS", synopsis("vllmd", root)]
    for name, sub in subs.items():
        out += [".br", synopsis(f"vllmd {name}", sub)]
    out += [".SH DESCRIPTION", plain(root.description or ""), ".PP"]
    out += [styled(OUTLIVE), ".SH OPTIONS", *options(root)]
    for name, sub in subs.items():
        out += [f".SH {plain(name.upper())}", plain(sub.description or ""), *options(sub)]
    out += [".SH FILES", *items(FILES_8), ".SH EXIT STATUS"]
    codes = (root.epilog or "").partition("Exit codes: ")[2].rstrip(".")
    out += items(dict(c.strip().split(" ", 1) for c in codes.split(",")))
    return [*out, *see_also("vllmctl(1)", "vllmd.toml(5)", "journalctl(1)", "systemctl(1)")]


def vllmctl_1() -> list[str]:
    shared = frozenset({"--help", *GLOBAL})
    out = [*head("vllmctl", 1, "ask and tell vllmd, the supervisor of vLLM models"), ".SH SYNOPSIS"]
    flags = (f"[{term_of(a)}]" for a in own(build("status"), shared_only(build("status"))))
    out += [" ".join(["\\fBvllmctl\\fR", *flags, "\\fICOMMAND\\fR ..."])]
    out += [".SH COMMANDS"]
    for name in visible():
        found = build(name)
        out += [".SS " + synopsis(name, found, shared), plain(found.description or ""), *options(found, shared)]
        if found.epilog:
            out += block("\n".join(line.strip() for line in found.epilog.splitlines()[1:]))
    out += [".SH OPTIONS", "Of every command:", *options(build("status"), shared_only(build("status")))]
    out += [".SH ENVIRONMENT"]
    out += items({"VLLMD_SOCKET": "as --socket", "NO_COLOR": "as --color never"})
    out += [".SH EXIT STATUS", *items({str(code): text for code, text in EXIT_CODES.items()})]
    return [*out, *see_also("vllmd(8)", "vllmd.toml(5)")]


def shared_only(found: argparse.ArgumentParser) -> frozenset[str]:
    """The flags that are a command's own."""
    return frozenset(o for a in found._actions for o in a.option_strings if o not in GLOBAL)


def vllmd_toml_5() -> list[str]:
    """docs/config.md as a manual page: headings, paragraphs, lists, code, and tables as terms with text."""
    out = [*head("vllmd.toml", 5, "configuration of vllmd"), ".SH DESCRIPTION"]
    lines = iter([*page().split("\n"), ""])
    text: list[str] = []

    def flush() -> None:
        if text:
            bullet = text[0].startswith("- ")
            body = " ".join(line.removeprefix("- ").strip() for line in text)
            out.extend([".IP \\(bu 2" if bullet else ".PP", styled(body)])
            text.clear()

    for line in lines:
        if line.startswith("```"):
            flush()
            out.extend(block("\n".join(iter(lambda: next(lines), "```"))))
        elif line.startswith("#"):
            flush()
            level, _, title = line.partition(" ")
            if len(level) > 1:  # the title of the page stands above
                out.append(f".{'SH' if len(level) == 2 else 'SS'} {styled(title)}")
        elif line.startswith("|"):
            flush()
            cells = [c.replace("\\|", "|").strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]]
            out.extend(row(cells))
        elif line.startswith("Printed from "):
            pass  # said to who edits the file
        elif not line.strip():
            flush()
        else:
            if line.startswith("- "):
                flush()
            text.append(line)
    return [*out, *see_also("vllmd(8)", "vllmctl(1)")]


def row(cells: list[str]) -> list[str]:
    """One row of a table; none for its head."""
    if not cells[0].startswith("`"):
        return []
    about = [styled(cells[-1])] if cells[-1] else []
    if len(cells) == 4:
        about.append(f"{styled(cells[1])}; default: {styled(cells[2])}.")
    return [".TP", styled(cells[0]), "\n.br\n".join(about)]


PAGES = {"vllmd.8": vllmd_8, "vllmctl.1": vllmctl_1, "vllmd.toml.5": vllmd_toml_5}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in PAGES.items():
        (folder / name).write_text("\n".join(made()) + "\n")


if __name__ == "__main__":
    main()
