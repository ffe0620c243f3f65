"""How a run ends: evaluation at the sites, the privacy statement, the release."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedward.core.errors import ConfigError, RegistryUnreachable, UpdateRejected
from fedward.core.identity import Identity
from fedward.core.run import RunDirectory
from fedward.core.study import Study
from fedward.privacy.accounting import (
    DpEvent,
    PrivacySpent,
    Unit,
    calibrate_gaussian,
    privacy_spent,
)
from fedward.privacy.secagg import least_threshold
from fedward.privacy.units import RECORDS_SHOWN, patient_guarantee, patient_of_a_site
from fedward.server.channel import Reply
from fedward.server.execution import Execution
from fedward.server.members import Member
from fedward.server.oci import push_registry
from fedward.server.publisher import publish
from fedward.server.registry import Registry
from fedward.server.statement import privacy_statement
from fedward.strategies.strategy import Vector
from fedward.tasks.subgroups import groupings, of_everybody, of_group, with_groups
from fedward.tasks.task import Sums, Task, add_sums
from fedward.transport.monitor import metrics_sensitivity, monitor_mechanism
from fedward.transport.payload import Payload
from fedward.transport.sums import distributed_mechanism, fewest_sites, released_rate

# e to the power of it, times what the discrete noise may fail with, is far below any delta.
_MOST_OF_A_PATIENT = 30.0
_NO_PROMISE = {
    "epsilon": None,
    "neighboring_relation": "add-or-remove-one",
    "accountant": "pld",
}
_ADVERSARY = "the coordinator with up to {} colluding sites, and anyone outside"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the sites said of the final model.

    Attributes:
        metrics: As in `metrics.json`: pooled, mean, worst, sites.
        privacy: The run's privacy statement, a part for each site.
    """

    metrics: dict[str, Any]
    privacy: dict[str, Any]


def collect_outcome(execution: Execution, parameters: Vector) -> Outcome:
    """Ask every member for the final model's metrics, as sums, and for what the run has spent."""
    study, run = execution.study, execution.run
    request = Payload({"hash": study.hash}, {"parameters": parameters})
    statements: dict[str, Any] = {}
    private = study.privacy.mode != "none"
    tally = Tally(execution.task, private=private)
    shapes = _shapes_of_sums(execution.task, study)
    after_last = study.study.rounds + 1
    for member, reply in execution.ask_all("evaluate.metrics", request, round_number=after_last):
        try:
            payload = _read_reply(member, reply)
            sums = _read_sums(member, payload, shapes)
            statements[member.site] = payload.record["privacy"]
        except (UpdateRejected, KeyError) as error:
            run.event("not evaluated", site=member.site, reason=str(error))
            continue
        if sums:
            tally.add(member.site, sums)
            run.event("evaluated", site=member.site)
    metrics = tally.metrics() | _across_sites(study, execution.task, tally)
    statement = _statement(
        study,
        execution.members,
        statements,
        roster_size=execution.roster_size,
        size=parameters.size,
    )
    return Outcome(metrics, statement)


class Tally:
    """Metrics of sites as their sums come in; of all the sums only the total is kept.

    Args:
        task: Whose metrics.
        private: The sums are `Task.private_metrics`, with noise.

    Attributes:
        total: The sums of all sites so far, of subgroups too; None before the first.
    """

    def __init__(self, task: Task, *, private: bool = False) -> None:
        self._summarise = task.summarise_private if private else task.summarise
        self._sites: dict[str, dict[str, float]] = {}
        self.total: Sums | None = None

    def add(self, site: str, sums: Sums) -> None:
        """Take in a site, which is new."""
        self._sites[site] = self._summarise(of_everybody(sums))
        self.total = add_sums([sums] if self.total is None else [self.total, sums])

    @property
    def sites(self) -> int:
        """How many."""
        return len(self._sites)

    def metrics(self) -> dict[str, Any]:
        """Of each site, of all patients pooled, their mean over sites, and the worst site's."""
        sites = self._sites
        if self.total is None:
            return {"pooled": {}, "mean": {}, "worst": {}, "sites": {}}
        names = sorted({name for values in sites.values() for name in values} - {"num_examples"})
        means = {
            name: float(np.mean([values[name] for values in sites.values() if name in values]))
            for name in names
        }
        ranked = [(values["auroc"], site) for site, values in sites.items() if "auroc" in values]
        worst = {"site": min(ranked)[1], "auroc": min(ranked)[0]} if ranked else {}
        pooled = self._summarise(of_everybody(self.total))
        return {"pooled": pooled, "mean": means, "worst": worst, "sites": sites}


