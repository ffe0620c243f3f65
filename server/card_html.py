"""The model card as one page that asks nothing of a network."""

from collections.abc import Mapping
from html import escape
from typing import Any

from fedward.core.fields import ModelSignature

_STYLE = """
:root{color-scheme:light;--ink:#1c2733;--soft:#5b6875;--line:#dfe5ea;--accent:#0b6e69}
*{box-sizing:border-box}
body{margin:0;background:#f4f6f8;color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:2rem auto;padding:0 1rem}
header,section{background:#fff;border:1px solid var(--line);border-radius:10px;
padding:1.2rem 1.6rem;margin-bottom:1rem}
h1{margin:0;font-size:1.7rem}h2{margin:0 0 .6rem;font-size:1.1rem;color:var(--accent)}
p{margin:.4rem 0}.soft{color:var(--soft)}
.promise{border-left:6px solid var(--accent)}.none{border-left:6px solid #b3261e}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.bar{display:block;background:#e3ebeb;border-radius:4px;height:.6rem;width:9rem;margin-top:.45rem}
.bar i{display:block;background:var(--accent);border-radius:4px;height:100%}
dl{display:grid;grid-template-columns:12rem 1fr;gap:.3rem 1rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}ul{margin:.3rem 0;padding-left:1.2rem}
h3{margin:.8rem 0 .3rem;font-size:.97rem}
.chart{display:flex;gap:2rem;align-items:center;flex-wrap:wrap}
svg text{font:11px system-ui;fill:#5b6875}
@media(max-width:40rem){dl{grid-template-columns:1fr}}
"""


def card_html(card: Mapping[str, Any], signature: ModelSignature) -> str:
    """The card as one page that asks nothing of a network."""
    privacy = card["privacy"]
    mood = "promise" if privacy["private"] else "none"
    title = f"{escape(card['name'])}, version {card['version']}"
    use, warnings, release = card["intended_use"], card["warnings"], card["release"]
    outcome = escape(card["outcome"])
    released = {"version": card["version"], **release, **_who(card["developer"])}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>
