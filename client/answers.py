"""A site's answers to what a coordinator may ask: admit, train, evaluate, take a release."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedward.client.acceptance import NotAccepted, judge, keep_refusal
from fedward.client.admission import check_model, check_policy
from fedward.client.evaluation import counted_rows, evaluate_groups, evaluate_model
from fedward.client.local_site import Admitted, LocalSite
from fedward.client.objective import study_loss
from fedward.client.outbox import Kept
from fedward.client.plan import plan_site, training_plan
from fedward.client.secure import MaskedRound, forget
from fedward.client.training import sampled_clipped_sum
from fedward.core.canonical import canonical_json, digest
from fedward.core.errors import (
    AdmissionRefused,
    BudgetExceeded,
    ConfigError,
    ReleaseRejected,
    SignatureInvalid,
    UpdateRejected,
)
from fedward.core.identity import PublicIdentity
from fedward.core.inbox import receive_release
from fedward.core.release import Release
from fedward.core.study import Study
from fedward.core.toml import build
from fedward.privacy.ledger import Reservation
from fedward.privacy.mechanisms import add_noise
from fedward.strategies.strategy import Vector
from fedward.tasks.registry import get_task
from fedward.tasks.subgroups import groupings
from fedward.tasks.task import Sums
from fedward.tasks.weights import class_weights
from fedward.transport.payload import Payload

_ANSWERED = (
    "round {} was answered here already, with another update; go on with the run that it was of "
    "(--resume), or give the study another name, which is paid for anew"
)


def admit_study(site: LocalSite, request: Payload) -> Payload:
    """Hold a study against policy, data and budget; pin it, and sign the terms.

    Raises:
        AdmissionRefused: The policy says no.
        BudgetExceeded: The whole run does not fit. Nothing was recorded.
        DataError: The site's data cannot be read as the task needs them.
        ConfigError: The study names a field that there is not, or weights of other classes, or a
            model that cannot be trained with privacy.
    """
    text = json.dumps(request.record.get("study", {}), sort_keys=True)
    study = _read_study(text)
    if study.hash != request.record.get("hash"):
        raise UpdateRejected(site="coordinator", reason="the study does not have its hash")
    check_policy(site.site, study)
    task = get_task(study.study.task)
    groupings(task.schema, study.evaluation.subgroups)
    class_weights(study, task.schema)
    _check_model_once(text)
    site.examples(task, study)
    roster = site.roster() if study.aggregation.secure else None
    plan = plan_site(study, site.site, sites=len(roster or ()), size=site.size(study))
    admitted = Admitted(study, plan)
    head = None
    if study.privacy.mode != "none":
        site.budget(admitted).allot()
        head = site.ledger.head
    site.pin(admitted)
    terms = {
        "site": site.name,
        "key": site.identity.public.pem().decode(),
        "hash": study.hash,
        # Under secure aggregation the weight travels inside the masked sum.
        "weight": None if study.aggregation.secure else admitted.plan.weight,
        "simulated": site.simulated,
        "ledger_head": head,
    }
    signature = site.identity.sign(canonical_json(terms)).hex()
    return Payload({"terms": terms, "signature": signature})


@lru_cache(maxsize=64)
def _read_study(text: str) -> Study:
    """What a coordinator sends, once for all the sites of a simulation."""
    return build(json.loads(text), Study, file="study of the coordinator")


@lru_cache(maxsize=64)
def _check_model_once(text: str) -> None:
    """Likewise; only of a study whose task the site's policy permits, for its code is run."""
    study = _read_study(text)
    check_model(study, get_task(study.study.task))


class Round(NamedTuple):
    """A round that a site has begun: all is checked and paid for, and nothing is trained yet.

    Attributes:
        admitted: The study.
        parameters: The model to start from.
        number: From 1.
        asked: SHA-256 of `parameters`; empty in a study without privacy.
        reservation: What was reserved for it; None where nothing is to be paid.
        again: The update that was sent before and is to be sent again; then nothing is trained.
        expected: SHA-256 that the update must have; empty where any will do.
        masked: Under secure aggregation, what masks the update.
    """

    admitted: Admitted
    parameters: Vector
    number: int
    asked: str = ""
    reservation: Reservation | None = None
    again: Vector | None = None
    expected: str = ""
    masked: MaskedRound | None = None


