"""What the command line shows: tables and progress. Progress goes to standard error."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedward.core.run import RunDirectory
from fedward.simulations.happenings import who

_OUT = Console(highlight=False)
_ERR = Console(stderr=True, highlight=False)
_LOOK_EVERY = 0.1
_LOG_EVERY = 10.0
_WIDEST = 400
_TROUBLES_SHOWN = 10
_SITES_SHOWN = 24

Show = Callable[[str, Mapping[str, Any]], None]


@contextlib.contextmanager
def follow(run: RunDirectory, *, rounds: int, quiet: bool = False) -> Iterator[None]:
    """Show a run's progress while the block runs, read from its events, whatever the runtime."""
    if quiet or not _ERR.is_terminal:
        yield
        return
    stop = threading.Event()
    with _bar() as progress:
        task = progress.add_task("waiting for sites", total=rounds)
        watcher = threading.Thread(
            target=_watch, args=(run, progress, task, stop), daemon=True, name="progress"
        )
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()


def _bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<28}"),
        BarColumn(bar_width=36),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=_ERR,
        transient=True,
    )


def _watch(run: RunDirectory, progress: Progress, task: Any, stop: threading.Event) -> None:
    while True:
        ended = stop.is_set()
        for event in list(run.events())[-1:]:
            done = event.get("round")
            if event["event"] == "round":
                progress.update(task, completed=done, description="training")
            else:
                progress.update(task, description=event["event"])
        if ended:
            return
        time.sleep(_LOOK_EVERY)


@contextlib.contextmanager
def show_sweep(runs: int, *, quiet: bool) -> Iterator[Callable[[int, int, float | None], None]]:
    """Show a sweep's progress, with the time to its end at the rate so far.

    On a terminal a line that changes; in a log a line now and then.
    """
    if quiet:
        yield lambda _done, _of, _left: None
        return
    if not _ERR.is_terminal:
        yield _lines(_LOG_EVERY)
        return
    with _bar() as bar:
        task = bar.add_task("sweep: first runs", total=runs)

        def show(done: int, of: int, left: float | None) -> None:
            what = "sweep: first runs" if left is None else f"sweep: {_left(left)}"
            bar.update(task, completed=done, total=of, description=what)

        yield show


def _lines(every: float) -> Callable[[int, int, float | None], None]:
    said = [time.monotonic(), 0.0]

    def show(done: int, of: int, left: float | None) -> None:
        now = time.monotonic()
        if done > said[1] and left is not None and (now - said[0] > every or done == of):
            said[:] = now, float(done)
            _ERR.print(f"{done} of {of} runs{'' if done == of else f', {_left(left)}'}")

    return show


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"about {f'{hours}:{minutes:02d}' if hours else minutes}:{rest:02d} left"


