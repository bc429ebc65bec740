"""The completion of the commands for bash, zsh and fish, made from their parsers.

Strategy: what a parser knows becomes a few plain values, and each shell's file is written from these. The
files are complete in themselves: TAB starts no program and opens no backup, so no qube of one is offered.

python -m tests.documents.completion_files      writes the files in completion/
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qubes_restore_svc.cli.qvm_arguments import restore_parser
from qubes_restore_svc.local.command import command_parsers
from qubes_restore_svc.watch.command import watch_parser

FOLDER = Path(__file__).resolve().parents[2] / "completion"

#: What a value is, by what the help calls it; a value with another name cannot be guessed.
_FILES, _DIRECTORIES, _UNKNOWN = "FILE", "DIR", ""


@dataclass(frozen=True)
class Option:
    """An option: how it can be written, what it is for, what value it takes (None: none)."""

    names: tuple[str, ...]
    text: str
    value: str | None
    words: tuple[str, ...]  #: all values that there are, if they are known
    repeated: bool


@dataclass(frozen=True)
class Command:
    """A command, or a subcommand: its options; a backup comes first of what is no option."""

    name: str
    text: str
    options: tuple[Option, ...]


def options_of(parser: argparse.ArgumentParser) -> tuple[Option, ...]:
    """The options of a parser that its help tells."""
    return tuple(
        Option(
            names=tuple(action.option_strings),
            text=_short(action.help or ""),
            value=_value(action) if action.nargs != 0 else None,
            words=tuple(map(str, action.choices or ())),
            repeated=type(action).__name__ in ("_AppendAction", "_CountAction"),
        )
        for action in parser._actions
        if action.option_strings and action.help != argparse.SUPPRESS
    )


def _value(action: argparse.Action) -> str:
    return str(action.metavar) if action.metavar in (_FILES, _DIRECTORIES) else _UNKNOWN


def _short(text: str) -> str:
    """The first clause of a help text."""
    return re.split(r"[;:(]|\. |, if", text)[0].strip()


def with_subcommands(parser: argparse.ArgumentParser) -> tuple[tuple[Option, ...], tuple[Command, ...]]:
    """What a command takes before a subcommand, and the subcommands."""
    (choice,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    texts = {one.dest: one.help or "" for one in choice._choices_actions}
    subcommands = (
        Command(name, _short(texts[name]), options_of(one)) for name, one in choice.choices.items()
    )
    return options_of(parser), tuple(subcommands)


def files() -> Iterator[tuple[str, str]]:
    """The files of `completion/`: name and content."""
    for shell, program in (("bash", _Bash()), ("zsh", _Zsh()), ("fish", _Fish())):
        for name, head, commands in (
            ("qubes-restore-svc", *with_subcommands(command_parsers()[0])),
            ("qubes-restore-watch", *with_subcommands(watch_parser())),
            ("qvm-backup-restore", (), (Command("", "", options_of(restore_parser())),)),
        ):
            file = f"_{name}" if shell == "zsh" else f"{name}.{shell}"
            yield file, program.text(name, head, commands)


_MADE = "Made by `python -m tests.documents.completion_files` from the parser of the command."


def _names(options: Sequence[Option], *, value: str | None = None) -> list[str]:
    """The names of the options that take this kind of value; None: all."""
    return list(dict.fromkeys(name for one in options for name in one.names if value in (None, one.value)))


def _all(commands: Sequence[Command]) -> list[Option]:
    return [option for command in commands for option in command.options]


def _of_these(words: str) -> str:
    return f'mapfile -t COMPREPLY < <(compgen -W "{words}" -- "$cur")'


def _case(names: Sequence[str], what: str) -> str:
    return f"    {' | '.join(names)})\n        {what}\n        return\n        ;;"


class _Bash:
    """Without the package bash-completion, which loads the file where it is installed."""

    def text(self, name: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
        options = [*general, *_all(commands)]
        values = [one for one in options if one.value is not None]
        words = dict.fromkeys((one.names, one.words) for one in values if one.words)
        known = {name for names, _ in words for name in names}
        unknown = [name for name in _names(values, value=_UNKNOWN) if name not in known]
        function = "_" + name.replace("-", "_")
        cases = [
            (_names(values, value=_FILES), f"{function}_files -f"),
            (_names(values, value=_DIRECTORIES), f"{function}_files -d"),
            *((list(names), _of_these(" ".join(said))) for names, said in words),
            (unknown, ":"),
        ]
        has_commands = bool(commands[0].name)
        lists = [
            f'        {command.name or "*"}) options="{" ".join(_names(command.options))}" ;;'
            for command in commands
        ]
        if has_commands:
            lists.append(f'        *) options="{" ".join(_names(general))}" ;;')
        subcommands = " ".join(command.name for command in commands)
        return "\n".join([
            f"# Completion of {name} for bash. {_MADE}",
            f"{function}_files() {{ # -f: files, -d: directories",
            "    compopt -o filenames 2>/dev/null",
            '    mapfile -t COMPREPLY < <(compgen "$1" -- "$cur")',
            "}",
            "",
            f"{function}() {{",
            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}",
            "    local word command='' options='' elsewhere='' places=0 index",
            "    COMPREPLY=()",
            "    # A word like --to=DIR comes in three parts.",
            "    if [[ $cur == = ]]; then",
            "        cur=",
            "    elif [[ $prev == = ]]; then",
            "        prev=${COMP_WORDS[COMP_CWORD - 2]}",
            "    fi",
            "    for ((index = 1; index < COMP_CWORD; index++)); do",
            "        word=${COMP_WORDS[index]}",
            "        case $word in",
            "        -d | --dest-vm) elsewhere=1 ;;&" if not has_commands else "",
            f"        {' | '.join(_names(values))})",
            "            index=$((index + 1))",
            "            if [[ ${COMP_WORDS[index]} == = ]]; then index=$((index + 1)); fi",
            "            ;;",
            "        -?*) ;;",
            "        *)",
            "            [[ $command ]] || command=$word" if has_commands else "",
            "            places=$((places + 1))",
            "            ;;",
            "        esac",
            "    done",
            "    case $prev in",
            *(_case(names, what) for names, what in cases if names),
            "    esac",
            "    case $command in",
            *lists,
            "    esac",
            "    if [[ $cur == -* ]]; then",
            f"        {_of_these('$options')}",
            *([
            "    elif [[ -z $command ]]; then",
            f"        {_of_these(subcommands)}",
            ] if has_commands else []),
            f"    elif [[ $places == {int(has_commands)} && -z $elsewhere ]]; then",
            f"        {function}_files -f",
            "    fi",
            "}",
            f"complete -F {function} {name}",
            "",
        ]).replace("\n\n        ", "\n        ")  # fmt: skip


class _Zsh:
    """For `compinit`, with the function _arguments."""

    def text(self, name: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
        lines = [f"#compdef {name}", f"# Completion of {name} for zsh. {_MADE}"]
        if not commands[0].name:
            specs = self._specs(commands[0].options)
            backup = "'1:backup:{ (( $words[(I)(-d|--dest-vm)] )) || _files }'"
            return "\n".join([*lines, *_call("_arguments -s -S", [*specs, backup, "'*:qube:()'"]), ""])
        described = [shlex.quote(f"{one.name}:{one.text}") for one in commands]
        lines += [
            "local curcontext=$curcontext state line",
            "local -a commands=(",
            *(f"    {one}" for one in described),
            ")",
            *_call("_arguments -C", [*self._specs(general), "'1: :->command'", "'*:: :->rest'"]),
            "case $state in",
            "command) _describe command commands ;;",
            "rest)",
            "    case $words[1] in",
        ]
        for one in commands:
            rest = ["'1:backup:_files'", "'*:qube:()'"]
            call = _call("_arguments -s -S", [*self._specs(one.options), *rest])
            lines += [f"    {one.name})", *(f"        {line}" for line in call), "        ;;"]
        return "\n".join([*lines, "    esac", "    ;;", "esac", ""])

    def _specs(self, options: Sequence[Option]) -> list[str]:
        return [self._spec(one) for one in options]

    def _spec(self, one: Option) -> str:
        names = one.names
        if one.value is not None:
            names = tuple(f"{name}=" if name.startswith("--") else f"{name}+" for name in names)
        before = shlex.quote("*") if one.repeated else shlex.quote(f"({' '.join(one.names)})")
        written = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
        text = one.text.replace("[", r"\[").replace("]", r"\]").replace(":", r"\:")
        value = {
            None: "",
            _FILES: ":file:_files",
            _DIRECTORIES: ":directory:_files -/",
            _UNKNOWN: f":value:({' '.join(one.words)})" if one.words else ":value: ",
        }[one.value]
        return f"{before}{written}{shlex.quote(f'[{text}]{value}')}"


def _call(program: str, words: Sequence[str]) -> list[str]:
    return [f"{program} \\", *(f"    {word} \\" for word in words[:-1]), f"    {words[-1]}"]


class _Fish:
    """Fish loads the file from vendor_completions.d."""

    def text(self, name: str, general: Sequence[Option], commands: Sequence[Command]) -> str:
        options = [*general, *_all(commands)]
        values = [one for one in options if one.value is not None]
        function = "__" + name.replace("-", "_")
        has_commands = bool(commands[0].name)
        lines = [
            f"# Completion of {name} for fish. {_MADE}",
            f"function {function}_places # how many words are no options, without the one that is written",
            "    set -l places 0",
            "    set -l value 0",
            "    for word in (commandline -opc)[2..]",
            "        if test $value = 1",
            "            set value 0",
            "            continue",
            "        end",
            "        switch $word",
            f"            case {' '.join(_names(values))}",
            "                set value 1",
            "            case -",
            "                set places (math $places + 1)",
            "            case '-*'",
            "            case '*'",
            "                set places (math $places + 1)",
            "        end",
            "    end",
            "    echo $places",
            "end",
            "",
            f"complete -c {name} -f",
        ]
        backup = f"test ({function}_places) = {int(has_commands)}"
        if has_commands:
            first = shlex.quote(f"test ({function}_places) = 0")
            lines += [f"complete -c {name} -n {first} {self._option(one)}" for one in general]
            lines += [
                f"complete -c {name} -n __fish_use_subcommand -a {one.name} -d {self._quoted(one.text)}"
                for one in commands
            ]
        else:
            backup += "; and not __fish_contains_opt -s d dest-vm"
        lines.append(f"complete -c {name} -n {shlex.quote(backup)} -F")
        for command in commands:
            seen = f"-n '__fish_seen_subcommand_from {command.name}' " if has_commands else ""
            lines += [f"complete -c {name} {seen}{self._option(one)}" for one in command.options]
        return "\n".join([*lines, ""])

    def _option(self, one: Option) -> str:
        names = " ".join(f"-l {name[2:]}" if name[:2] == "--" else f"-s {name[1:]}" for name in one.names)
        value = {
            None: "",
            _FILES: " -r -F",
            _DIRECTORIES: " -x -a '(__fish_complete_directories)'",
            _UNKNOWN: f" -x -a '{' '.join(one.words)}'" if one.words else " -x",
        }[one.value]
        return f"{names}{value} -d {self._quoted(one.text)}"

    def _quoted(self, text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, content in files():
        (FOLDER / file).write_text(content)
