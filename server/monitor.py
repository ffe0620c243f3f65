"""Reference histograms for drift, from the sites' noised counts: `monitor.json`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.canonical import digest
from fedward.core.errors import AggregationAborted, UpdateRejected
from fedward.core.study import Study
from fedward.privacy.accounting import gaussian_event, privacy_spent
from fedward.server.channel import Reply
from fedward.server.execution import Execution
from fedward.server.members import Member
from fedward.server.secure import SecureRounds
from fedward.strategies.strategy import Vector
from fedward.tasks.reference import monitor_json, size
from fedward.transport.monitor import (
    local_monitor_noise,
    monitor_layout,
    monitor_mechanism,
    monitor_round,
    monitor_sensitivity,
)
from fedward.transport.payload import Payload

_KEPT = "monitor.json"


def collect_monitor(
    execution: Execution, parameters: Vector, secure: SecureRounds | None
) -> dict[str, Any] | None:
    """Ask every site for its histograms, once, and put them together.

    Args:
        execution: The study under way.
        parameters: The model that is published.
        secure: Under secure aggregation, what sums them.

    Returns:
        What `monitor.json` holds; None where the study asks for none, or too few sites answered:
        then the run goes on, and an event says why.
    """
    study, run = execution.study, execution.run
    if study.monitor is None:
        return None
    asked = digest(parameters.tobytes())
    # Sites release them once: a coordinator that crashed after it got them must not ask again.
    if (run.path / _KEPT).exists():
        kept = run.read_json(_KEPT)
        if kept["asked"] == asked:
            monitor: dict[str, Any] | None = kept["monitor"]
            return monitor
    try:
        if secure is None:
            counts, sites = _plain_sum(execution, parameters)
        else:
            total, sites = secure.histograms(parameters)
            counts = total.astype(np.float64)
    except (AggregationAborted, ValueError) as error:
        run.event("no monitor", reason=str(error))
        return None
    monitor = _monitor(execution, counts, sites)
    run.write_json(_KEPT, {"asked": asked, "monitor": monitor})
    if monitor is None:
        run.event("no monitor", reason="noise left nothing to count; raise [monitor] epsilon")
    else:
        run.event("monitor", sites=sites, noise_std=monitor["made"]["noise_std"])
    return monitor


def _monitor(
    execution: Execution, counts: NDArray[np.floating[Any]], sites: int
) -> dict[str, Any] | None:
    study = execution.study
    std = noise_std(study, sites=sites, roster_size=execution.roster_size)
    found = monitor_json(monitor_layout(study), np.asarray(counts, np.float64), noise_std=std)
    return None if found is None else {**found, "made": made(study, sites=sites, std=std)}


def noise_std(study: Study, *, sites: int, roster_size: int) -> float:
    """Standard deviation of the noise on each cell of the sum.

    Args:
        study: What was asked.
        sites: Sites in the sum.
        roster_size: Sites in the consortium.
    """
    if study.privacy.mode == "none":
        return 0.0
    if study.privacy.mode == "distributed":
        share = monitor_mechanism(study, sites=roster_size).share_std
    else:
        share = local_monitor_noise(study) * monitor_sensitivity(study)
    return share * math.sqrt(sites)


def made(study: Study, *, sites: int, std: float) -> Mapping[str, Any]:
    """How the histograms were made, for who reads them."""
    about: dict[str, Any] = {
        "of": "the sites' training patients, and the model's answers to them",
        "sites": sites,
        "mode": study.privacy.mode,
        "noise_std": round(std, 4),
    }
    if study.privacy.mode != "none":
        alone = privacy_spent(
            gaussian_event(local_monitor_noise(study)),
            delta=study.privacy.delta,
            unit=study.privacy.unit,
        )
        about["epsilon_alone"] = round(alone.epsilon, 4)
        about["delta"] = study.privacy.delta
        about["included"] = "in the epsilon of privacy.json"
    return about


def _plain_sum(execution: Execution, parameters: Vector) -> tuple[NDArray[np.float64], int]:
    study, run = execution.study, execution.run
    number, cells = monitor_round(study), size(monitor_layout(study))
    total, sites, missing = np.zeros(cells), 0, []
    request = Payload({"hash": study.hash, "round": number}, {"parameters": parameters})
    for member, reply in execution.ask_all("train.monitor", request, round_number=number):
        try:
            counts = _read_counts(member, reply, cells)
        except UpdateRejected as error:
            run.event("failed", round=number, site=member.site, reason=error.reason)
            missing.append(member.site)
            continue
        total += counts
        sites += 1
    if sites < study.aggregation.min_sites:
        raise AggregationAborted(
            round_number=number, missing=missing, threshold=study.aggregation.min_sites
        )
    return total, sites


def _read_counts(member: Member, reply: Reply, cells: int) -> NDArray[np.float64]:
    if reply.payload is None:
        raise UpdateRejected(site=member.site, reason=str(reply.problem))
    if reply.payload.record.get("site") != member.site:
        raise UpdateRejected(site=member.site, reason="it answers as another site")
    counts = reply.payload.arrays.get("counts")
    if counts is None or counts.shape != (cells,) or not np.isfinite(counts).all():
        raise UpdateRejected(site=member.site, reason="its histograms have another form")
    return counts.astype(np.float64)