def print_sweep(result: Mapping[str, Any]) -> None:
    """The table of a sweep: a row a setting, means over its seeds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = {"pooled.auroc": "AUC", "pooled.accuracy": "accuracy", "worst.auroc": "worst AUC"}
    axes = [axis.rpartition(".")[2] for axis in result["axes"]]
    for name in (*axes, "seeds", *columns.values(), "time", "ε spent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["summary"]:
        table.add_row(
            *(f"{row[axis]}" for axis in result["axes"]),
            str(row["seeds"]),
            *(f"{number(row.get(c))}±{number(row.get(f'{c} ±'))[1:]}" for c in columns),
            f"{number(row.get('seconds'), 1)} s",
            number(row["epsilon spent"], 2),
        )
    print_whole(table)
    for folder, problem in result["failed"].items():
        _say(f"failed: {folder}: {problem}", style="yellow")
    files = " ".join(sorted(file.name for file in Path(result["folder"]).glob("sweep.*[!k]")))
    _say(f"{len(result['runs'])} runs in {result['folder']}: {files}")
    _say(f"not private: {result['reason']}", style="yellow")
    if result["parquet"] is None:
        _say(
            "every metric is in sweep.csv; for sweep.parquet: pip install 'fedward[parquet]'",
            style="dim",
        )


def _say(line: str, *, style: str | None = None) -> None:
    """Print words as they are: what is in brackets is a table of a file, and no colour."""
    _OUT.print(line, style=style, markup=False, soft_wrap=True)


def print_whole(table: Table) -> None:
    """Print a table whole, even if a terminal has to wrap it."""
    widest = Measurement.get(_OUT, _OUT.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(_OUT.width, widest)).print(table)


def print_result(result: Mapping[str, Any], happened: Sequence[str] = ()) -> None:
    """The end of a run: metrics by site, epsilon, what happened, and where the release is."""
    metrics, privacy = result["metrics"], result["privacy"]
    private = privacy["mode"] != "none"
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{result['study']}: held-out patients", title_style="bold"
    )
    for name in (
        "hospital",
        "patients",
        "AUC",
        "accuracy",
        *(["epsilon spent"] if private else []),
    ):
        table.add_column(name, justify="left" if name == "hospital" else "right")
    some = list(metrics["sites"].items())
    if len(some) > _SITES_SHOWN:
        some = sorted(some, key=lambda item: item[1].get("auroc", 2.0))[:_SITES_SHOWN]
        table.title = f"{table.title}, {len(some)} worst of {len(metrics['sites'])}"
    for site, values in some:
        spent = privacy["sites"].get(site, {}).get("epsilon")
        table.add_row(
            site,
            f"{values['num_examples']:.0f}",
            number(values.get("auroc")),
            number(values.get("accuracy")),
            *([number(spent, 2)] if private else []),
        )
    table.add_section()
    table.add_row(
        "pooled",
        "",
        number(metrics["pooled"].get("auroc")),
        number(metrics["pooled"].get("accuracy")),
        style="bold",
    )
    table.add_row(
        "mean", "", number(metrics["mean"].get("auroc")), number(metrics["mean"].get("accuracy"))
    )
    _OUT.print(table)
    _OUT.print(privacy_line(privacy), soft_wrap=True)
    secure = result.get("secure_aggregation")
    if secure is not None:
        _OUT.print(
            f"secure aggregation: {secure['seconds']:.2f} s, {secure['share_of_rounds']:.0%} of "
            f"the rounds; a site sent {secure['bytes_per_site']:,} bytes "
            f"(plain updates: {secure['bytes_per_site_plain']:,})",
            soft_wrap=True,
        )
    for line in happened:
        _say(line)
    _say(f"{result['rounds']} rounds in {result['seconds']:.1f} s")
    for name, where in (
        ("run", result["run"]),
        ("report", f"{result['run']}/report.html"),
        ("release", result["release"]),
    ):
        _say(f"{name:<8} {where}")


def privacy_line(privacy: Mapping[str, Any]) -> str:
    """A privacy statement in one line, with all that an epsilon must travel with."""
    if privacy["mode"] == "none":
        return "[yellow]no privacy: trained without noise, as the study acknowledges[/yellow]"
    spent = [site["epsilon"] for site in privacy["sites"].values() if "epsilon" in site]
    line = (
        f"epsilon {max(spent, default=float('nan')):.2f} (delta {privacy['delta']:g}, per "
        f"{privacy['unit']}, {privacy['neighboring_relation']}, {privacy['accountant'].upper()})"
    )
    if privacy["unit"] == "record":
        from fedward.privacy.units import guarantees_line

        line += f"\n{guarantees_line(privacy['patients'])}"
    if privacy["unit"] == "site":
        from fedward.privacy.units import patient_line

        line += f"\n{patient_line(privacy['patient'])}"
    notes = {site["note"] for site in privacy["sites"].values() if site.get("note")}
    line += "".join(f"\n[yellow]{escape(note)}[/yellow]" for note in sorted(notes))
    if not privacy["private"]:
        line += f"\n[yellow]not private: {escape(privacy['reason'])}[/yellow]"
    return line


def number(value: float | None, digits: int = 3) -> str:
    """A figure for a table, or a dash."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"  # noqa: PLR0124 (NaN)


def print_status(value: Mapping[str, Any]) -> None:
    """How far a run is."""
    _OUT.print(f"{value['study']}: {value['state']}, round {value['round']} of {value['rounds']}")
    for line in value["happened"]:
        _say(f"  {line}")
    for trouble in value["troubles"][-_TROUBLES_SHOWN:]:
        where = who(trouble) or "run"
        when = f", round {trouble['round']}" if "round" in trouble else ""
        _say(f"  {trouble['event']}: {where}{when}: {trouble['reason']}", style="yellow")
    if len(value["troubles"]) > _TROUBLES_SHOWN:
        _OUT.print(f"  all {len(value['troubles'])} are in events.jsonl", style="dim")


