"""`vllmctl completion SHELL`: scripts made from the table of commands, so that they cannot fall behind it.

Names of models and categories are asked of the daemon while somebody types; without one nothing is offered.
"""

from __future__ import annotations

from vllmd.ctl.arguments import GLOBAL, Command, visible
from vllmd.ctl.call import names_of, print_lines
from vllmd.ctl.faults import OK, Fault
from vllmd.ctl.words import clean, listed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vllmd.ctl.call import Call

SHELLS = ("bash", "zsh", "fish")


def run(call: Call) -> int:
    """Print the script."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[call.args.shell]())
    return OK


def models(call: Call) -> int:
    """The names of all models, one a line; none when there is no daemon to ask."""
    return _print_asked(call, names_of)


def categories(call: Call) -> int:
    """All categories, one a line."""
    return _print_asked(
        call, lambda status: sorted({clean(c) for m in listed(status, "models") for c in _list(m.get("category"))})
    )


def _print_asked(call: Call, ask: Callable[[dict[str, Any]], list[str]]) -> int:
    call.client.timeout = 2.0  # somebody has pressed Tab
    try:
        found = ask(call.status())
    except Fault:
        return OK
    print_lines(found)
    return OK


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def words(command: Command) -> list[tuple[str, str, str]]:
    """(flags joined by a comma, metavar or "", help) of every option of a command."""
    options = (command.options | GLOBAL).items()
    return [(flags, _value(option), str(option["help"])) for flags, option in options]


def _value(option: dict[str, Any]) -> str:
    if option.get("action"):
        return ""
    return str(option.get("metavar") or " ".join(option["choices"]))


def bash() -> str:
    """For bash. compgen is given words only from here and from names without spaces or shell signs."""
    cases = []
    for name, command in visible().items():
        flags = " ".join(flag for flags, _, _ in words(command) for flag in flags.split(","))
        cases.append(f"    {name}) options='{flags}'; operand='{command.operand.rstrip('?')}' ;;")
    return f"""# bash completion of vllmctl: source <(vllmctl completion bash)
_vllmctl() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command='' options='{" ".join(GLOBAL)} --help' operand='' at
  for ((at = 1; at < COMP_CWORD; at++)); do
    case "${{COMP_WORDS[at]}}" in
      --socket|--color) ((at++)) ;;
      -*) ;;
      *) command="${{COMP_WORDS[at]}}"; break ;;
    esac
  done
  case "$command" in
    '') operand=COMMAND ;;
{chr(10).join(cases)}
  esac
  case "$before" in
    --category|-c) COMPREPLY=($(compgen -W "$(vllmctl _categories 2>/dev/null)" -- "$word")); return ;;
    --color) COMPREPLY=($(compgen -W 'auto always never' -- "$word")); return ;;
    --socket) COMPREPLY=($(compgen -f -- "$word")); return ;;
  esac
  if [[ $word == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$word"))
    return
  fi
  case "$operand" in
    COMMAND) COMPREPLY=($(compgen -W '{" ".join(visible())}' -- "$word")) ;;
    MODEL|MODELS) COMPREPLY=($(compgen -W "$(vllmctl _models 2>/dev/null)" -- "$word")) ;;
    FILE) COMPREPLY=($(compgen -f -- "$word")) ;;
    SHELL) COMPREPLY=($(compgen -W '{" ".join(SHELLS)}' -- "$word")) ;;
  esac
}}
complete -F _vllmctl vllmctl"""


ZSH_VALUES = {"PATH": ":path:_files", "NAME": ":category:_vllmctl_categories"}
ZSH_OPERANDS = {
    "MODEL": "':model:_vllmctl_models'",
    "MODELS": "'*:model:_vllmctl_models'",
    "FILE": "':file:_files'",
    "SHELL": f"':shell:({' '.join(SHELLS)})'",
    "SIZE": "':size:'",
    "NAME": "':name:'",
    "": "",
}


def zsh() -> str:
    """For zsh: a file _vllmctl in $fpath, or sourced after compinit."""
    described = "\n".join(f"    '{name}:{command.summary.replace(chr(39), '')}'" for name, command in visible().items())
    cases = []
    for name, command in visible().items():
        specs = [_zsh_option(flag, value, text) for flags, value, text in words(command) for flag in flags.split(",")]
        operand = ZSH_OPERANDS[command.operand.rstrip("?")]
        cases.append(f"    {name}) _arguments {' '.join([*specs, operand]).rstrip()} ;;")
    return f"""#compdef vllmctl
# zsh completion of vllmctl: vllmctl completion zsh > "${{fpath[1]}}/_vllmctl"
_vllmctl_models() {{ local -a names; names=(${{(f)"$(vllmctl _models 2>/dev/null)"}}); compadd -a names }}
_vllmctl_categories() {{ local -a names; names=(${{(f)"$(vllmctl _categories 2>/dev/null)"}}); compadd -a names }}
_vllmctl() {{
  local -a commands
  local command
  commands=(
{described}
  )
  while (( CURRENT > 2 )) && [[ $words[2] == -* ]]; do  # global options before the command
    [[ $words[2] == (--socket|--color) ]] && {{ shift words; (( CURRENT-- )) }}
    shift words
    (( CURRENT-- ))
  done
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{chr(10).join(cases)}
  esac
}}
if [ "$funcstack[1]" = _vllmctl ]; then _vllmctl "$@"; else compdef _vllmctl vllmctl; fi"""


def _zsh_option(flag: str, value: str, text: str) -> str:
    said = text.replace("'", "").replace("[", "(").replace("]", ")").replace(":", ",")
    known = ZSH_VALUES.get(value, f":value:({value})" if " " in value else f":{value}:")
    return f"'{flag}[{said}]{known if value else ''}'"


def fish() -> str:
    """For fish."""
    lines = ["# fish completion of vllmctl: vllmctl completion fish > ~/.config/fish/completions/vllmctl.fish"]
    lines.append("complete -c vllmctl -f")
    for name, command in visible().items():
        lines.append(
            f"complete -c vllmctl -n __fish_use_subcommand -a {name} -d '{command.summary.replace(chr(39), '')}'"
        )
    for name, command in visible().items():
        here = f"complete -c vllmctl -n '__fish_seen_subcommand_from {name}'"
        for flags, value, text in words(command):
            named = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in flags.split(","))
            source = {"NAME": " -xa '(vllmctl _categories 2>/dev/null)'", "PATH": " -rF", "": ""}.get(value)
            source = source if source is not None else f" -xa '{value}'" if " " in value else " -x"
            lines.append(f"{here} {named}{source} -d '{text.replace(chr(39), '')}'")
        match command.operand.rstrip("?"):
            case "MODEL" | "MODELS":
                lines.append(f"{here} -a '(vllmctl _models 2>/dev/null)'")
            case "FILE":
                lines.append(f"{here} -F")
            case "SHELL":
                lines.append(f"{here} -a '{' '.join(SHELLS)}'")
    return "\n".join(lines)
