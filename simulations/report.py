"""`report.html`: one page about a run, without a request to anywhere."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedward.core.errors import RunError
from fedward.core.files import write_atomic
from fedward.core.run import RunDirectory
from fedward.core.study import load_study
from fedward.privacy.accounting import dp_sgd_event, privacy_spent
from fedward.simulations import pictures
from fedward.simulations.happenings import Happened, in_html, who

_TROUBLES_SHOWN = 200
_MANY_SITES = 24

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1f2a37;
  background: #f8fafb; margin: 0; }}
main {{ max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }}
h1 {{ font-size: 1.7rem; margin: 0; }}
h2 {{ font-size: 1.1rem; margin: 2.4rem 0 .6rem; }}
svg {{ max-width: 100%; height: auto; display: block; margin: 0 auto; }}
.sub {{ color: #6b7280; margin: .2rem 0 1.6rem; }}
.cards {{ display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); }}
.card, .panel, pre {{ background: #fff; border: 1px solid #e5e7eb; border-radius: .6rem;
  padding: .8rem 1rem; overflow-x: auto; }}
.card b {{ display: block; font-size: 1.45rem; line-height: 1.3; }}
.card span {{ color: #6b7280; font-size: .82rem; }}
.note {{ border-left: 4px solid #b45309; background: #fffbeb; padding: .6rem 1rem;
  margin: 1.2rem 0; border-radius: 0 .4rem .4rem 0; }}
.pair {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); }}
.pair h2 {{ margin-top: 0; }}
table {{ border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .38rem .6rem; border-bottom: 1px solid #eef0f3;
  white-space: nowrap; }}
th {{ color: #6b7280; font-weight: 600; }}
th:first-child, td:first-child {{ text-align: left; }}
tr.strong td {{ font-weight: 600; }}
pre {{ font-size: .82rem; line-height: 1.45; }}
details summary {{ cursor: pointer; color: #0f766e; margin: .8rem 0; }}
.small {{ color: #6b7280; font-size: .85rem; white-space: pre-line; }}
</style>
<main>
{body}
</main>
</html>
"""


def write_report(run: RunDirectory) -> Path:
    """Write `report.html` into a finished run's folder.

    Raises:
        RunError: The run has no result yet.
    """
    path = run.path / "report.html"
    write_atomic(path, _page(run, comparison=None))
    return path


def write_demo_report(folder: Path, run: RunDirectory, comparison: Mapping[str, Any]) -> Path:
    """Write the demo's `report.html`: the private run beside what it is compared with."""
    path = folder / "report.html"
    write_atomic(path, _page(run, comparison=comparison))
    return path


def _page(run: RunDirectory, *, comparison: Mapping[str, Any] | None) -> str:
    metrics = run.read_json("metrics.json")
    manifest = run.read_json("manifest.json")
    study = load_study(run.path / "study.toml")
    privacy = metrics["privacy"]
    about = (
        f"{study.study.task}, {len(metrics['metrics']['sites'])} hospitals, "
        f"{study.study.rounds} rounds in {metrics['seconds']:.1f} s"
    )
    body = [f"<h1>{_e(study.study.name)}</h1>", f'<p class="sub">{_e(about)}</p>', _cards(metrics)]
    if not privacy["private"]:
        body.append(f'<p class="note"><b>Not private.</b> {_e(privacy["reason"])}.</p>')
    results = comparison["results"] if comparison else {study.study.name: metrics["metrics"]}
    body.append(f'<div style="margin-top:.8rem">{_quality(results)}</div>')
    if comparison is not None:
        body.append(_comparison(comparison))
    else:
        body += [_sites(metrics), _simulated(run, metrics)]
    body.append(_pair(run, privacy))
    if privacy["mode"] != "none":
        body.append(_statement(privacy))
    body.append(_events(run))
    body.append("<h2>To repeat it</h2>")
    versions = ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())
    body.append(
        f'<p class="small">study hash {_e(manifest["study_hash"])}\n'
        f"seed {manifest['seed']}, runtime {_e(manifest['runtime'])}, "
        f"Python {_e(manifest['python'])}\n{_e(versions)}</p>"
    )
    text = (run.path / "study.toml").read_text(encoding="utf-8")
    body.append(f"<details><summary>study.toml</summary><pre>{_e(text)}</pre></details>")
    return _PAGE.format(title=_e(f"{study.study.name}: report"), body="\n".join(body))


