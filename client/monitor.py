"""A site's reference histograms: counted once, noised, paid for, and sent."""

import numpy as np
import torch
from numpy.typing import NDArray

from fedward.client.local_site import Admitted, LocalSite
from fedward.client.outbox import Kept
from fedward.client.secure import MaskedRound
from fedward.core.canonical import digest
from fedward.core.errors import BudgetExceeded, UpdateRejected
from fedward.core.study import Study
from fedward.privacy.ledger import Reservation
from fedward.privacy.mechanisms import add_noise
from fedward.tasks import reference
from fedward.transport.monitor import (
    monitor_layout,
    monitor_records,
    monitor_round,
    monitor_sensitivity,
)
from fedward.transport.payload import Payload


def release_histograms(site: LocalSite, request: Payload) -> Payload:
    """Histograms of the training patients' inputs, and of the model's answers to them.

    In mode "local" the site noises them by itself, in mode "distributed" it adds its share of the
    noise and masks; under secure aggregation they are masked in any case. They are released once;
    asked again for the same model, a site that did not mask answers with the same.

    Raises:
        AdmissionRefused, UpdateRejected: Nothing was released.
    """
    admitted = site.admitted(str(request.record.get("hash")))
    study = admitted.study
    if study.monitor is None:
        raise UpdateRejected(site="coordinator", reason="the study has no [monitor]")
    number = monitor_round(study)
    if request.record.get("round") != number:
        raise UpdateRejected(site="coordinator", reason=f"histograms are of round {number}")
    parameters = site.check_parameters(study, request.arrays.get("parameters"))
    masked = MaskedRound(site, request) if study.aggregation.secure else None
    asked = digest(parameters.tobytes())
    if masked is None and study.privacy.mode != "none":
        kept = site.monitor_outbox(study).newest()
        if kept is not None and kept.asked == asked:
            return _send(site, study, None, kept.update)
    counts = count_histograms(site, study, parameters)
    if study.privacy.mode == "none":
        return _send(site, study, masked, counts)
    reservation = _reserve(site, admitted)
    released: NDArray[np.floating] = counts
    if study.privacy.mode == "local":
        sensitivity = monitor_sensitivity(study)
        released = add_noise(
            counts,
            std=admitted.plan.monitor_noise * sensitivity,
            sensitivity=sensitivity,
            source=site.source(study, "monitor", asked),
        )
        site.monitor_outbox(study).keep(Kept(number, asked, np.asarray(released, np.float32)))
    answer = _send(site, study, masked, released)
    (sent,) = answer.arrays.values()
    site.ledger.settle(reservation, update_digest=digest(sent.tobytes()))
    return answer


def count_histograms(
    site: LocalSite, study: Study, parameters: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The exact counts, which never leave a private study's site as they are."""
    task, model = site.model(study, parameters)
    table, _ = site.tables(task, study)
    if study.privacy.unit != "record" and study.privacy.mode != "none":
        table = table.take(reference.first_rows(table.patient_ids, most=monitor_records(study)))
    examples = task.prepare(table, None)
    model.eval()
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.asarray(examples.features)))
    predictions = task.probabilities(outputs).numpy()
    return reference.count(monitor_layout(study), table.columns, predictions)


def _reserve(site: LocalSite, admitted: Admitted) -> Reservation:
    try:
        return site.budget(admitted).reserve_monitor()
    except (BudgetExceeded, ValueError) as error:
        raise UpdateRejected(
            site="coordinator", reason="histograms were released here already"
        ) from error


def _send(
    site: LocalSite, study: Study, masked: MaskedRound | None, counts: NDArray[np.floating]
) -> Payload:
    """Counts as they leave: masked under secure aggregation, with their share of noise if any."""
    values = np.asarray(counts, np.float32)
    if masked is None:
        record = {"site": site.name, "round": monitor_round(study)}
        return Payload(record, {"counts": values})
    return masked.mask(values, weight=1.0)
