"""What the command line shows of privacy: a budget over time, and audits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedward.console import number, print_whole

_OUT = Console(highlight=False)
_ERR = Console(stderr=True, highlight=False)

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT = 48, 6
_COLOURS = ("cyan", "magenta", "green", "blue", "yellow", "red")


def print_ledger(value: Mapping[str, Any]) -> None:
    """A budget: by study, over time, and what is left."""
    spent, limit = value["spent"], value["limit"]
    colours = {
        study["study"]: _COLOURS[i % len(_COLOURS)] for i, study in enumerate(value["studies"])
    }
    table = Table(box=box.SIMPLE_HEAD, title=f"Ledger of {value['site']}", title_style="bold")
    mixed = any(study["unit"] != spent["unit"] for study in value["studies"])
    per = ["per"] if mixed else []  # else it stands below, with the total
    for name in ("study", "patients", "rounds", "from", "to", "epsilon", *per, "state"):
        right = name in {"rounds", "epsilon"}
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for study in value["studies"]:
        table.add_row(
            Text(study["study"][:10], style=colours[study["study"]]),
            study["population"],
            str(study["rounds"]),
            study["first"][:10],
            study["last"][:10],
            number(study["epsilon"], 3),
            *([study["unit"]] if mixed else []),
            study["state"],
        )
    print_whole(table)
    for study in value["studies"]:
        if "patient" in study:
            from fedward.privacy.units import patient_line

            means = patient_line(study["patient"])
            _OUT.print(f"{study['study'][:10]} is per site, and means {means}", soft_wrap=True)
    for line in picture(value["history"], limit=limit, colours=colours):
        _OUT.print(line)
    if spent["epsilon"] is None:
        _OUT.print(
            f"[red]a {spent['unit']}'s total: no finite epsilon; the limit is {limit:g}[/red]"
        )
    else:
        share = min(1.0, spent["epsilon"] / limit)
        full = round(30 * share)
        _OUT.print(
            f"a {spent['unit']}'s total: epsilon {spent['epsilon']:.3f} of {limit:g}  "
            f"[green]{'█' * full}[/green][dim]{'░' * (30 - full)}[/dim] {share:.0%}"
        )
    _OUT.print(
        f"delta {spent['delta']:g}, per {spent['unit']}, {spent['neighboring_relation']}, "
        f"{spent['accountant'].upper()}; RDP says {number(spent['epsilon_rdp'])}; all studies "
        "jointly",
        soft_wrap=True,
    )
    if spent.get("note"):
        _OUT.print(f"[yellow]{spent['note']}[/yellow]", soft_wrap=True)
    if spent.get("patients"):
        _print_patients(value)
    if value["simulated"]:
        _OUT.print(
            "[yellow]a simulated site: noise came from a seed, nothing here is private[/yellow]"
        )


def _print_patients(value: Mapping[str, Any]) -> None:
    """What figures per record mean for patients with several records."""
    whole = value["spent"]["patients"]
    table = Table(box=box.SIMPLE_HEAD, title="For a patient with several records")
    table.add_column("study", no_wrap=True)
    for name in ("1 record", *(f"{row['records']} records" for row in whole)):
        table.add_column(name, justify="right", no_wrap=True)
    rows = [
        (f"{study['study'][:10]} {study['population']}", study)
        for study in value["studies"]
        if "patients" in study
    ]
    for name, study in [*rows, ("all, jointly", value["spent"])]:
        figures = [study["epsilon"], *(row["epsilon"] for row in study["patients"])]
        table.add_row(name, *(number(figure, 2) for figure in figures))
    print_whole(table)
    by = sorted({row["accountant"].upper() for row in whole})
    _OUT.print(
        f"epsilon at delta {whole[0]['delta']:g}, per patient, "
        f"{whole[0]['neighboring_relation']}, {' or '.join(by)}; the column of 1 record is what "
        "the budget above counts",
        soft_wrap=True,
    )
    for note in dict.fromkeys(row["note"] for row in whole if row.get("note")):
        _OUT.print(f"[yellow]{note}[/yellow]", soft_wrap=True)


def picture(
    history: Sequence[Mapping[str, Any]], *, limit: float, colours: Mapping[str, str]
) -> list[Text]:
    """The total after each of some releases, as bars under the limit, in the studies' colours.

    Args:
        history: Points with `time`, `study` and `epsilon`, oldest first.
        limit: The top of the picture.
        colours: Of each study.

    Returns:
        Lines of text; none where nothing was released.
    """
    if not history:
        return []
    columns = [history[len(history) * i // _WIDTH] for i in range(_WIDTH)]
    heights = [
        min(_HEIGHT * 8, max(1, round(_HEIGHT * 8 * point["epsilon"] / limit))) for point in columns
    ]
    lines = []
    for level in reversed(range(_HEIGHT)):
        label = f"{limit:g}" if level == _HEIGHT - 1 else "0" if level == 0 else ""
        line = Text(f"{label:>8} │")
        for point, height in zip(columns, heights, strict=True):
            part = _EIGHTHS[min(8, max(0, height - 8 * level))]
            line.append(part, style=colours.get(point["study"], "white"))
        lines.append(line)
    first, last = (datetime.fromisoformat(history[i]["time"]).date() for i in (0, -1))
    lines.append(Text(f"{'':8} └{'─' * _WIDTH}"))
    lines.append(Text(f"{'':10}{first!s}{last!s:>{_WIDTH - 10}}", style="dim"))
    return lines


@contextlib.contextmanager
def auditing(*, quiet: bool) -> Iterator[Callable[[str], None] | None]:
    """Say which combination is audited, on standard error and only to a person."""
    if quiet or not _ERR.is_terminal:
        yield None
        return
    with _ERR.status("auditing") as status:
        yield lambda what: status.update(f"auditing {what}")


def print_conformance(value: Mapping[str, Any]) -> None:
    """Each combination with what each check found."""
    table = Table(box=box.SIMPLE_HEAD, title="Does the trainer do what its epsilon assumes?")
    table.add_column("model", no_wrap=True)
    table.add_column("clipping", no_wrap=True)
    for name in ("noise", "p", "one\nrecord", "sam-\npling", "p", "one\npatient"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for result in value["results"]:
        cells = []
        for check in result["checks"]:
            style = "" if check["passed"] else "bold red"
            cells.append(Text(f"{check['value']:.3f}", style=style))
            if check["p_value"] is not None:
                cells.append(Text(f"{check['p_value']:.2g}", style=style))
        verdict = "[green]conforms[/green]" if result["passed"] else "[bold red]FAILS[/bold red]"
        table.add_row(result["family"], result["mode"], *cells, verdict)
    _OUT.print(table)
    _OUT.print(
        "noise: its standard deviation over the calibrated one, should be 1. one record, one "
        "patient: how far they move the clipped sum over the clip norm, at most 1. sampling: how "
        "often patients took part over the charged rate, should be 1. A check with p fails below "
        f"p = {value['false_alarm']:g}, which is how often it blames a trainer that is right.",
        style="dim",
    )
    for result in value["results"]:
        for check in result["checks"]:
            if not check["passed"]:
                _OUT.print(
                    f"[red]{result['family']}, {result['mode']}: not so: {check['name']}: "
                    f"{check['detail']}[/red]"
                )
    count, verdict = len(value["results"]), "conform" if value["passed"] else "do not all conform"
    _OUT.print(f"{count} combinations {verdict}, in {value['seconds']:.0f} s")
