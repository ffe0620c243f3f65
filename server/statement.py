"""What a release promises about privacy: `privacy.json`, and its one line."""

import math
from collections.abc import Mapping
from typing import Any

from fedward.privacy.units import guarantees_line, patient_line, worst_guarantees

_MECHANISMS = {
    "none": "none",
    "local": "DP-SGD at each site: Poisson sampling, clipped gradients, Gaussian noise",
    "distributed": "discrete noise of all sites, inside a secure sum",
    "central": "Gaussian noise of a trusted coordinator on clipped site updates",
}
_OF_SITES = (
    "each site's whole update clipped, discrete noise of all sites, inside a secure sum (DP-FedAvg)"
)
_HISTOGRAMS = "noised histograms of the training patients' inputs and predictions, for drift"
_NOT_COVERED = {
    True: ["anything: weights and metrics are exact"],
    False: [
        "what a site declares: its name, its public size, that it takes part",
        "a patient of several of the sites, who has lost what all of them state together",
    ],
}
_WHO = "in which rounds a site was in the sum"
_NEEDED = ("mode", "unit", "delta", "neighboring_relation", "accountant", "sites", "simulated")


def privacy_statement(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """Make `privacy.json` of what a run accounted for.

    Args:
        privacy: `mode` (none, local, distributed or central) and `simulated` (whether noise came
            from a seed); and unless mode is none: `unit`, `delta`, `neighboring_relation`,
            `accountant`, and `sites` (site to `epsilon`, ...). More keys are kept.

    Returns:
        The same with `mechanism`, `epsilon` (the largest over sites), `private`, `reason` (why
        not, or None), `statement` and `not_covered`; where the unit is the record also `patients`:
        the same for patients with several records, the largest over sites; where it is the site
        also `patient`: the same for one patient of a site, None if a site did not say.

    Raises:
        ValueError: A key is missing. There is no default: silence would read as a promise.
    """
    mode = privacy.get("mode")
    if mode not in _MECHANISMS:
        raise ValueError(f"privacy mode is {mode!r}; allowed: {', '.join(_MECHANISMS)}")
    needed = ("mode", "simulated") if mode == "none" else _NEEDED
    missing = [key for key in needed if key not in privacy]
    if missing:
        raise ValueError(f"the privacy of a release needs {', '.join(missing)}")
    sites: Mapping[str, Mapping[str, Any]] = privacy.get("sites") or {}
    epsilons = [site.get("epsilon") for site in sites.values()]
    reason: str | None = None
    if mode == "none":
        reason = "trained without differential privacy (mode none)"
    elif privacy["simulated"]:
        reason = "a simulation: sampling and noise came from a seed, so they protect nobody"
    elif not epsilons or any(epsilon is None for epsilon in epsilons):
        reason = "a site's epsilon is not known"
    known = [float(epsilon) for epsilon in epsilons if epsilon is not None]
    epsilon = max(known, default=None)
    of_sites = mode == "distributed" and privacy["unit"] == "site"
    moves = ", to a norm that follows a noised quantile of the gradients' at each site"
    also = moves if privacy.get("clipping") == "adaptive" else ""
    also += "; and once, " + _HISTOGRAMS if privacy.get("monitor") and mode != "none" else ""
    statement = {
        "mechanism": (_OF_SITES if of_sites else _MECHANISMS[mode]) + also,
        **privacy,
        "sites": {name: dict(site) for name, site in sites.items()},
        "epsilon": epsilon,
        "private": reason is None,
        "reason": reason,
        "not_covered": _NOT_COVERED[mode == "none"] + ([_WHO] if of_sites else []),
    }
    if privacy.get("unit") == "record" and mode != "none":
        statement["patients"] = worst_guarantees(
            site.get("patients") or [] for site in sites.values()
        )
    if privacy.get("unit") == "site" and mode != "none":
        told: list[Mapping[str, Any]] = [s["patient"] for s in sites.values() if s.get("patient")]
        complete = told and len(told) == len(sites)
        statement["patient"] = max(told, key=_epsilon) if complete else None
    statement["statement"] = _one_line(statement)
    return statement


def _epsilon(spent: Mapping[str, Any]) -> float:
    """Of a figure; None there is no bound."""
    return math.inf if spent["epsilon"] is None else float(spent["epsilon"])


def _one_line(privacy: Mapping[str, Any]) -> str:
    spent = ""
    if privacy["epsilon"] is not None:
        spent = (
            f"epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g} per "
            f"{privacy['unit']} ({privacy['neighboring_relation']}, {privacy['accountant']}, "
            f"{privacy['mode']} mode)"
        )
        if privacy["unit"] == "record":
            spent += "; " + guarantees_line(privacy["patients"])
        if privacy["unit"] == "site":
            spent += "; " + patient_line(privacy["patient"])
        notes = {site["note"] for site in privacy["sites"].values() if site.get("note")}
        spent += "".join(f"; {note}" for note in sorted(notes))
    if privacy["private"]:
        return f"Differentially private: {spent}."
    accounted = f" Accounted as if it were real: {spent}." if spent else ""
    return f"No privacy promise: {privacy['reason']}.{accounted}"
