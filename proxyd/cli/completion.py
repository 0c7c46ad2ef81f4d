"""`proxyd completion bash|zsh|fish`: completion scripts, made from the parser.

Why not shtab, which makes such scripts of any argparse parser: 1.13.0 was tried on this one. It can ask the
daemon for names too, but in zsh it completes only the first PATH of `proxyd check`; in zsh and fish it takes
the word after a flag whose value may be left out (`--tcp-splice --manifests`) for its value; in fish it
completes no file after `--manifests=`. The first two can be mended only by editing the scripts that it has
made, and every installation would need one more library.
"""

from __future__ import annotations

import argparse
import re

from proxyd.cli.env import OK, Env
from proxyd.cli.grammar import Argument, Subcommand, subcommands

# Where a command takes the name of a Service, the daemon is asked for those it serves.
_NAMES = "proxyd get services -o name 2>/dev/null"
_NAMED = frozenset({"get", "describe"})
_PROGRAM_FLAGS = {"--help": "show this help message and exit", "--version": "show the version and exit"}


def completion(args: argparse.Namespace, env: Env) -> int:
    """`proxyd completion SHELL`: the script goes to standard output."""
    make = {"bash": bash, "zsh": zsh, "fish": fish}[args.shell]
    env.stdout.write(make(subcommands()))
    return OK


def bash(commands: list[Subcommand]) -> str:
    """For bash 4 and newer; works without the package bash-completion."""
    cases = []
    for command in commands:
        flags = " ".join(flag for argument in command.flags for flag in argument.flags)
        values = [_bash_value(argument) for argument in command.flags if _takes_next_word(argument)]
        words = [word for argument in command.positionals for word in argument.choices]
        files = any(argument.files for argument in command.positionals)
        body = [
            *(['case "$previous" in', *values, "esac"] if values else []),
            f'if [[ $current == -* ]]; then words="{flags}"; return; fi',
        ]
        if words:
            body.append(f'if (( position == 1 )); then words="{" ".join(words)}"; return; fi')
        if command.name in _NAMED:
            body.append(f'if (( position == 2 )); then words="$({_NAMES})"; return; fi')
        if files:
            body.append("files=1")
        cases += [f"{command.name})", *(f"    {text}" for text in body), "    ;;"]
    return "\n".join(
        [
            "# bash completion of proxyd; put it into /usr/share/bash-completion/completions/proxyd, or",
            "# source <(proxyd completion bash)",
            "_proxyd_words() {",
            *(f"    {text}" for text in ['case "$command" in', *cases, "esac"]),
            "}",
            "_proxyd() {",
            '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local command="" words="" files="" position=0 index word',
            f'    local valued=" {" ".join(_valued(commands))} "',
            "    # The = of --output=json is a word of its own.",
            '    if [[ $current == = ]]; then current=""',
            '    elif [[ $previous == = ]]; then previous="${COMP_WORDS[COMP_CWORD-2]}"; fi',
            "    for (( index = 1; index < COMP_CWORD; index++ )); do",
            '        word="${COMP_WORDS[index]}"',
            "        if [[ ${COMP_WORDS[index+1]} == = ]]; then (( index += 2 ))",
            '        elif [[ $valued == *" $word "* ]]; then (( ++index ))',
            "        elif [[ $word != -* ]]; then",
            '            if [[ -z $command ]]; then command="$word"; fi',
            "            (( ++position ))",
            "        fi",
            "    done",
            "    if [[ -z $command ]]; then",
            f'        words="{" ".join([*(c.name for c in commands), *_PROGRAM_FLAGS])}"',
            "    else _proxyd_words; fi",
            "    COMPREPLY=()",
            '    if [[ -n $words ]]; then mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current"); fi',
            "    if [[ -n $files ]]; then",
            "        compopt -o filenames 2>/dev/null",
            '        mapfile -t COMPREPLY < <(compgen -f -- "$current")',
            "    fi",
            "}",
            "complete -F _proxyd proxyd",
            "",
        ]
    )


def _takes_next_word(argument: Argument) -> bool:
    return bool(argument.metavar) and not argument.optional_value


def _valued(commands: list[Subcommand]) -> list[str]:
    """The flags whose value is the next word. A flag means the same in every command that has it."""
    flags = (argument for command in commands for argument in command.flags)
    return sorted({flag for one in flags if _takes_next_word(one) for flag in one.flags})


def _bash_value(argument: Argument) -> str:
    pattern = "|".join(argument.flags)
    if argument.choices:
        return f'    {pattern}) words="{" ".join(argument.choices)}"; return ;;'
    return f"    {pattern}) files=1; return ;;" if argument.files else f"    {pattern}) return ;;"