def train_round(site: LocalSite, request: Payload) -> Payload:
    """Train one round and return the update.

    Raises:
        AdmissionRefused, BudgetExceeded, UpdateRejected: Nothing was trained.
    """
    begun = begin_round(site, request)
    if begun.again is not None:
        return finish_round(site, begun, begun.again)
    study = begun.admitted.study
    if study.privacy.mode == "distributed" and not study.protects_sites:
        return _finish_shared(site, begun, _own_sum(site, begun))
    update = site.train(
        begun.admitted, begun.parameters, round_number=begun.number, paid=begun.reservation
    )
    if study.protects_sites:
        return _finish_whole(site, begun, update)
    return finish_round(site, begun, update)


def _own_sum(site: LocalSite, begun: Round) -> Vector:
    """The site's sum of clipped gradients, to which nothing is added yet."""
    study = begun.admitted.study
    task, model = site.model(study, begun.parameters)
    model.to(site.device)
    training, _ = site.examples(task, study)
    plan = training_plan(study, begun.admitted.plan, round_number=begun.number)
    noise = site.source(study, "train", begun.number)
    loss = study_loss(study, task)
    total, _ = sampled_clipped_sum(model, loss, training, plan=plan, noise=noise)
    return total


def begin_round(site: LocalSite, request: Payload) -> Round:
    """Check what is asked, and reserve its price.

    Reserve, train, keep, settle, in this order: a crash overstates the loss, never understates.
    A training that stopped goes on where it was, on the reservation that it has.
    A coordinator that lost the answer gets the same bytes again. One that asks a round anew for
    another model is refused: it would learn twice for the price of once.

    Raises:
        AdmissionRefused, BudgetExceeded, UpdateRejected: Nothing was reserved.
    """
    admitted = site.admitted(str(request.record.get("hash")))
    number = request.record.get("round")
    if not isinstance(number, int) or not 1 <= number <= admitted.plan.rounds:
        raise UpdateRejected(site="coordinator", reason=f"there is no round {number}")
    parameters = site.check_parameters(admitted.study, request.arrays.get("parameters"))
    masked = MaskedRound(site, request) if admitted.study.aggregation.secure else None
    if admitted.study.privacy.mode == "none":
        return Round(admitted, parameters, number, masked=masked)
    return _pay(site, admitted, parameters, number, masked)


def _pay(
    site: LocalSite,
    admitted: Admitted,
    parameters: Vector,
    number: int,
    masked: MaskedRound | None,
) -> Round:
    """Reserve the price of a private round, unless what was paid for before is sent again."""
    study = admitted.study
    asked = site.fingerprint(parameters)
    budget = site.budget(admitted)
    kept = site.outbox(study).newest()
    settled = site.ledger.settled_digest(study=study.hash, round_number=number)
    if kept is not None and (kept.round_number, kept.asked) == (number, asked):
        sent = digest(kept.update.tobytes())
        if sent == settled:
            return Round(admitted, parameters, number, again=kept.update, masked=masked)
        unsettled = budget.begun(number)
        if unsettled is not None:
            return Round(
                admitted, parameters, number, "", unsettled, again=kept.update, masked=masked
            )
    stopped = None if settled is not None or site.simulated else budget.begun(number)
    if stopped is not None:
        progress = site.progress(study, stopped, parameters)
        if progress is not None and progress.newest() is not None:
            # The same training goes on; had it been lost, another would have to be paid for.
            return Round(admitted, parameters, number, asked, stopped, masked=masked)
    if settled is not None:
        if site.simulated:
            # The seed gives the same bytes again, so that nothing need be kept of them.
            return Round(admitted, parameters, number, expected=settled, masked=masked)
        raise UpdateRejected(site="coordinator", reason=_ANSWERED.format(number))
    reservation = budget.reserve_round(number)
    return Round(admitted, parameters, number, asked, reservation, masked=masked)


