"""Sweeps: one study over a grid of settings and seeds, in parallel, resumable, one table."""

import itertools
import json
import multiprocessing
import os
import re
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedward.core.errors import ConfigError, RunError
from fedward.core.files import write_atomic
from fedward.core.study import Study
from fedward.core.toml import build

Value = str | int | float | bool
Progress = Callable[[int, int, float], None]
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
    try:
        values = tomllib.loads(study_file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", file=str(study_file)) from error
    first = build(values, Study, file=str(study_file)).study.seed
    parsed = [_parse_axis(axis) for axis in axes]
    parsed.append(("study.seed", [first + number for number in range(seeds)]))
    points = []
    for choice in itertools.product(*(options for _, options in parsed)):
        settings = dict(zip((key for key, _ in parsed), choice, strict=True))
        changed = json.loads(json.dumps(values))
        for key, value in settings.items():
            _put(changed, key, value)
        build(changed, Study, file=f"{study_file} with {_label(settings)}")
        points.append(Point(settings, _folder(settings), write_toml(changed)))
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
        progress: Told, as each run ends, how many of how many are done and how many seconds are
            left at the rate so far.

    Returns:
        What `sweep.json` holds: a row a run, and the means over seeds.
    """
    from fedward.simulations.sweep_results import collect, write_results

    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "points.json", json.dumps([dict(p.settings) for p in points], indent=1))
    todo = [point for point in points if not (out / point.folder / "metrics.json").exists()]
    failed = _run_all(study_file, todo, out, workers=workers, progress=progress, of=len(points))
    rows = collect(points, out)
    if not rows:
        raise RunError(f"no run of the sweep ended: {next(iter(failed.values()), 'none')}")
    return write_results(rows, out, axes=_axes(points), failed=failed)


def _run_all(
    study_file: Path,
    todo: Sequence[Point],
    out: Path,
    *,
    workers: int,
    progress: Progress | None,
    of: int,
) -> dict[str, str]:
    """Returns why the runs that failed did, by folder."""
    failed: dict[str, str] = {}
    if not todo:
        return failed
    begun, before = time.monotonic(), of - len(todo)
    # Fresh interpreters: torch's threads and a ledger's connections do not survive a fork.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        futures = {
            pool.submit(run_point, study_file, point.text, out / point.folder): point.folder
            for point in todo
        }
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                problem = future.result()
                if problem is not None:
                    failed[futures[future]] = problem
                if progress is not None:
                    # Rate so far, which knows how many cores there really were.
                    rate = (time.monotonic() - begun) / done
                    progress(before + done, of, rate * (len(todo) - done))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def run_point(study_file: Path, text: str, folder: Path) -> str | None:
    """One run of a sweep, begun or gone on with. Returns why it failed, or None."""
    import torch

    from fedward.core.errors import FedwardError
    from fedward.simulations.simulate import prepare_run, simulate

    torch.set_num_threads(1)
    # Beside the study, so that its relative paths mean the same.
    file = study_file.parent / f".{folder.name}-{os.getpid()}.toml"
    file.write_text(text, encoding="utf-8")
    try:
        begun = (folder / "study.toml").exists()
        simulate(file, prepare_run(file, folder, resume=begun))
    except FedwardError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        file.unlink(missing_ok=True)
    return None


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
        values = values.setdefault(table, {})
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