<body><main>
<header><h1>{title}</h1><p class="soft">Model card. Probability of: {outcome}.</p>
<p>{escape(card["summary"])}</p>{_facts(released)}</header>
<section class="{mood}"><h2>Privacy</h2><p><strong>{escape(privacy["statement"])}</strong></p>
<p>Mechanism: {escape(privacy["mechanism"])}.</p>
<p class="soft">Not covered: {escape("; ".join(privacy["not_covered"]))}.</p></section>
<section><h2>Intended use</h2><p>{escape(use["use"])}</p><p>{escape(use["users"])}</p>
<p>Patients: {escape(use["population"])}.</p><p>{escape(use["how"])}</p>
<p>Not for: {escape("; ".join(use["out_of_scope"]))}.</p></section>
<section><h2>Warnings</h2>{_list(card["limits"])}{_facts(warnings)}</section>
<section><h2>How well it did</h2>{_evaluation_html(card["evaluation"])}</section>
<section><h2>Calibration</h2>{_calibration(card["evaluation"])}</section>
<section><h2>Subgroups</h2>{_subgroups(card["evaluation"])}</section>
<section><h2>Watching it</h2><p>{escape(card["monitoring"]["drift"].capitalize())}.</p>
{_facts(card["monitoring"]["reference"] or {})}</section>
<section><h2>System facts</h2>{_facts(card["facts"])}</section>
<section><h2>Forms</h2>{_forms(card["forms"])}</section>
<section><h2>Inputs</h2>{_inputs(signature)}</section>
<section><h2>Training</h2>{_facts(card["training"])}</section>
</main></body></html>
"""


def _evaluation_html(evaluation: Mapping[str, Any]) -> str:
    rows = [("All sites, pooled", evaluation["pooled"]), ("Mean of sites", evaluation["mean"])]
    rows += sorted(evaluation["sites"].items())
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        return "<p>No evaluation was recorded.</p>"
    hidden = evaluation["suppressed"]
    note = ""
    if hidden["sites"]:
        note = f" Not shown ({escape(hidden['because'])}): {escape(', '.join(hidden['sites']))}."
    return f'{_figures(rows)}<p class="soft">Measured on {escape(evaluation["on"])}.{note}</p>'


def _figures(rows: list[tuple[str, Mapping[str, Any]]]) -> str:
    body = "".join(
        f"<tr><td>{escape(name)}</td>{_score(values.get('auroc'))}"
        + "".join(_figure(values.get(key)) for key in ("accuracy", "brier", "prevalence"))
        + f"{_count(values.get('num_examples'))}</tr>"
        for name, values in rows
    )
    return (
        "<table><thead><tr><th></th><th class='n'>AUROC</th><th></th><th class='n'>Accuracy</th>"
        "<th class='n'>Brier</th><th class='n'>Prevalence</th>"
        f"<th class='n'>Patients held out</th></tr></thead><tbody>{body}</tbody></table>"
    )


def _calibration(evaluation: Mapping[str, Any]) -> str:
    found = evaluation["calibration"]
    if not found:
        return "<p>No calibration was recorded.</p>"
    rows = "".join(
        f"<tr><td>{one['low']:.0%} to {one['high']:.0%}</td>{_figure(one['predicted'])}"
        f"{_figure(one['observed'])}{_count(one['num_examples'])}</tr>"
        for one in found["bins"]
    )
    note = (
        f" {found['not_shown']} bins of fewer than 20 are not shown." if found["not_shown"] else ""
    )
    return (
        f"<p>Expected calibration error <strong>{found['ece']:.3f}</strong>, over ten bins.</p>"
        f'<div class="chart">{_diagram(found["bins"])}<table style="width:auto"><thead><tr>'
        "<th>Said</th><th class='n'>Mean said</th><th class='n'>Observed</th>"
        f"<th class='n'>Patients</th></tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="soft">From the counts that left the sites{_noise(evaluation)}; within a bin a '
        f"patient counts as if in the middle of a twentieth.{note}</p>"
    )


def _diagram(bins: list[Mapping[str, float]]) -> str:
    """Observed over predicted: on the diagonal the model is calibrated."""
    most = max((one["num_examples"] for one in bins), default=1.0)
    points = "".join(
        f'<circle cx="{30 + 180 * one["predicted"]:.1f}" cy="{190 - 180 * one["observed"]:.1f}" '
        f'r="{3 + 6 * (one["num_examples"] / most) ** 0.5:.1f}" fill="#0b6e69" '
        'fill-opacity=".75"/>'
        for one in bins
    )
    return (
        '<svg width="225" height="225" role="img" aria-label="reliability diagram">'
        '<rect x="30" y="10" width="180" height="180" fill="#f4f6f8" stroke="#dfe5ea"/>'
        '<line x1="30" y1="190" x2="210" y2="10" stroke="#9aa7b2" stroke-dasharray="4 4"/>'
        f'{points}<text x="30" y="205">0</text><text x="204" y="205">1</text>'
        '<text x="18" y="16">1</text><text x="85" y="218">predicted</text>'
        '<text x="14" y="130" transform="rotate(-90 14 130)">observed</text></svg>'
    )


def _subgroups(evaluation: Mapping[str, Any]) -> str:
    if not evaluation["subgroups"]:
        return "<p>Not examined: the study asked for none ([evaluation] subgroups).</p>"
    parts = []
    for field, found in evaluation["subgroups"].items():
        table = _figures(list(found["groups"].items())) if found["groups"] else ""
        hidden = found["suppressed"]
        note = ""
        if hidden:
            names, why = escape(", ".join(hidden)), escape(found["because"])
            note = f'<p class="soft">Not shown ({why}): {names}.</p>'
        parts.append(f"<h3>By {escape(field.replace('_', ' '))}</h3>{table}{note}")
    return "".join(parts) + (
        f'<p class="soft">All sites together{_noise(evaluation)}. Patients whose value is missing '
        "are in no group.</p>"
    )


def _forms(forms: Mapping[str, Any]) -> str:
    said = f"<p>{escape(forms['said'][0].upper() + forms['said'][1:])}</p>"
    if not forms["measured"]:
        return said
    body = "".join(
        f"<tr><td>{escape(one['name'])}</td><td class='n'>{one['bytes'] / 1024:.0f}</td>"
        f"<td class='n'>{one['milliseconds']:.3f}</td><td class='n'>{one['off']:.1g}</td></tr>"
        for one in forms["measured"]
    )
    return (
        f"{said}<table><thead><tr><th>Form</th><th class='n'>KiB</th><th class='n'>ms a patient"
        f"</th><th class='n'>Largest difference</th></tr></thead><tbody>{body}</tbody></table>"
    )


def _noise(evaluation: Mapping[str, Any]) -> str:
    std = evaluation["noise_std"]
    if not std:
        return ", exact"
    return f"; each count behind a figure has noise of standard deviation {std:.1f} patients"


def _who(developer: Mapping[str, str]) -> dict[str, str]:
    return {"developer": developer["name"], "contact": developer["contact"]}


def _score(value: float | None) -> str:
    if value is None:
        return "<td></td><td></td>"
    width = max(0.0, min(1.0, value)) * 100
    bar = f'<span class="bar"><i style="width:{width:.0f}%"></i></span>'
    return f'<td class="n">{value:.3f}</td><td>{bar}</td>'


def _figure(value: float | None) -> str:
    return f'<td class="n">{"" if value is None else f"{value:.3f}"}</td>'


def _count(value: float | None) -> str:
    return f'<td class="n">{"" if value is None else f"{value:.0f}"}</td>'


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def _inputs(signature: ModelSignature) -> str:
    body = "".join(
        f"<tr><td><code>{escape(field.name)}</code></td><td>{escape(field.title)}</td>"
        f"<td>{escape(field.allowed())}</td><td>{escape(', '.join(field.units))}</td>"
        f"<td>{escape(field.loinc or '')}</td></tr>"
        for field in signature.fields
    )
    return (
        "<table><thead><tr><th>Field</th><th>Meaning</th><th>Allowed</th><th>Also in</th>"
        f"<th>LOINC</th></tr></thead><tbody>{body}</tbody></table>"
    )


def _facts(training: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in training.items()
    )
    return f"<dl>{rows}</dl>"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)