def finish_round(site: LocalSite, begun: Round, update: Vector) -> Payload:
    """Keep and settle an update; then it may leave.

    Raises:
        UpdateRejected: The round was answered before, with another update.
    """
    if begun.expected and digest(update.tobytes()) != begun.expected:
        raise UpdateRejected(site="coordinator", reason=_ANSWERED.format(begun.number))
    if begun.reservation is not None:
        if begun.again is None:
            outbox = site.outbox(begun.admitted.study)
            outbox.keep(Kept(begun.number, begun.asked, update))
        site.ledger.settle(begun.reservation, update_digest=digest(update.tobytes()))
        progress = site.progress(begun.admitted.study, begun.reservation, begun.parameters)
        if progress is not None:
            progress.forget()
    # What was paid for is kept as it is; less of it may leave.
    update = site.outgoing(begun.admitted.study, update)
    if begun.masked is not None:
        return begun.masked.mask(update, weight=begun.admitted.plan.weight)
    return Payload({"site": site.name, "round": begun.number}, {"update": update})


def _finish_shared(site: LocalSite, begun: Round, total: Vector) -> Payload:
    """Put the site's share of noise into its sum, mask it, settle; then it may leave."""
    if begun.masked is None or begun.reservation is None:
        raise UpdateRejected(
            site="coordinator", reason="a share of the noise protects under secure aggregation only"
        )
    answer = begun.masked.mask(total, weight=begun.admitted.plan.weight)
    sent = digest(answer.arrays["masked"].tobytes())
    site.ledger.settle(begun.reservation, update_digest=sent)
    return answer


def _finish_whole(site: LocalSite, begun: Round, update: Vector) -> Payload:
    """As `_finish_shared`, of an update that no noise is in yet: it is clipped where it is masked.

    One that is not finite leaves as zero, and the site's own people find it counted.
    """
    if not np.isfinite(update).all():
        site.note_zeroed(begun.admitted.study, begun.number)
    answer = _finish_shared(site, begun, update)
    if begun.reservation is not None:
        progress = site.progress(begun.admitted.study, begun.reservation, begun.parameters)
        if progress is not None:
            progress.forget()
    return answer


def evaluate_release(site: LocalSite, request: Payload) -> Payload:
    """Metrics of a model on the held-out patients, as sums, and what the run has cost.

    Where the study is private, so are the sums: each row of a held-out patient, of at most
    `max_records`, adds one to one cell of a histogram, and to one more for each field with
    subgroups; Gaussian noise at the study's epsilon covers that. It is released once; asked again,
    the site answers with the same. Where whole sites are protected there are no sums: each would
    be of one site alone.

    Raises:
        AdmissionRefused, BudgetExceeded, UpdateRejected: Nothing was released.
    """
    admitted = site.admitted(str(request.record.get("hash")))
    study = admitted.study
    task, model = site.model(study, request.arrays.get("parameters"))
    forget(site, study)
    if study.protects_sites:
        budget = site.budget(admitted)
        if budget.is_open:
            budget.close()
        return Payload({"site": site.name, "privacy": budget.statement()})
    private = study.privacy.mode != "none"
    groups = groupings(task.schema, study.evaluation.subgroups)
    if groups:
        _, table = site.tables(task, study)
        table = table.take(counted_rows(table.patient_ids, study))
        exact = evaluate_groups(task, model, table, groups, private=private)
    else:
        _, held_out = site.examples(task, study)
        held_out = held_out.take(counted_rows(held_out.units.tolist(), study))
        exact = evaluate_model(task, model, held_out)
        exact = task.private_metrics(exact) if private else exact
    if not private:
        return Payload({"site": site.name, "privacy": {}}, dict(exact))
    asked = digest(request.arrays["parameters"].tobytes())
    sums = _release_privately(site, admitted, exact, asked)
    return Payload({"site": site.name, "privacy": site.budget(admitted).statement()}, dict(sums))


