"""What comes out of a sweep: a row a run, means over seeds, a table, a picture, a column file."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from fedward.core.files import write_atomic
from fedward.simulations import pictures

if TYPE_CHECKING:
    from fedward.simulations.sweep import Point

Row = dict[str, Any]

NOT_PRIVATE = "simulated runs: sampling and noise came from seeds, so they protect nobody"


def collect(points: Sequence["Point"], out: Path) -> list[Row]:
    """Every metric of every run that ended, flat: settings first, then "pooled.auroc" and so on."""
    rows = []
    for point in points:
        file = out / point.folder / "metrics.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text(encoding="utf-8"))
        row: Row = dict(point.settings)
        row |= {"run": point.folder, "seconds": result["seconds"]}
        row["private"] = bool(result["privacy"]["private"])
        row |= _flat(result["metrics"])
        spent = [site.get("epsilon") for site in result["privacy"]["sites"].values()]
        row["privacy.epsilon_spent"] = max((e for e in spent if e is not None), default=None)
        rows.append(row)
    return rows


def write_results(
    rows: Sequence[Row], out: Path, *, axes: Sequence[str], failed: Mapping[str, str]
) -> dict[str, Any]:
    """Write `sweep.json`, `sweep.csv`, `sweep.svg` and, where pyarrow is, `sweep.parquet`."""
    summary = [_summarise(group, axes) for group in _groups(rows, axes)]
    value: dict[str, Any] = {
        "runs": list(rows),
        "summary": summary,
        "failed": dict(failed),
        "axes": list(axes),
        "private": False,
        "reason": NOT_PRIVATE,
    }
    write_atomic(out / "sweep.json", json.dumps(value, indent=1) + "\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(out / "sweep.csv", text.getvalue())
    if axes:
        write_atomic(out / "sweep.svg", pictures.sweep(summary, axes=axes))
    value["parquet"] = _write_parquet(rows, names, out / "sweep.parquet")
    value["folder"] = str(out)
    return value


def _write_parquet(rows: Sequence[Row], names: Sequence[str], file: Path) -> str | None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return None
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    table = table.replace_schema_metadata({"private": "false", "reason": NOT_PRIVATE})
    parquet.write_table(table, file)
    return str(file)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Row:
    row: Row = {}
    for name, part in value.items():
        if isinstance(part, Mapping):
            row |= _flat(part, f"{prefix}{name}.")
        else:
            row[f"{prefix}{name}"] = part
    return row


def _groups(rows: Sequence[Row], axes: Sequence[str]) -> list[list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in axes), []).append(row)
    return list(groups.values())


def _summarise(group: Sequence[Row], axes: Sequence[str]) -> Row:
    """Mean and standard deviation over the seeds of one setting."""
    summary: Row = {axis: group[0][axis] for axis in axes}
    summary["seeds"] = len(group)
    for name in ("pooled.auroc", "pooled.accuracy", "mean.auroc", "worst.auroc", "seconds"):
        values = [row[name] for row in group if row.get(name) is not None]
        if values:
            summary[name] = fmean(values)
            summary[f"{name} ±"] = stdev(values) if len(values) > 1 else 0.0
    spent = [row["privacy.epsilon_spent"] for row in group if row["privacy.epsilon_spent"]]
    summary["epsilon spent"] = max(spent, default=None)
    return summary
