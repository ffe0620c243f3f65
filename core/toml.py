"""TOML files into frozen types, with errors that name file, line and key."""

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedward.core.errors import ConfigError

_TABLE = re.compile(r"^\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_.-]+))\s*=""")
_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """One table of a file: frozen, and an unknown key is an error."""

    # Only the outermost is ever built by itself: of each of its tables, with it, and once.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


def read_toml(path: Path, kind: type[_Model]) -> _Model:
    """Read `path` as a `kind`.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown or missing, or a value is
            not allowed; the message says which line, what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(path)) from error
    except UnicodeDecodeError as error:
        raise ConfigError("is not UTF-8 text", file=str(path)) from error
    return parse_toml(text, kind, file=str(path))


def parse_toml(text: str, kind: type[_Model], *, file: str) -> _Model:
    """Read TOML text as a `kind`; `file` is what errors call it. Raises as `read_toml`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        problem = re.sub(r" \(at .*\)$", "", str(error))
        raise ConfigError(
            f"is not valid TOML: {problem}", file=file, line=int(line[1]) if line else None
        ) from error
    return build(values, kind, file=file, text=text)


def build(values: Mapping[str, Any], kind: type[_Model], *, file: str, text: str = "") -> _Model:
    """Make a `kind` of parsed values; `text` is searched for the lines of keys in errors."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(error, kind, file=file, text=text) from None


def line_of(text: str, location: tuple[str, ...]) -> int | None:
    """The line, from 1, on which a key stands: exact, or its table's, or None."""
    table_line: int | None = None
    current: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            current = tuple(part.strip(" \"'") for part in header[1].split("."))
            if current == location:
                return number
            if current == location[: len(current)]:
                table_line = number
        elif key := _KEY.match(line):
            name = tuple((key[1] or key[2] or key[3]).split("."))
            if current + name == location[: len(current) + len(name)]:
                return number
    return table_line


def name_of(location: tuple[str, ...]) -> str:
    """A key as the user writes it: `[table] key`."""
    if len(location) == 1:
        return f"[{location[0]}]"
    return f"[{'.'.join(location[:-1])}] {location[-1]}"


def in_file(error: ConfigError, file: Path) -> ConfigError:
    """An error that was found in "study", as one in the file that the user wrote, with the line."""
    if error.file != "study":
        return error
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        text = ""
    line = None
    if error.key is not None and (
        found := re.fullmatch(r"\[(.+?)\] ?([A-Za-z0-9_.-]*)", error.key)
    ):
        names = (*found[1].split("."), *([found[2]] if found[2] else []))
        line = line_of(text, names)
    return ConfigError(error.problem, file=str(file), line=line, key=error.key)


def _explain(error: ValidationError, kind: type[BaseModel], *, file: str, text: str) -> ConfigError:
    errors = error.errors(include_url=False)
    # A misspelt key is also a missing one; the misspelling is what helps.
    first = min(errors, key=lambda found: found["type"] != "extra_forbidden")
    location = tuple(str(part) for part in first["loc"])
    line = line_of(text, location)
    match first["type"]:
        case "extra_forbidden":
            allowed = _keys_beside(kind, location)
            near = difflib.get_close_matches(location[-1], allowed, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            problem = f"is not a known key; {hint}allowed: {', '.join(allowed)}"
        case "missing":
            problem = "is missing; add it"
        case "value_error":
            problem = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
        case _:
            message = first["msg"][0].lower() + first["msg"][1:]
            problem = f"= {first['input']!r} is not allowed: {message}"
    # What conflicts between sections names the keys by itself.
    key = name_of(location) if location and not problem.startswith("[") else None
    return ConfigError(problem, file=file, line=line, key=key)


def _keys_beside(kind: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    model: Any = kind
    for part in location[:-1]:
        field = model.model_fields.get(part)
        annotation = field.annotation if field else None
        choices = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return sorted(f.alias or name for name, f in model.model_fields.items())