def _cards(metrics: Mapping[str, Any]) -> str:
    measured, privacy = metrics["metrics"], metrics["privacy"]
    worst = measured["worst"]
    cards = [
        (_f(measured["pooled"].get("auroc")), "AUC, all held-out patients"),
        (_f(measured["mean"].get("auroc")), "AUC, mean of hospitals"),
        (_f(worst.get("auroc")), f"worst hospital: {worst.get('site', '–')}"),
    ]
    spent = [site["epsilon"] for site in privacy["sites"].values() if "epsilon" in site]
    if spent:
        cards.append(
            (_f(max(spent), 2), f"epsilon, delta {privacy['delta']:g}, per {privacy['unit']}")
        )
    else:
        cards.append(("none", "privacy"))
    cells = "".join(
        f'<div class="card"><b>{_e(value)}</b><span>{_e(label)}</span></div>'
        for value, label in cards
    )
    return f'<div class="cards">{cells}</div>'


def _comparison(comparison: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in ["hospital", *comparison["columns"]])
    rows = "".join(
        f"<tr{' class=strong' if row['name'] == 'all' else ''}><td>{_e(row['name'])}</td>"
        + "".join(f"<td>{_e(cell)}</td>" for cell in row["cells"])
        + "</tr>"
        for row in comparison["rows"]
    )
    return (
        f'<h2>AUC and accuracy on held-out patients</h2><div class="panel"><table><tr>{head}</tr>'
        f'{rows}</table></div><p class="small">{_e(comparison["caption"])}</p>'
    )


def _sites(metrics: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_e(site)}</td><td>{values['num_examples']:.0f}</td>"
        f"<td>{_f(values.get('auroc'))}</td><td>{_f(values.get('accuracy'))}</td></tr>"
        for site, values in metrics["metrics"]["sites"].items()
    )
    table = (
        "<table><tr><th>hospital</th><th>held-out patients</th><th>AUC</th>"
        f"<th>accuracy</th></tr>{rows}</table>"
    )
    shown = _folded(table, len(metrics["metrics"]["sites"]))
    return f'<div class="panel" style="margin-top:.8rem">{shown}</div>'


def _folded(table: str, hospitals: int) -> str:
    """A table with a row a hospital; closed where they are many."""
    if hospitals <= _MANY_SITES:
        return table
    return f"<details><summary>{hospitals} hospitals</summary>{table}</details>"


