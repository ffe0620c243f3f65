"""Sweeps: one study over a grid of settings and seeds, in parallel, resumable, one table."""

import fcntl
import itertools
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward.core.errors import ConfigError, RunError
from fedward.core.files import write_atomic
from fedward.core.study import Study
from fedward.core.toml import build
from fedward.simulations.sweep_pool import Job, Progress, has_ended, run_jobs

Value = str | int | float | bool
_KEY = re.compile(r"[a-z_]+(\.[a-z_]+)+")


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep.

    Attributes:
        settings: What is changed, by key, the seed included.
        folder: Name of its run directory below the sweep's.
        text: Its study.
    """

    settings: Mapping[str, Value]
    folder: str
    text: str


def plan_sweep(study_file: Path, axes: Sequence[str], *, seeds: int) -> list[Point]:
    """Every run of a sweep, checked before any begins.

    Args:
        study_file: The study that is varied.
        axes: Each "table.key=value,value,...".
        seeds: How many seeds each setting is run with, from the study's own upwards.

    Raises:
        ConfigError: An axis is malformed, or a study that comes out is not allowed.
    """
    from fedward.simulations.checks import Checks

    try:
        values = tomllib.loads(study_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=str(study_file)) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"is not valid TOML: {error}", file=str(study_file)) from error
    first = build(values, Study, file=str(study_file)).study.seed
    parsed = _parse_axes(axes, seeds=[first + number for number in range(seeds)])
    points: list[Point] = []
    checks = Checks(study_file)
    for choice in itertools.product(*(options for _, options in parsed)):
        settings = dict(zip((key for key, _ in parsed), choice, strict=True))
        changed = json.loads(json.dumps(values))
        for key, value in settings.items():
            _put(changed, key, value)
        study = build(changed, Study, file=f"{study_file} with {_label(settings)}")
        checks.check(study, file=f"{study_file} with {_label(settings)}")
        points.append(Point(settings, _folder(settings), write_toml(changed)))
    if len({point.folder for point in points}) < len(points):
        raise ConfigError(
            "two values of an axis differ only in signs that no folder's name can have",
            file="--sweep",
        )
    return points


def run_sweep(
    study_file: Path,
    points: Sequence[Point],
    out: Path,
    *,
    workers: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is not done yet, each in a process of its own; then write table and picture.

    Args:
        study_file: Its folder is where paths in the study begin.
        points: From `plan_sweep`.
        out: The sweep's folder; runs that ended there are kept as they are.
        workers: Processes at a time.
        progress: Told, every second or so, how many of how many runs are done, and how many
            seconds are left at the rate so far; None before there is one.

    Returns:
        What `sweep.json` holds: a row a run, and the means over seeds.

    Raises:
        RunError: The folder cannot be used, is of another sweep, or is in use by one; or no run
            ended.
    """
    from fedward.simulations.sweep_results import collect, write_results

    with _folder_to_itself(out):
        todo = _todo(points, out)
        write_atomic(out / "points.json", json.dumps([dict(p.settings) for p in points], indent=1))
        failed = run_jobs(study_file, todo, workers=workers, progress=progress, of=len(points))
        rows = collect(points, out)
        if not rows:
            raise RunError(f"no run of the sweep ended: {next(iter(failed.values()), 'none')}")
        return write_results(rows, out, axes=_axes(points), failed=failed)


@contextmanager
def _folder_to_itself(out: Path) -> Iterator[None]:
    """A sweep's folder, which no other sweep uses meanwhile."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "sweep.lock").open("w", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{out} cannot be written: {error.strerror or error}; choose another with --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"another sweep is running in {out}; wait for it, or choose another with --out"
            ) from None
        yield


def _todo(points: Sequence[Point], out: Path) -> list[Job]:
    todo = []
    for point in points:
        folder, study = out / point.folder, out / point.folder / "study.toml"
        if study.exists() and study.read_text(encoding="utf-8") != point.text:
            raise RunError(
                f"{folder} holds a run of another study; choose another folder with --out, or "
                "delete it"
            )
        if not has_ended(folder):
            todo.append(Job(folder, point.text))
    return todo


def write_toml(values: Mapping[str, Any]) -> str:
    """A study as TOML, from JSON values."""
    return "".join(_table(values, ()))


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
    if path and (plain or not values):
        yield f"[{'.'.join(path)}]\n"
    for key, value in plain.items():
        yield f"{key} = {json.dumps(value, ensure_ascii=False)}\n"
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _table(value, (*path, key))


def _parse_axes(axes: Sequence[str], *, seeds: Sequence[int]) -> list[tuple[str, list[Value]]]:
    parsed = [_parse_axis(axis) for axis in axes]
    for key, options in parsed:
        if [name for name, _ in parsed].count(key) > 1:
            raise ConfigError(f'"{key}" is given twice; give all its values in one', file="--sweep")
        if len({(type(option), option) for option in options}) < len(options):
            raise ConfigError(f'"{key}" has a value twice', file="--sweep")
    given = [options for key, options in parsed if key == "study.seed"]
    if given and len(seeds) > 1:
        raise ConfigError('"study.seed" is what --seeds varies; give one of them', file="--sweep")
    return parsed if given else [*parsed, ("study.seed", list(seeds))]


def _parse_axis(axis: str) -> tuple[str, list[Value]]:
    key, separator, listed = axis.partition("=")
    options = [part.strip() for part in listed.split(",")]
    if not separator or not _KEY.fullmatch(key.strip()) or not all(options):
        raise ConfigError(
            f'"{axis}" is not an axis; write table.key=value,value such as privacy.epsilon=1,2,4',
            file="--sweep",
        )
    return key.strip(), [_read(option) for option in options]


def _read(text: str) -> Value:
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (int, float, bool)) else str(value)


def _put(values: dict[str, Any], key: str, value: Value) -> None:
    *tables, last = key.split(".")
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(f'"{key}": {table} is no table of the study', file="--sweep")
        values = inner
    old = values.get(last)
    # 4 for a setting that was 4.0 means 4.0.
    values[last] = float(value) if isinstance(old, float) and isinstance(value, int) else value


def _axes(points: Sequence[Point]) -> list[str]:
    return [key for key in points[0].settings if key != "study.seed"]


def _label(settings: Mapping[str, Value]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _folder(settings: Mapping[str, Value]) -> str:
    parts = [f"{key.rpartition('.')[2]}={value}" for key, value in settings.items()]
    return re.sub(r"[^A-Za-z0-9=.,_-]", "_", "_".join(parts))
