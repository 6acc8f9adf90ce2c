"""`dengine completion bash|zsh|fish`: a script for the shell, made from the parsers themselves."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

EXAMPLES = """\
examples:
  eval "$(dengine completion bash)"                                   in ~/.bashrc
  eval "$(dengine completion zsh)"                                    in ~/.zshrc, after compinit
  dengine completion fish > ~/.config/fish/completions/dengine.fish
"""
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class _Level:
    """What may follow after the commands of `path`.

    `words`: commands, options, and what a positional argument may be, each with its help.
    `after`: what may follow an option, () where it takes anything.
    """

    path: tuple[str, ...]
    words: tuple[tuple[str, str], ...]
    after: tuple[tuple[str, tuple[str, ...]], ...]


def add_command(
    add: Callable[..., argparse.ArgumentParser], whole: argparse.ArgumentParser
) -> None:
    """`whole` is the parser to complete."""
    command = add("completion", "print the completion script of a shell", EXAMPLES)
    command.add_argument("shell", choices=SHELLS)
    command.set_defaults(run=lambda args: _print(args.shell, whole))


def _print(shell: str, whole: argparse.ArgumentParser) -> int:
    levels = list(_levels(whole, ()))
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](levels), end="")
    return 0


def _levels(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[_Level]:
    words: list[tuple[str, str]] = []
    after: list[tuple[str, tuple[str, ...]]] = []
    below: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        choices = tuple(str(choice) for choice in action.choices or ())
        if isinstance(action, argparse._SubParsersAction):
            about = {a.dest: a.help or "" for a in action._choices_actions}
            words += [(name, about.get(name, "")) for name in action.choices]
            below += list(action.choices.items())
        elif action.option_strings:
            words += [(option, action.help or "") for option in action.option_strings[-1:]]
            if action.nargs != 0:
                after += [(option, choices) for option in action.option_strings]
        else:
            words += [(choice, "") for choice in choices]
    yield _Level(path, tuple(words), tuple(after))
    for name, child in below:
        yield from _levels(child, (*path, name))


_BASH = """\
_dengine() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
    local path="" word n words=""
    for ((n = 1; n < COMP_CWORD; n++)); do
        word="${COMP_WORDS[n]}"
        [ "$word" = -- ] && return
        case "$path/$word" in
@paths@
            *) ;;
        esac
    done
    case "$path $before" in
@after@
        *)
            case "$path" in
@words@
            esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o default -o bashdefault -F _dengine dengine
"""


def _cases(levels: list[_Level]) -> dict[str, str]:
    """The branches that bash and zsh share."""
    paths = [f'            {"|".join(_paths(levels))}) path="$path/$word" ;;']
    after = [
        f'        "{_joined(level.path)} {option}") words="{" ".join(choices)}" ;;'
        for level in levels
        for option, choices in level.after
    ]
    words = [
        f'                "{_joined(level.path)}") words="{" ".join(w for w, _ in level.words)}" ;;'
        for level in levels
    ]
    return {"@paths@": "\n".join(paths), "@after@": "\n".join(after), "@words@": "\n".join(words)}


def _joined(path: tuple[str, ...]) -> str:
    return "".join(f"/{name}" for name in path)


def _paths(levels: list[_Level]) -> list[str]:
    return [_joined(level.path) for level in levels if level.path]


def _filled(template: str, cases: dict[str, str]) -> str:
    for mark, text in cases.items():
        template = template.replace(mark, text)
    return template


def _bash(levels: list[_Level]) -> str:
    return _filled(_BASH, _cases(levels))


_ZSH = """\
#compdef dengine
_dengine() {
    local before="${words[CURRENT-1]}" path="" word n choices=""
    for ((n = 2; n < CURRENT; n++)); do
        word="${words[n]}"
        [[ "$word" == -- ]] && { _normal; return }
        case "$path/$word" in
@paths@
            *) ;;
        esac
    done
    case "$path $before" in
@after@
        *)
            case "$path" in
@words@
            esac ;;
    esac
    compadd -- ${=choices}
    _files
}
compdef _dengine dengine
"""


def _zsh(levels: list[_Level]) -> str:
    # `path` and `words` are special to zsh.
    cases = {mark: text.replace("words=", "choices=") for mark, text in _cases(levels).items()}
    cases["@paths@"] = cases["@paths@"].replace('path="$path/$word"', 'where="$where/$word"')
    template = _ZSH.replace('path=""', 'where=""').replace("$path", "$where")
    return _filled(template, cases)


def _fish(levels: list[_Level]) -> str:
    lines = ["complete -c dengine -e"]
    names = [level.path for level in levels]
    for level in levels:
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in level.path)
        below = " ".join(p[-1] for p in names if p[:-1] == level.path and p)
        none = f"not __fish_seen_subcommand_from {below}" if below else ""
        when = "; and ".join(part for part in (seen, none) if part)
        condition = f" -n '{when}'" if when else ""
        takes = dict(level.after)
        for word, about in level.words:
            about = about.replace("\\", "\\\\").replace("'", "\\'").replace("%%", "%")
            if word.startswith("--"):
                value = ""
                if word in takes:
                    value = f" -x -a '{' '.join(takes[word])}'" if takes[word] else " -r"
                lines.append(f"complete -c dengine{condition} -l {word[2:]}{value} -d '{about}'")
            else:
                lines.append(f"complete -c dengine{condition} -f -a {word} -d '{about}'")
    return "\n".join(lines) + "\n"