def summarise_sites(task: Task, sums: Mapping[str, Sums]) -> dict[str, Any]:
    """What `Tally` makes of the sums of all sites, by site."""
    tally = Tally(task)
    for site, part in sums.items():
        tally.add(site, part)
    return tally.metrics()


def publish_outcome(
    execution: Execution,
    parameters: Vector,
    outcome: Outcome,
    *,
    registry: Path,
    publisher: Identity,
    seconds: float,
    secure: Mapping[str, Any] | None,
    monitor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Publish the release, hand it to every site, and close the run directory.

    `secure` is what secure aggregation cost, where there was any; `monitor` the histograms that
    go with the release.
    """
    study, run = execution.study, execution.run
    training = {
        "run": run.path.name,
        "rounds": study.study.rounds,
        "seconds": seconds,
        "sites": {member.site: {"weight": member.weight} for member in execution.members},
        "manifest": run.read_json("manifest.json"),
    }
    release = publish(
        registry=registry,
        study=study,
        task=execution.task,
        parameters=parameters,
        fitted=None,
        privacy=outcome.privacy,
        metrics=outcome.metrics,
        training=training,
        identity=publisher,
        monitor=monitor,
    )
    copy = run.adopt_release(release)
    run.event("published", release=str(copy.name), version=release.name)
    _refresh(registry, publisher, run)
    _mirror(registry, study.publish.mirror, run)
    _send_release(execution, release)
    result = {
        "run": str(run.path),
        "study": study.study.name,
        "rounds": study.study.rounds,
        "seconds": seconds,
        "metrics": outcome.metrics,
        "privacy": outcome.privacy,
        "release": str(copy),
    }
    if secure is not None:
        result["secure_aggregation"] = dict(secure)
    run.write_json("metrics.json", result)
    run.event("finished", seconds=seconds)
    return result


def _refresh(registry: Path, publisher: Identity, run: RunDirectory) -> None:
    """Sign the new state of a registry that was founded, so that those who follow it see it.

    What goes wrong here is said and costs the run nothing: the release is published, and the sites
    get it over the wire in any case.
    """
    if not Registry(registry).founded:
        return
    try:
        from fedward.server.updates import refresh_registry

        refresh_registry(registry, publisher=publisher)
    except (ConfigError, ImportError) as error:
        run.event("registry not refreshed", reason=str(error))
    else:
        run.event("registry refreshed")


def _mirror(registry: Path, address: str | None, run: RunDirectory) -> None:
    """Copy the registry to where the study says; what goes wrong costs the run nothing."""
    if address is None:
        return
    try:
        pushed = push_registry(registry, address)
    except (ConfigError, RegistryUnreachable) as error:
        run.event("registry not mirrored", reason=str(error))
    else:
        run.event("registry mirrored", to=address, releases=pushed)


def _send_release(execution: Execution, release: Path) -> None:
    files: dict[str, NDArray[Any]] = {
        path.relative_to(release).as_posix(): np.frombuffer(path.read_bytes(), np.uint8)
        for path in sorted(release.rglob("*"))
        if path.is_file()
    }
    request = Payload({"hash": execution.study.hash, "release": release.name}, files)
    end = execution.study.study.rounds + 2
    for member, reply in execution.ask_all("query.publish", request, round_number=end):
        if reply.payload is None:
            reason = str(reply.problem)
            execution.run.event("release not accepted", site=member.site, reason=reason)
        else:
            execution.run.event("release accepted", site=member.site)


def _read_reply(member: Member, reply: Reply) -> Payload:
    if reply.payload is None:
        raise UpdateRejected(site=member.site, reason=str(reply.problem))
    if reply.payload.record.get("site") != member.site:
        raise UpdateRejected(site=member.site, reason="it answers as another site")
    return reply.payload


def _shapes_of_sums(task: Task, study: Study) -> dict[str, tuple[int, ...]]:
    if study.protects_sites:
        return {}  # what a site's patients say of the model would be of one site alone
    nobody = task.metrics(torch.zeros(0, 1), torch.zeros(0))
    one = task.private_metrics(nobody) if study.privacy.mode != "none" else nobody
    groups = groupings(task.schema, study.evaluation.subgroups)
    expected = with_groups(one, {(g.field, i): one for g in groups for i in range(len(g.labels))})
    return {name: np.shape(array) for name, array in expected.items()}


def _read_sums(
    member: Member, payload: Payload, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float64]]:
    given = {name: array.shape for name, array in payload.arrays.items()}
    if given != shapes or not all(np.isfinite(a).all() for a in payload.arrays.values()):
        raise UpdateRejected(site=member.site, reason="its metrics have another form")
    return {name: array.astype(np.float64) for name, array in payload.arrays.items()}


def _across_sites(study: Study, task: Task, tally: Tally) -> dict[str, Any]:
    """Calibration of everybody, and metrics of subgroups: of all sites together."""
    total = tally.total
    if total is None:
        return {}
    private = study.privacy.mode != "none"
    everybody = of_everybody(total)
    coarse = everybody if private else task.private_metrics(everybody)
    summarise = task.summarise_private if private else task.summarise
    std = 0.0
    if private:
        one = calibrate_gaussian(epsilon=study.privacy.epsilon or 0.0, delta=study.privacy.delta)
        std = one * metrics_sensitivity(study) * math.sqrt(tally.sites)
    found: dict[str, Any] = {"calibration": task.calibration(coarse), "noise_std": std}
    groups = groupings(task.schema, study.evaluation.subgroups)
    if groups:
        found["subgroups"] = {
            group.field: {
                label: summarise(of_group(total, group.field, number))
                for number, label in enumerate(group.labels)
            }
            for group in groups
        }
    return found


def adversaries(study: Study, *, sites: int, size: int) -> list[dict[str, Any]]:
    """What a distributed run's noise is worth against the coordinator with ever more sites.

    A site that tells its share to the coordinator takes its noise out of the sum. Where nothing
    can be promised any more, `epsilon` is None. Where records are protected a row says what that
    means for patients with several (`patients`); where sites are, for one of their patients
    (`patient`).

    Args:
        study: In mode "distributed".
        sites: Sites in the roster.
        size: Number of parameters.
    """
    fewest, privacy = fewest_sites(study, sites=sites), study.privacy
    mechanism = distributed_mechanism(study, sites=sites, size=size)
    monitor = None if study.monitor is None else monitor_mechanism(study, sites=sites)
    rows = []
    for colluders in (0, least_threshold(sites, study.aggregation.adversary) - 1):

        def priced(
            price: Callable[[DpEvent, float], PrivacySpent],
            unit: Unit,
            ceiling: float = 20.0,
            colluders: int = colluders,
        ) -> dict[str, Any]:
            try:
                beside = monitor and monitor.against(survivors=fewest, colluders=colluders)
                return (
                    mechanism.against(survivors=fewest, colluders=colluders)
                    .bound(
                        price,
                        sample_rate=released_rate(study),
                        steps=study.study.rounds,
                        delta=privacy.delta,
                        beside=beside,
                        ceiling=ceiling,
                    )
                    .to_json()
                )
            except ValueError:
                return {**_NO_PROMISE, "delta": privacy.delta, "unit": unit}

        row = priced(
            lambda e, delta: privacy_spent(e, delta=delta, unit=privacy.unit), privacy.unit
        )
        if privacy.unit == "record":
            row["patients"] = [
                {
                    "records": records,
                    **priced(partial(_of_records, records=records), "patient", _MOST_OF_A_PATIENT),
                }
                for records in RECORDS_SHOWN
            ]
        if privacy.unit == "site":
            row["patient"] = priced(_of_one_inside, "patient", _MOST_OF_A_PATIENT)
        rows.append({"who": "the coordinator", "colluders": colluders, **row})
    return rows


def _of_records(event: DpEvent, delta: float, *, records: int) -> PrivacySpent:
    return patient_guarantee(event, records=records, delta=delta)


def _of_one_inside(event: DpEvent, delta: float) -> PrivacySpent:
    return patient_of_a_site(event, delta=delta)


def _statement(
    study: Study,
    members: Sequence[Member],
    statements: Mapping[str, Any],
    *,
    roster_size: int,
    size: int,
) -> dict[str, Any]:
    privacy = study.privacy
    accounted: dict[str, Any] = {
        "mode": privacy.mode,
        "simulated": any(member.simulated for member in members),
        "unit": privacy.unit,
        "delta": privacy.delta,
        "neighboring_relation": "add-or-remove-one",
        "accountant": "pld",
        "adversary": "anyone who sees all that the sites send, the coordinator included",
        # A site that said nothing of what it spent leaves the release without a promise.
        "sites": {member.site: statements.get(member.site, {}) for member in members},
    }
    if privacy.mode != "none":
        accounted |= {"asked_epsilon": privacy.epsilon, "clip_norm": privacy.clip_norm}
    if privacy.clipping == "adaptive":
        accounted["clipping"] = "adaptive"
    if study.monitor is not None:
        accounted["monitor"] = study.monitor.model_dump()
    if privacy.mode == "distributed":
        accounted["adversary"] = _ADVERSARY.format(privacy.colluders)
        accounted["adversaries"] = adversaries(study, sites=roster_size, size=size)
    return privacy_statement(accounted)
