"""The model card: what a hospital reads before it lets a model near a patient.

`card.json` for machines and `card.html` for people. The sections follow the CHAI Applied Model
Card (2025) and the Model Facts label of Sendak et al., npj Digital Medicine 3:41 (2020).
"""

from collections.abc import Mapping
from html import escape
from typing import Any

from fedward.core.fields import ModelSignature

# Below this many examples a figure says more of patients than of the model.
SMALLEST_CELL = 20
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
@media(max-width:40rem){dl{grid-template-columns:1fr}}
"""


def card_json(
    signature: ModelSignature,
    *,
    statement: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    monitor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The card as JSON values. Figures over fewer than 20 examples are left out, and said so."""
    return {
        "name": signature.model,
        "version": signature.version,
        "task": signature.task,
        "outcome": signature.outcome,
        "intended_use": {
            "use": f"Gives a clinician the probability of: {signature.outcome}. The clinician "
            "decides; nothing is ordered or changed by this model.",
            "users": "Clinicians at hospitals that have accepted this release on their own "
            "patients.",
            "out_of_scope": [
                "patients outside the ranges under Inputs",
                "decisions without a clinician",
                "screening of people without symptoms",
            ],
        },
        "limits": [
            "Evaluated on held-out patients of the sites named here; accept it on yours first.",
            "It states associations in past data; a contribution is not a cause.",
            "Missing values are allowed and make an answer less certain; the answer names them.",
        ],
        "evaluation": _evaluation(metrics),
        "monitoring": _monitoring(monitor),
        "privacy": {
            key: statement[key]
            for key in ("statement", "private", "reason", "epsilon", "mechanism", "not_covered")
        },
        "training": {
            key: training[key]
            for key in ("study", "study_hash", "rounds", "sites", "versions")
            if key in training
        },
    }


def _monitoring(monitor: Mapping[str, Any] | None) -> dict[str, Any]:
    """How a hospital notices that its patients are no longer those that the model learnt from."""
    if monitor is None:
        return {
            "drift": "not watched: this release has no reference histograms, because the study "
            "asked for none ([monitor]) or they could not be made",
            "reference": None,
        }
    return {
        "drift": "the adapter compares inputs and predictions with monitor.json, histograms "
        "of the patients that the model was trained on",
        "reference": dict(monitor.get("made") or {}),
    }


def _evaluation(metrics: Mapping[str, Any]) -> dict[str, Any]:
    sites: dict[str, Any] = {}
    hidden: list[str] = []
    for name, values in dict(metrics.get("sites") or {}).items():
        if values.get("num_examples", 0) < SMALLEST_CELL:
            hidden.append(name)
        else:
            sites[name] = dict(values)
    worst = metrics.get("worst") or {}
    return {
        "on": "held-out patients of each site",
        "pooled": dict(metrics.get("pooled") or {}),
        "mean": dict(metrics.get("mean") or {}),
        # The worst site's figure would betray a hidden one.
        "worst": {} if worst.get("site") in hidden else dict(worst),
        "sites": sites,
        "suppressed": {"sites": hidden, "because": f"fewer than {SMALLEST_CELL} examples"},
    }


def card_html(card: Mapping[str, Any], signature: ModelSignature) -> str:
    """The card as one page that asks nothing of a network."""
    privacy = card["privacy"]
    mood = "promise" if privacy["private"] else "none"
    title = f"{escape(card['name'])}, version {card['version']}"
    use = card["intended_use"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head>
<body><main>
<header><h1>{title}</h1><p class="soft">Model card. Probability of: {escape(card["outcome"])}.</p>
</header>
<section class="{mood}"><h2>Privacy</h2><p><strong>{escape(privacy["statement"])}</strong></p>
<p>Mechanism: {escape(privacy["mechanism"])}.</p>
<p class="soft">Not covered: {escape("; ".join(privacy["not_covered"]))}.</p></section>
<section><h2>Intended use</h2><p>{escape(use["use"])}</p><p>{escape(use["users"])}</p>
<p>Not for: {escape("; ".join(use["out_of_scope"]))}.</p></section>
<section><h2>How well it did</h2>{_evaluation_html(card["evaluation"])}</section>
<section><h2>Watching it</h2><p>{escape(card["monitoring"]["drift"].capitalize())}.</p>
{_facts(card["monitoring"]["reference"] or {})}</section>
<section><h2>Limits</h2>{_list(card["limits"])}</section>
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
    body = "".join(
        f"<tr><td>{escape(name)}</td>{_score(values.get('auroc'))}"
        f"{_figure(values.get('accuracy'))}{_count(values.get('num_examples'))}</tr>"
        for name, values in rows
    )
    hidden = evaluation["suppressed"]
    note = ""
    if hidden["sites"]:
        note = f" Not shown ({escape(hidden['because'])}): {escape(', '.join(hidden['sites']))}."
    return (
        "<table><thead><tr><th></th><th class='n'>AUROC</th><th></th><th class='n'>Accuracy</th>"
        f"<th class='n'>Patients held out</th></tr></thead><tbody>{body}</tbody></table>"
        f'<p class="soft">Measured on {escape(evaluation["on"])}.{note}</p>'
    )


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
