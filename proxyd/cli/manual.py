"""Manual pages made from the parser: `python -m proxyd.cli.manual FOLDER` writes proxyd.1 and one a command.

Why not argparse-manpage: 4.8 was tried on this parser. It writes one page of 560 lines for all commands.
Called for one command's parser, it heads the page with a .TH line that mandoc refuses, as the name has a
space, and NAME does not say what the command is for. It cannot know kube-proxy's flags, which the parser
does not have. EXIT STATUS, FILES and SEE ALSO would have to be written beside it, in roff.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from proxyd import __version__
from proxyd.cli.grammar import Argument, Subcommand, subcommands
from proxyd.cli.pflags import ACTIONS
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.kube_flags import ALIASES, FOREIGN

_PURPOSE = "userspace service proxy for Linux nodes"
_ABOUT = (
    "proxyd reads Kubernetes Services and their endpoints, opens a listener for every address a client may "
    "use, and forwards each connection to one of the service's endpoints."
)
_KUBE_PROXY = (
    "Called by the name kube-proxy, proxyd takes that program's flags and configuration file. With --config "
    "most of its flags are ignored, as kube-proxy does; flags that only proxyd has count always. Flags may "
    "be written with _ for -."
)
_EXIT = (
    ("0", "All is well."),
    ("1", "It failed; one line on standard error says why."),
    ("2", "The command line is wrong."),
    ("3", "The configuration or a manifest is wrong."),
    ("4", "No daemon answers at the admin socket, or something else does."),
)
_FILES = (
    (
        "/run/proxyd/admin.sock",
        "Socket of the daemon of root; of other users, $XDG_RUNTIME_DIR/proxyd/admin.sock.",
    ),
    (
        "/var/lib/proxyd/state.json",
        "Allocated clusterIPs and NodePorts; of other users, ~/.local/state/proxyd/state.json.",
    ),
)
_ENVIRONMENT = (("NO_COLOR", "Where it is set, nothing is coloured."),)


def main(arguments: Sequence[str]) -> int:
    """Write the pages. Returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m proxyd.cli.manual FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
    return 0


def pages() -> dict[str, str]:
    """The pages by file name."""
    commands = subcommands()
    found = {"proxyd.1": _overview(commands), "proxyd-kube-proxy.1": _kube_proxy()}
    for command in commands:
        found[f"proxyd-{command.name}.1"] = _page(command, commands)
    return found


def _overview(commands: list[Subcommand]) -> str:
    lines = [_heading("proxyd", _PURPOSE), ".SH SYNOPSIS", ".B proxyd", r"\fICOMMAND\fR [\fIFLAGS\fR]"]
    lines += [".SH DESCRIPTION", _roff(_ABOUT), ".SH COMMANDS"]
    for command in commands:
        lines += [".TP", rf"\fBproxyd\-{_roff(command.name)}\fR(1)", _roff(_sentence(command.text))]
    lines += [
        ".SH EXIT STATUS",
        *_list(_EXIT),
        ".SH FILES",
        *_list(_FILES),
        ".SH ENVIRONMENT",
        *_list(_ENVIRONMENT),
    ]
    return "\n".join(lines) + "\n"


def _page(command: Subcommand, commands: list[Subcommand]) -> str:
    lines = [_heading(f"proxyd-{command.name}", command.text), ".SH SYNOPSIS"]
    lines += [rf".B proxyd {_roff(command.name)}", _synopsis(command)]
    lines += [".SH DESCRIPTION", _roff(_sentence(command.text))]
    explained = [argument for argument in command.positionals if argument.help]
    if explained:
        lines.append(".SH ARGUMENTS")
        for argument in explained:
            text = argument.help if argument.choices else _sentence(argument.help)
            lines += [".TP", rf"\fI{_roff(argument.metavar)}\fR", _roff(text)]
    lines.append(".SH OPTIONS")
    for argument in command.flags:
        text = argument.help if argument.choices else _sentence(argument.help)
        lines += [".TP", _flag(argument), _roff(text)]
    lines += [".SH EXIT STATUS", *_list(_EXIT), ".SH SEE ALSO"]
    others = ["proxyd", *(f"proxyd-{other.name}" for other in commands if other.name != command.name)]
    lines.append(",\n".join(rf"\fB{_roff(name)}\fR(1)" for name in others))
    return "\n".join(lines) + "\n"


def _kube_proxy() -> str:
    """The page about kube-proxy's command line."""
    lines = [_heading("proxyd-kube-proxy", "kube-proxy's command line"), ".SH SYNOPSIS"]
    lines += [".B kube\\-proxy", r"[\fIFLAGS\fR]", ".SH DESCRIPTION", _roff(_KUBE_PROXY), ".SH OPTIONS"]
    for name in ACTIONS:
        lines += [".TP", rf"\fB\-\-{_roff(name)}\fR", "As kube\\-proxy has it; see \\fBproxyd\\-run\\fR(1)."]
    texts = {flag.name: _sentence(flag.help) for flag in FLAGS if flag.kube}
    for alias in ALIASES:
        texts[alias.name] = f"Honoured: --{alias.field.replace('_', '-')} by another name."
    for flag in FOREIGN:
        told = (
            f"Warned of where it would change something: {flag.told}."
            if flag.told
            else "Accepted; no effect."
        )
        texts[flag.name] = f"Refused: {flag.told}." if flag.refused else told
    for name in sorted(texts):
        dashes = "\\-" if len(name) == 1 else "\\-\\-"
        lines += [".TP", rf"\fB{dashes}{_roff(name)}\fR", _roff(texts[name])]
    lines += [".SH EXIT STATUS", *_list(_EXIT), ".SH SEE ALSO", r"\fBproxyd\fR(1),", r"\fBproxyd\-run\fR(1)"]
    return "\n".join(lines) + "\n"


def _heading(name: str, purpose: str) -> str:
    upper = _roff(name.upper())
    # As reproducible-builds.org has it; else of today.
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    title = f'.TH {upper} 1 {date} "proxyd {__version__}" "User Commands"'
    return f"{title}\n.SH NAME\n{_roff(name)} \\- {_roff(purpose)}"


def _synopsis(command: Subcommand) -> str:
    words = [r"[\fIFLAGS\fR]"]
    for argument in command.positionals:
        choice = "|".join(argument.choices)
        word = (
            rf"\fB{_roff(choice)}\fR"
            if choice and choice == argument.metavar
            else rf"\fI{_roff(argument.metavar)}\fR"
        )
        words.append(
            f"[{word}]" if argument.optional_value else word + ("..." if argument.repeatable else "")
        )
    return " ".join(words)


def _flag(argument: Argument) -> str:
    flags = ", ".join(rf"\fB{_roff(flag)}\fR" for flag in argument.flags)
    if not argument.metavar:
        return flags
    value = rf"\fI{_roff(argument.metavar)}\fR"
    return f"{flags} [{value}]" if argument.optional_value else f"{flags} {value}"


def _list(items: Sequence[tuple[str, str]]) -> list[str]:
    return [line for name, text in items for line in (".TP", rf"\fB{_roff(name)}\fR", _roff(text))]


def _sentence(text: str) -> str:
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", ")")) else text + "."


def _roff(text: str) -> str:
    """Text that roff prints as it is."""
    text = (
        text.replace("\\", "\\e")
        .replace("-", "\\-")
        .replace("'", "\\(aq")
        .replace("~", "\\(ti")
        .replace("^", "\\(ha")
    )
    # A line that begins with a dot is a request.
    return re.sub(r"^([.])", r"\\&\1", text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