def _quality(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A dot a hospital or, where they are many, how many have which figure."""
    first = next(iter(results.values()))["sites"]
    if len(first) > _MANY_SITES:
        return _panel("Quality of the hospitals", pictures.spread_of_hospitals(first))
    return _panel("Quality at each hospital", pictures.auc_by_hospital(results))


def _simulated(run: RunDirectory, metrics: Mapping[str, Any]) -> str:
    """What only a simulation has: its learning curve, and who has which patients."""
    parts = []
    if len(metrics.get("curve", ())) > 1:
        parts.append(_panel("Learning", pictures.learning(metrics["curve"])))
    card = run.path / "partition.svg"
    if card.is_file():
        parts.append(_panel("Patients of each hospital", card.read_text(encoding="utf-8")))
    return "".join(f'<div style="margin-top:.8rem">{part}</div>' for part in parts)


def _pair(run: RunDirectory, privacy: Mapping[str, Any]) -> str:
    try:
        evaluation = run.read_json("evaluation.json")
    except RunError:
        evaluation = {}
    parts = []
    histograms = [site["histogram"] for site in evaluation.values() if "histogram" in site]
    if histograms:
        total = [
            [sum(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*histograms, strict=True)
        ]
        parts.append(_panel("Calibration", pictures.calibration(total)))
    asked = privacy.get("asked_epsilon")
    if asked is not None:
        rounds, curves = _epsilon_curves(run, privacy)
        if rounds:
            parts.append(_panel("Privacy spent", pictures.budget(rounds, curves, asked)))
    return f'<div class="pair" style="margin-top:.8rem">{"".join(parts)}</div>' if parts else ""


def _epsilon_curves(
    run: RunDirectory, privacy: Mapping[str, Any]
) -> tuple[list[int], dict[str, list[float]]]:
    events = list(run.events())
    done = max((e["round"] for e in events if e["event"] == "round"), default=0)
    if not done:
        return [], {}
    marks = sorted({max(1, round(done * share / 8)) for share in range(1, 9)} | {1})
    away = Happened.of(events).away
    curves = {}
    for site, statement in privacy["sites"].items():
        per_round = statement["steps"] // done
        # Whoever was away paid nothing; late or crashed sites had paid already.
        curves[site] = [
            min(statement["epsilon"], _spent(privacy, statement, steps=per_round * paid))
            for paid in (
                mark - sum(number <= mark for number in away.get(site, ())) for mark in marks
            )
        ]
        # The ledger's figure: it counts what was released after the last round, too.
        curves[site].append(statement["epsilon"])
    return [*marks, done], curves


def _spent(privacy: Mapping[str, Any], statement: Mapping[str, Any], *, steps: int) -> float:
    if steps < 1:
        return 0.0
    event = dp_sgd_event(
        noise_multiplier=statement["noise_multiplier"],
        sample_rate=statement["sample_rate"],
        steps=steps,
    )
    return privacy_spent(event, delta=privacy["delta"], unit=privacy["unit"]).epsilon


def _statement(privacy: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{_e(site)}</td><td>{_f(s['epsilon'], 3)}</td><td>{_f(s['epsilon_rdp'], 3)}</td>"
        f"<td>{s['noise_multiplier']:.3f}</td><td>{s['sample_rate']:.3g}</td><td>{s['steps']}</td></tr>"
        for site, s in privacy["sites"].items()
    )
    head = (
        "<table><tr><th>hospital</th><th>epsilon (PLD)</th><th>epsilon (RDP)</th>"
        "<th>noise multiplier</th><th>sample rate</th><th>steps asked for</th></tr>"
    )
    histograms = [s["monitor"] for s in privacy["sites"].values() if "monitor" in s]
    included = (
        "Both include one release of histograms for drift (noise multiplier "
        f"{histograms[0]['noise_multiplier']:.3f}). "
        if histograms
        else ""
    )
    moves = (
        " at first, then each hospital's own, which follows a noised quantile (the noise "
        "multiplier is that of gradients and counts together)"
        if privacy.get("clipping") == "adaptive"
        else ""
    )
    held_out = (
        "No metrics left a hospital: the figures above are this simulation's own."
        if privacy["unit"] == "site"
        else "Held-out patients are covered at the same epsilon by noise on the metrics that the "
        "hospitals report."
    )
    return (
        '<h2>Privacy statement</h2><div class="panel">'
        + _folded(f"{head}{rows}</table>", len(privacy["sites"]))
        + "</div>"
        f'<p class="small">delta {privacy["delta"]:g}, per {_e(privacy["unit"])}, '
        f"{_e(privacy['neighboring_relation'])}, clip norm {privacy['clip_norm']:g}{moves}. Both "
        f"figures are upper bounds; the one by PLD is claimed. {included}Holds against "
        f"{_e(privacy['adversary'])}. {held_out}</p>"
        + _notes(privacy)
        + _patients(privacy)
        + _inside(privacy)
        + _adversaries(privacy)
    )


def _notes(privacy: Mapping[str, Any]) -> str:
    """What a reader of the two figures has to know, such as that PLD is the larger."""
    return "".join(
        f'<p class="note">{_e(site)}: {_e(statement["note"])}.</p>'
        for site, statement in privacy["sites"].items()
        if statement.get("note")
    )


def _patients(privacy: Mapping[str, Any]) -> str:
    """What figures per record mean for patients with several records."""
    if privacy["unit"] != "record" or not privacy["patients"]:
        return ""
    head = "".join(f"<th>{row['records']} records</th>" for row in privacy["patients"])
    rows = ""
    for site, statement in privacy["sites"].items():
        figures = [statement, *statement.get("patients", ())]
        cells = "".join(
            f"<td>{'no bound' if row['epsilon'] is None else _f(row['epsilon'], 2)}"
            f"{'' if row['accountant'] == 'pld' else ' (RDP)'}</td>"
            for row in figures
        )
        rows += f"<tr><td>{_e(site)}</td>{cells}</tr>"
    first = privacy["patients"][0]
    return (
        '<h3>For a patient with several records</h3><div class="panel"><table><tr>'
        f"<th>hospital</th><th>1 record</th>{head}</tr>{rows}</table></div>"
        f'<p class="small">epsilon by {_e(first["accountant"].upper())}, delta '
        f"{first['delta']:g}, per patient, {_e(first['neighboring_relation'])}: what the guarantee "
        "per record means for a patient of whom the hospital has so many.</p>"
    )


def _inside(privacy: Mapping[str, Any]) -> str:
    """What figures per site mean for a patient of one."""
    if privacy["unit"] != "site":
        return ""
    from fedward.privacy.units import patient_line

    return f'<p class="note">{_e(patient_line(privacy["patient"]))}.</p>'


def _adversaries(privacy: Mapping[str, Any]) -> str:
    against = privacy.get("adversaries", ())
    if not against:
        return ""
    # What a unit's epsilon means for a patient, where the unit is another one.
    more = [f"patient with {row['records']} records" for row in against[0].get("patients", ())]
    more += ["patient"] if "patient" in against[0] else []
    rows = ""
    for row in against:
        inside = [*row.get("patients", ()), *([row["patient"]] if "patient" in row else [])]
        cells = "".join(
            f"<td>{_f(one['epsilon'], 3) if one['epsilon'] is not None else 'no promise'}</td>"
            for one in (row, *inside)
        )
        rows += f"<tr><td>{_e(row['who'])} and {row['colluders']} sites</td>{cells}</tr>"
    head = "".join(f"<th>per {_e(name)}</th>" for name in more)
    return (
        '<div class="panel"><table><tr><th>who works together</th>'
        f"<th>epsilon at most, per {_e(privacy['unit'])}</th>{head}</tr>{rows}</table></div>"
    )


def _events(run: RunDirectory) -> str:
    events = list(run.events())
    happened = Happened.of(events)
    return in_html(happened) + _troubles(events, happened)


def _troubles(events: Sequence[Mapping[str, Any]], happened: Happened) -> str:
    told = {
        "refused", "failed", "suspect", "void group", "not evaluated", "release not accepted",
        "aborted", "retried",
    }  # fmt: skip
    troubles = [e for e in events if e["event"] in told and not happened.explains(e)]
    if not troubles:
        return ""
    items = "".join(
        f"<tr><td>{_e(event['event'])}</td><td>{_e(str(event.get('round', '')))}</td>"
        f"<td>{_e(who(event))}</td>"
        f'<td style="text-align:left;white-space:normal">{_e(str(event["reason"]))}</td></tr>'
        for event in troubles[:_TROUBLES_SHOWN]
    )
    more = len(troubles) - _TROUBLES_SHOWN
    note = f'<p class="small">and {more} more, in events.jsonl</p>' if more > 0 else ""
    return (
        f'<h2>What went wrong on the way</h2><div class="panel"><table>{items}</table></div>{note}'
    )


def _panel(title: str, picture: str) -> str:
    return f'<div class="panel"><h2 style="margin-top:0">{_e(title)}</h2>{picture}</div>'


def _f(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _e(text: str) -> str:
    return html.escape(str(text))
