"""One checker for settings that come from files: config files, dataset files and webhook files.

Errors are ValueErrors of one sentence, which names the file, the key, its value and the rule.
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Key:
    """What a key's value may be: of a type, or one of some strings; a number may have a least value."""

    kind: type | tuple[str, ...]
    least: float | None = None


def read_json(path: Path, kind: type | tuple[type, ...] = dict):
    """The content of a JSON file, which must be an object or, where `kind` says so, a list."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: must be a JSON object" + " or a list" * (kind is not dict))
    return content


def check_settings(settings: dict, keys: Mapping[str, Key], where: str):
    """Every key must be known, and its value what the key takes."""
    for key, value in settings.items():
        if key not in keys:
            raise unknown_key(key, keys, where)
        check_value(key, value, keys[key], where)


def check_value(key: str, value, wanted: Key, where: str):
    kind = wanted.kind
    if isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{where}: {key} is {value!r}, and must be one of {', '.join(kind)}")
    elif not has_type(value, kind):
        raise ValueError(f"{where}: {key} is {value!r}, and must be of type {kind.__name__}")
    elif wanted.least is not None and not value >= wanted.least:  # also NaN
        raise ValueError(f"{where}: {key} is {value!r}, and must be at least {wanted.least:g}")


def has_type(value, kind: type) -> bool:
    """Whether JSON's value is of this type: a boolean is no number, and an integer may stand for a float."""
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def not_supported(where: str, what: str, instead: str = "") -> ValueError:
    return ValueError(f"{where}: {what}: not supported" + (f", use {instead}" if instead else ""))


def unknown_key(key: str, known: Iterable[str], where: str) -> ValueError:
    near = nearest(key, known)
    return ValueError(f"{where}: unknown key {key!r}" + (f", did you mean {near!r}?" if near else ""))


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key of which this one must be a slip of the pen: by two letters, or by one where it is short."""
    near = [name for name in difflib.get_close_matches(key, known) if edits(key, name) <= (1 if len(key) < 8 else 2)]
    return near[0] if near else None


def edits(one: str, other: str) -> int:
    """Letters to insert, delete, replace or exchange with their neighbour, to make one word of the other."""
    before, last = [], list(range(len(other) + 1))
    for i, a in enumerate(one):
        row = [i + 1]
        for j, b in enumerate(other):
            row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (a != b)))
            if i and j and (a, one[i - 1]) == (other[j - 1], b):
                row[-1] = min(row[-1], before[j - 1] + 1)
        before, last = last, row
    return last[-1]
