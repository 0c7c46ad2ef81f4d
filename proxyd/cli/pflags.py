"""Reads the flags of `proxyd run` as kube-proxy's library does: `--v=2`, `-v 2`, `-v2`, `--x=false`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from proxyd.cli.env import USAGE, CommandError
from proxyd.control.config.flags import FLAGS
from proxyd.control.config.kube_flags import ALIASES, FOREIGN
from proxyd.control.config.values import boolean

# Flags that are no settings: each has the program do something else. kube-proxy has them too.
ACTIONS: Mapping[str, Literal["value", "switch"]] = {
    "cleanup": "switch",
    "init-only": "switch",
    "write-config-to": "value",
    "version": "switch",
    "help": "switch",
}


class Given(msgspec.Struct, kw_only=True):
    """What a command line says.

    Attributes:
        settings: the value of each flag by settings field, as text; a list of texts where it is repeatable.
        foreign: the values of flags that proxyd accepts without effect, by flag name.
        actions: the values of the flags in ACTIONS, by flag name.
    """

    settings: dict[str, Any] = {}
    foreign: dict[str, list[str]] = {}
    actions: dict[str, str] = {}

    def wants(self, name: str) -> bool:
        """Whether an action that is a switch is given, and not as `=false`."""
        return self.actions.get(name, "false") != "false"


class _Option(NamedTuple):
    name: str
    kind: str  # of Flag
    field: str  # of the settings; "" where the flag is no setting


def parse(argv: Sequence[str], program: str = "proxyd run") -> Given:
    """Read a command line.

    Args:
        argv: the arguments after the command.
        program: what an error advises to call with --help.

    Raises:
        CommandError: a flag or value is wrong.
    """
    options, shorts = _options()
    given = Given()
    aliases = {alias.name: alias for alias in ALIASES}
    for option, text in _pairs(list(argv), options, shorts, program):
        if option.name in ACTIONS:
            given.actions[option.name] = _action(option, text)
        elif not option.field:
            given.foreign.setdefault(option.name, []).append(text)
        elif option.kind == "repeat":
            given.settings.setdefault(option.field, []).append(text)
        elif option.name in aliases:
            try:
                given.settings[option.field] = aliases[option.name].text(text)
            except ValueError as error:
                raise CommandError(f"--{option.name}: {error}", code=USAGE) from None
        else:
            given.settings[option.field] = text
    return given


def _action(option: _Option, text: str) -> str:
    if option.kind != "switch" or (option.name == "version" and text == "raw"):
        return text
    try:
        return str(boolean(text)).lower()
    except ValueError as error:
        raise CommandError(f"--{option.name}: {error}", code=USAGE) from None


def _options() -> tuple[dict[str, _Option], dict[str, _Option]]:
    options = {flag.name: _Option(flag.name, flag.kind, flag.field) for flag in FLAGS}
    options |= {alias.name: _Option(alias.name, alias.kind, alias.field) for alias in ALIASES}
    options |= {flag.name: _Option(flag.name, flag.kind, "") for flag in FOREIGN}
    options |= {name: _Option(name, kind, "") for name, kind in ACTIONS.items()}
    return options, {"v": options["v"], "h": options["help"]}


def _pairs(
    argv: list[str], options: Mapping[str, _Option], shorts: Mapping[str, _Option], program: str
) -> Iterator[tuple[_Option, str]]:
    at = 0
    while at < len(argv):
        argument = argv[at]
        at += 1
        if argument == "--" and at == len(argv):
            return
        if not argument.startswith("-") or argument in {"-", "--"}:
            raise CommandError(f'unexpected argument "{argument}"; see `{program} --help`', code=USAGE)
        name, equals, text = argument.partition("=")
        following = argv[at] if at < len(argv) else None
        if not argument.startswith("--"):
            option, text, taken = _short(argument, following, shorts, options, program)
            at += taken
            yield option, text
            continue
        found = options.get(name[2:].replace("_", "-"))
        if found is None:
            raise CommandError(_unknown(name, options, program), code=USAGE)
        if equals:
            yield found, text
        elif found.kind in {"switch", "count"}:
            # kube-proxy takes no second word here, but true and false can mean nothing else.
            taken = found.kind == "switch" and following in {"true", "false"}
            at += taken
            yield found, following if taken and following else "true" if found.kind == "switch" else "1"
        else:
            if following is None or following.startswith("--"):
                raise CommandError(
                    f"--{found.name}: expected one argument; see `{program} --help`", code=USAGE
                )
            at += 1
            yield found, following


def _short(
    argument: str,
    following: str | None,
    shorts: Mapping[str, _Option],
    options: Mapping[str, _Option],
    program: str,
) -> tuple[_Option, str, int]:
    """The option and value of `-v2`, `-v=2`, `-v 2`, `-v`, `-vv` or `-h`; how many more words are its own."""
    option = shorts.get(argument[1])
    rest = argument[2:].removeprefix("=")
    if option is None or (option.kind == "switch" and rest):
        raise CommandError(_unknown(argument.partition("=")[0], options, program), code=USAGE)
    if option.kind == "switch":
        return option, "true", 0
    if rest and set(rest) != {argument[1]}:
        return option, rest, 0
    if not rest and "=" not in argument and following is not None and following.isdecimal():
        return option, following, 1
    # Of proxyd alone: each v is one level more.
    return options["verbosity"], str(1 + len(rest)), 0


def _unknown(name: str, options: Mapping[str, _Option], program: str) -> str:
    word = name.lstrip("-").replace("_", "-")
    near = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    return f"unknown flag {name}; " + (f"did you mean --{near[0]}?" if near else f"see `{program} --help`")