def zsh(commands: list[Subcommand]) -> str:
    """For zsh 5 and newer."""
    cases = []
    for command in commands:
        specs = [_zsh_flag(argument) for argument in command.flags]
        for number, argument in enumerate(command.positionals, 1):
            place = "*" if argument.repeatable else str(number)
            specs.append(_quoted(f"{place}:{_plain(argument.metavar)}:{_zsh_action(argument, command)}"))
        cases += [f"    {command.name})", "        _arguments -s \\"]
        cases += [f"            {spec} \\" for spec in specs[:-1]]
        cases += [f"            {specs[-1]}", "        ;;"]
    listed = [f"        {_quoted(f'{command.name}:{_plain(command.text)}')}" for command in commands]
    program_flags = " ".join(_quoted(f"{flag}:{text}") for flag, text in _PROGRAM_FLAGS.items())
    return "\n".join(
        [
            "#compdef proxyd",
            "# zsh completion of proxyd; put it into a folder of $fpath as _proxyd, or",
            "# source <(proxyd completion zsh)",
            "_proxyd_services() {",
            f'    local -a names=(${{(f)"$({_NAMES})"}})',
            "    compadd -a names",
            "}",
            "_proxyd() {",
            "    local -a commands=(",
            *listed,
            "    )",
            "    if (( CURRENT == 2 )); then",
            "        _describe command commands",
            f"        local -a flags=({program_flags})",
            "        [[ $PREFIX == -* ]] && _describe -o flag flags",
            "        return",
            "    fi",
            "    local command=$words[2]",
            "    shift words",
            "    (( CURRENT-- ))",
            "    case $command in",
            *cases,
            "    esac",
            "}",
            'if [[ $funcstack[1] == _proxyd ]]; then _proxyd "$@"; else compdef _proxyd proxyd; fi',
            "",
        ]
    )


def _zsh_flag(argument: Argument) -> str:
    text = re.sub(r"([\[\]:])", r"\\\1", _plain(argument.help))
    value = f":{_plain(argument.metavar)}:{_zsh_action(argument)}" if argument.metavar else ""
    if value and argument.optional_value:
        value = ":" + value
    star = "*" if argument.repeatable else ""
    others = "" if argument.repeatable else f"({' '.join(argument.flags)})"
    # Of a long flag the value may also stand behind a = in the same word.
    names = [flag + "=" * (bool(value) and flag.startswith("--")) for flag in argument.flags]
    return " ".join(_quoted(f"{others}{star}{name}[{text}]{value}") for name in names)


def _zsh_action(argument: Argument, command: Subcommand | None = None) -> str:
    if argument.choices:
        return f"({' '.join(argument.choices)})"
    if argument.files:
        return "_files"
    return "_proxyd_services" if command and command.name in _NAMED else " "


def fish(commands: list[Subcommand]) -> str:
    """For fish 3 and newer."""
    lines = [
        "# fish completion of proxyd; put it into ~/.config/fish/completions/proxyd.fish, or",
        "# proxyd completion fish | source",
        "complete -c proxyd -f",
        "# Is this the command, and are there so many words that are neither flags nor their values?",
        "function __proxyd_at --argument-names command words",
        f"    set -l valued {' '.join(_valued(commands))}",
        "    set -l plain",
        "    set -l value 0",
        "    for word in (commandline -opc)",
        "        if test $value -eq 1",
        "            set value 0",
        "        else if contains -- $word $valued",
        "            set value 1",
        "        else if not string match -q -- '-*' $word",
        "            set -a plain $word",
        "        end",
        "    end",
        '    test "$plain[2]" = "$command"; and test -z "$words" -o (count $plain) -eq "$words"',
        "end",
    ]
    none = """complete -c proxyd -n '__proxyd_at ""'"""
    lines += [f"{none} -a {c.name} -d {_quoted(_plain(c.text))}" for c in commands]
    lines += [f"{none} -l {flag[2:]} -d {_quoted(text)}" for flag, text in _PROGRAM_FLAGS.items()]
    for command in commands:
        start = f"complete -c proxyd -n '__proxyd_at {command.name}'"
        for number, argument in enumerate(command.positionals, 2):
            here = start
            if not argument.repeatable:
                here = f"complete -c proxyd -n '__proxyd_at {command.name} {number}'"
            if argument.choices:
                lines.append(f"{here} -a {_quoted(' '.join(argument.choices))}")
            elif argument.files:
                lines.append(f"{here} -F")
            elif command.name in _NAMED:
                lines.append(f"{here} -a {_quoted(f'(type -q proxyd; and {_NAMES})')}")
        for argument in command.flags:
            names = [
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in argument.flags
            ]
            value = ""
            if argument.choices:
                value = f" -x -a {_quoted(' '.join(argument.choices))}"
            elif _takes_next_word(argument):
                value = " -r -F" if argument.files else " -x"
            lines.append(f"{start} {' '.join(names)}{value} -d {_quoted(_plain(argument.help))}")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Without the default, and on one line."""
    return re.sub(r" \(default: .*\)$", "", text)


def _quoted(text: str) -> str:
    """In single quotes, for any of the shells."""
    return "'" + text.replace("'", "'\\''") + "'"
