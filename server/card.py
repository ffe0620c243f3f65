"""The model card: what a hospital reads before it lets a model near a patient.

`card.json` for machines and `card.html` for people. The sections follow the CHAI Applied Model
Card (2025) and the Model Facts label of Sendak et al., npj Digital Medicine 3:41 (2020). What a run
cannot know comes from the study's `[publish.card]`; where that is empty, the card says so.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fedward.core.fields import ModelSignature

# Below this many examples a figure says more of patients than of the model.
SMALLEST_CELL = 20
_CELLS = 40  # of the histogram behind a row of figures
NOT_STATED = "not stated by the publisher"
_FORMS = (
    "Each hospital's adapter measures every form on its own host, and serves a smaller one only "
    "where it is at least a tenth faster there and no probability moves by more than 0.005; what "
    "it found is at /monitor. The figures here are of the publisher's host."
)
_HOW = (
    "Served by the hospital's own adapter: enter the fields under Inputs, or send FHIR by CDS "
    "Hooks. It answers with a probability, what was missing, and on request each value's "
    "contribution. Read it beside the patient; record an outcome so that calibration is watched."
)


def card_json(
    signature: ModelSignature,
    *,
    statement: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    monitor: Mapping[str, Any] | None = None,
    forms: Sequence[Mapping[str, Any]] = (),
    about: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The card as JSON values. Figures over fewer than 20 examples are left out, and said so.

    Args:
        signature: The model's interface.
        statement: `privacy.json`.
        metrics: As in a run's `metrics.json`, with `calibration` and `subgroups` if there are any.
        training: `training.json`.
        monitor: `monitor.json`, if there is one.
        forms: What `variants.measure_variants` found.
        about: The study's `[publish.card]`; what is missing or empty is not stated.
    """
    said = {name: text.strip() or NOT_STATED for name, text in (about or {}).items()}

    def stated(name: str) -> str:
        return said.get(name, NOT_STATED)

    return {
        "name": signature.model,
        "version": signature.version,
        "task": signature.task,
        "outcome": signature.outcome,
        "developer": {"name": stated("developer"), "contact": stated("contact")},
        "release": {
            "date": datetime.now(UTC).date().isoformat(),
            "stage": stated("stage"),
            "regulatory": stated("regulatory"),
        },
        "summary": f"A {_model_type(training)} that gives the probability of {signature.outcome} "
        f"from {len(signature.fields)} clinical fields, trained across "
        f"{_how_many(training.get('sites', ()))} without moving their patients' records.",
        "intended_use": {
            "use": f"Gives a clinician the probability of: {signature.outcome}. The clinician "
            "decides; nothing is ordered or changed by this model.",
            "users": "Clinicians at hospitals that have accepted this release on their own "
            "patients.",
            "population": stated("population"),
            "how": _HOW,
            "out_of_scope": [
                "patients outside the ranges under Inputs",
                "decisions without a clinician",
                "screening of people without symptoms",
            ],
        },
        "limits": [
            "Evaluated on held-out patients of the sites named here; accept it on yours first."
            if metrics.get("pooled")
            else "The publisher has seen no metrics of it; accept it on your own patients first.",
            "It states associations in past data; a contribution is not a cause.",
            "Missing values are allowed and make an answer less certain; the answer names them.",
        ],
        "warnings": {
            "risk_level": stated("risk_level"),
            "bias": stated("bias"),
            "subgroups": "see Subgroups for how it does on each; where none are shown, it was "
            "not examined",
        },
        "facts": {
            "output": ", ".join(signature.outputs) + ", between 0 and 1",
            "model_type": _model_type(training),
            "foundation_model": "none",
            "input_source": "fields of the patient's record, under Inputs",
            "time_of_prediction": "when asked; nothing is predicted in the background",
            "development_data": "held-out and training patients of the sites under Training, each "
            "divided by a keyed hash of the patient",
            "bias_mitigation": f"{_weights(training)}; subgroups are reported where the study asks",
            "maintenance": stated("maintenance"),
            "security": "signed release, verified by each hospital before it is served; keys and "
            "an audit log at the adapter",
            "transparency": "privacy.json, training.json and bom.cdx.json in this release",
            "funding": stated("funding"),
            "consent": stated("consent"),
            "references": stated("references"),
        },
        "evaluation": _evaluation(metrics, exact=statement.get("mode") == "none"),
        "monitoring": _monitoring(monitor),
        "forms": {
            "said": _FORMS
            if forms
            else "one form only: the model is too small to gain from others",
            "measured": [dict(one) for one in forms],
        },
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


def _model_type(training: Mapping[str, Any]) -> str:
    model = (training.get("agreed") or {}).get("model") or {}
    return f"{model['name']} model" if model.get("name") else "model"


def _weights(training: Mapping[str, Any]) -> str:
    """What of the classes' balance was changed in training."""
    agreed = (training.get("agreed") or {}).get("training") or {}
    weights = agreed.get("class_weights")
    if weights is None:
        return "none in training"
    if weights == "balanced":
        weights = f"balanced at a prevalence of {agreed.get('prevalence')}"
    return f"classes are weighted in training ({weights}), so probabilities are not calibrated"


def _how_many(sites: Any) -> str:
    return f"{len(sites)} site{'' if len(sites) == 1 else 's'}"


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


def _evaluation(metrics: Mapping[str, Any], *, exact: bool) -> dict[str, Any]:
    sites: dict[str, Any] = {}
    hidden: list[str] = []
    for name, values in dict(metrics.get("sites") or {}).items():
        if values.get("num_examples", 0) < SMALLEST_CELL:
            hidden.append(name)
        else:
            sites[name] = dict(values)
    worst = metrics.get("worst") or {}
    noise = float(metrics.get("noise_std", 0.0))
    # A group's size is the sum of its noised cells; below twice that noise it is no group.
    smallest = max(SMALLEST_CELL, 2 * noise * math.sqrt(_CELLS))
    return {
        "on": "held-out patients of each site",
        "pooled": dict(metrics.get("pooled") or {}),
        "mean": dict(metrics.get("mean") or {}),
        # The worst site's figure would betray a hidden one.
        "worst": {} if worst.get("site") in hidden else dict(worst),
        "sites": sites,
        "calibration": _calibration(metrics.get("calibration")),
        "subgroups": {
            field: _groups(groups, smallest=smallest, exact=exact)
            for field, groups in dict(metrics.get("subgroups") or {}).items()
        },
        "noise_std": noise,
        "suppressed": {"sites": hidden, "because": f"fewer than {SMALLEST_CELL} examples"},
    }


def _calibration(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reliability bins, without those of few patients; ECE is over all of them."""
    if not found or "ece" not in found:
        return {}
    shown = [dict(one) for one in found["bins"] if one["num_examples"] >= SMALLEST_CELL]
    return {"ece": found["ece"], "bins": shown, "not_shown": len(found["bins"]) - len(shown)}


def _groups(
    groups: Mapping[str, Mapping[str, float]], *, smallest: float, exact: bool
) -> dict[str, Any]:
    """A field's groups; those of few patients by name alone."""
    sizes = {name: values.get("num_examples", 0.0) for name, values in groups.items()}
    hidden = {name for name, count in sizes.items() if count < smallest}
    if exact and len(hidden) == 1 and len(groups) > 1:
        # One hidden group is what is left of the whole: a second one has to go with it.
        hidden.add(min(set(sizes) - hidden, key=lambda name: sizes[name]))
    return {
        "groups": {name: dict(v) for name, v in groups.items() if name not in hidden},
        "suppressed": sorted(hidden),
        "because": f"fewer than {smallest:.0f} patients, or it would give those away",
    }
