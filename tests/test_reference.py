"""docs/reference.md says what the code does: every key with its default, every error."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dengine import config, errors
from dengine.errors import DengineError

REFERENCE = Path(__file__).resolve().parent.parent / "docs" / "reference.md"


def rows(chapter: str) -> list[list[str]]:
    """The cells of the table in `chapter`, without its head."""
    text = REFERENCE.read_text("utf-8").split(f"\n## {chapter}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines[1:]]


def shown(default: object) -> str:
    if default is dataclasses.MISSING:
        return "required"
    return "none" if default in (None, "") else str(default)


def test_every_key_of_the_configuration_is_there_with_its_default() -> None:
    """Whoever looks a key up finds it, and leaves it out where the default is what is wanted."""
    there = {
        f"{section}.{item.name}": shown(item.default)
        for section, keys in config.SECTIONS.items()
        for item in dataclasses.fields(keys)
    }
    assert {key: default for key, default, _ in rows("Configuration")} == there


def test_every_error_is_there() -> None:
    """Whoever writes a client knows all answers."""
    there = {
        (str(item.status), item.name, str(item.code), "yes" if item.retryable else "no")
        for item in vars(errors).values()
        if isinstance(item, type) and issubclass(item, DengineError)
    }
    assert {tuple(row[:4]) for row in rows("Errors")} == there


def test_nothing_is_there_twice() -> None:
    """A key that stands twice could have two defaults."""
    for chapter in ("Configuration", "Errors"):
        named = [tuple(row[:2]) for row in rows(chapter)]
        assert len(named) == len(set(named))


def test_what_is_never_answered_is_raised_nowhere() -> None:
    """A client's author can believe the words "never answers it"."""
    unused = {row[1] for row in rows("Errors") if "never answers" in row[4]}
    classes = {name for name, item in vars(errors).items() if getattr(item, "name", "") in unused}
    assert classes == {"Forbidden"}
    source = Path(errors.__file__).parent
    for path in source.rglob("*.py"):
        assert path.name == "errors.py" or "Forbidden" not in path.read_text("utf-8"), path