def print_tasks(values: Sequence[Mapping[str, Any]]) -> None:
    """The tasks that can be studied."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "what", "models"):
        table.add_column(name)
    for value in values:
        table.add_row(value["name"], value["description"], ", ".join(value["models"]))
    _OUT.print(table)


def print_registry(value: Mapping[str, Any]) -> None:
    """What was published, and what each release promises."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("model", "version", "written", "privacy (as the folder says)"):
        table.add_column(name)
    for release in value["releases"]:
        # Plain text: a release's words are not ours, and may look like markup.
        said = Text(release["privacy"] or "does not say")
        table.add_row(release["model"], str(release["version"]), release["date"], said)
    _OUT.print(table)
    trust = "has a root of trust" if value["founded"] else "has no root of trust"
    _OUT.print(f"the registry {trust}", style="dim")


def print_site(value: Mapping[str, Any]) -> None:
    """A site whose data can be read."""
    _OUT.print(f"[bold]{value['site']}[/bold] is ready; key {value['key'][:16]}")
    for task, counts in value["tasks"].items():
        _OUT.print(f"  {task}: {counts['patients']} patients in {counts['rows']} rows")
    _OUT.print(
        f"  public size {value['public_size']}, budget epsilon {value['max_epsilon']:g}, "
        f"trains on {value['device']}"
    )


def show_demo() -> Show:
    """What the demo prints, stage by stage."""
    progress = _bar() if _ERR.is_terminal else None

    def show(stage: str, value: Mapping[str, Any]) -> None:
        if stage == "progress" and progress is not None:
            if not progress.live.is_started:
                progress.start()
            if not progress.tasks:
                progress.add_task("", total=value["total"])
            progress.update(
                progress.tasks[0].id, completed=value["done"], description=value["what"]
            )
        elif stage != "progress":
            if progress is not None:
                progress.stop()
            _SHOWS[stage](value)

    return show


def _show_hospitals(value: Mapping[str, Any]) -> None:
    _OUT.print(Panel(value["what"], title="Fedward", border_style="cyan", expand=False))
    table = Table(box=box.SIMPLE_HEAD, title="The hospitals", title_style="bold")
    for name in ("hospital", "patients", "with disease", ""):
        table.add_column(name, justify="right" if name in {"patients", "with disease"} else "left")
    for site in value["sites"]:
        share = site["prevalence"]
        filled = round(24 * share)  # readable without colours, too
        bar = f"[red]{'█' * filled}[/red][dim]{'░' * (24 - filled)}[/dim]"
        table.add_row(site["name"], str(site["patients"]), f"{share:.0%}", bar)
    _OUT.print(table)


def _show_comparison(value: Mapping[str, Any]) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Held-out patients: AUC and accuracy",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("hospital", no_wrap=True, min_width=11)
    for column in value["columns"]:
        table.add_column(column, justify="right", no_wrap=True)
    for row in value["rows"]:
        if row["name"] == "mean":
            table.add_section()
        table.add_row(row["name"], *row["cells"], style="bold" if row["name"] == "all" else "")
    _OUT.print(table)
    _OUT.print(value["caption"], style="dim", soft_wrap=True)
    _OUT.print()


def _show_release(value: Mapping[str, Any]) -> None:
    _OUT.print(
        f"[bold]Released[/bold]  {value['name']} version {value['version']}, signed: "
        f"{value['where']}",
        soft_wrap=True,
    )
    _OUT.print(privacy_line(value["privacy"]), soft_wrap=True)
    if value["drift"] is not None:
        drift = value["drift"]
        _OUT.print(
            f"drift is watched: histograms of {len(drift['fields'])} fields, each share noised by "
            f"±{100 * drift['prediction']['noise']:.1f} points, inside the epsilon above"
        )


def _show_answer(value: Mapping[str, Any]) -> None:
    fields = ", ".join(
        f"{name.replace('_', ' ')} {given}" for name, given in value["asked"].items()
    )
    answer = value["answer"]
    _OUT.print()
    _OUT.print(f"[bold]One patient, asked of the adapter at {value['url']}[/bold]")
    _OUT.print(Padding(fields, (0, 0, 0, 2)), style="dim")
    _OUT.print(
        f"  risk of heart disease [bold]{answer['probability']:.1%}[/bold]   "
        f"{answer['model']['name']} version {answer['model']['version']}"
    )
    _OUT.print(Padding(answer["privacy"], (0, 0, 0, 2)), style="dim")


def _show_end(value: Mapping[str, Any]) -> None:
    _OUT.print()
    _say(f"report  {value['report']}")
    _say(f"ledger  fedward ledger show {value['site']}")
    _OUT.print(f"done in {value['seconds']:.0f} s")


_SHOWS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "hospitals": _show_hospitals,
    "comparison": _show_comparison,
    "release": _show_release,
    "answer": _show_answer,
    "end": _show_end,
}