def take_release(site: LocalSite, request: Payload) -> Payload:
    """Verify a release, try it on the site's own patients, and hand it to the adapter.

    What is refused is kept with its reason at the site. Of what the patients said no figure
    leaves: the coordinator learns that it was refused, and not by how much.

    Raises:
        ReleaseRejected, SignatureInvalid: It was not taken; the store is as it was.
    """
    store = site.file.parent / site.site.serving.store
    study_hash = str(request.record.get("hash"))

    def try_on_patients(release: Release) -> None:
        trusted = pinned_publisher(site)
        judge(site, release, study_hash=study_hash, store=store, trusted=trusted)

    try:
        version = verify_release(site, request, store=store, judge=try_on_patients)
    except NotAccepted as refusal:
        keep_refusal(site, reason=str(refusal), verdict=refusal.verdict)
        # Not chained: nothing that explains the figure may travel with the error.
        raise ReleaseRejected(
            release="received", reason="it does not pass local acceptance at this site"
        ) from None
    except (ReleaseRejected, SignatureInvalid) as error:
        keep_refusal(site, reason=str(error))
        raise
    return Payload({"site": site.name, "version": version})


def verify_release(
    site: LocalSite,
    request: Payload,
    *,
    store: Path,
    judge: Callable[[Release], None] = lambda _: None,
) -> int:
    """Hold a release against the publisher that the site pinned, and put it into a store.

    Args:
        site: Whose store.
        request: Every file of the release as an array of bytes.
        store: Where to put it.
        judge: Has the last word on the verified release, before the store changes.

    Returns:
        Its version.

    Raises:
        ReleaseRejected, SignatureInvalid: It was not taken; the store is as it was.
    """
    trusted = pinned_publisher(site)
    files = {name: array.tobytes() for name, array in request.arrays.items()}
    release = receive_release(files, store=store, trusted=trusted, judge=judge)
    return int(release.signature.version)


def pinned_publisher(site: LocalSite) -> PublicIdentity:
    """The publisher whose releases this site takes.

    Raises:
        AdmissionRefused: None is pinned.
        ConfigError: The key that the site file names cannot be read.
    """
    pinned = site.site.serving.publisher
    if pinned is None:
        raise AdmissionRefused(
            site=site.name,
            policy="[serving] publisher",
            reason="no publisher's key is pinned here, so no release is taken",
        )
    try:
        pem = (site.file.parent / pinned).read_bytes()
    except OSError as error:
        raise ConfigError(
            f'= "{pinned}" cannot be read: {error.strerror}',
            file=str(site.file),
            key="[serving] publisher",
        ) from error
    return PublicIdentity.from_pem(pem)


def _release_privately(site: LocalSite, admitted: Admitted, exact: Sums, asked: str) -> Sums:
    budget = site.budget(admitted)
    shapes = {name: np.shape(exact[name]) for name in sorted(exact)}
    kept = site.metrics_outbox(admitted.study)
    before = kept.newest()
    if before is not None and before.asked == asked:
        return _unflatten(before.update, shapes)
    try:
        reservation = budget.reserve_evaluation()
    except (BudgetExceeded, ValueError) as error:
        raise UpdateRejected(
            site="coordinator", reason="metrics were released here already, for another model"
        ) from error
    flat = np.concatenate([np.asarray(exact[name], np.float64).ravel() for name in shapes])
    source = site.source(admitted.study, "evaluation", asked)
    sensitivity = budget.evaluation_sensitivity
    noisy = add_noise(
        flat, std=budget.evaluation_noise * sensitivity, sensitivity=sensitivity, source=source
    )
    kept.keep(Kept(1, asked, noisy))
    site.ledger.settle(reservation, update_digest=digest(noisy.tobytes()))
    budget.close()
    return _unflatten(noisy, shapes)


def _unflatten(flat: Vector, shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(flat.astype(np.float64), ends)
    return {
        name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
