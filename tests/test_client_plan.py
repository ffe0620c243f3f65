"""What a site runs comes from public numbers; what is charged is what it runs."""

from pathlib import Path

import pytest
from test_simulate_units import PATIENT, consortium, write_visits

from fedward.client.answers import admit_study
from fedward.client.local_site import LocalSite
from fedward.client.plan import plan_site, training_plan
from fedward.client.training.loop import event_of
from fedward.core.errors import AdmissionRefused
from fedward.core.study import load_study
from fedward.privacy import accounting
from fedward.privacy.accounting.events import leaves
from fedward.transport.payload import Payload


def test_the_number_of_patients_changes_nothing_that_is_run_or_charged(tmp_path: Path) -> None:
    plans, charged = [], []
    for patients in (20, 60, 61):
        folder = tmp_path / str(patients)
        file = consortium(folder, privacy=PATIENT)
        file.write_text(file.read_text().replace("sample_rate = 0.3", "batch_size = 16"))
        write_visits(folder / "sites" / "a.csv", patients=patients)
        study, site = load_study(file), LocalSite(folder / "sites" / "a.toml")

        admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))

        plans.append(site.admitted(study.hash).plan)
        charged.append([entry.event for entry in site.ledger.entries() if entry.kind == "allot"])
    assert plans[0] == plans[1] == plans[2]
    assert charged[0] == charged[1] == charged[2]
    assert plans[0].sample_rate == 16 / (120 * 0.7)  # the public size, less what is held out


def test_what_is_charged_is_what_the_trainer_says_that_it_ran(tmp_path: Path) -> None:
    study = load_study(consortium(tmp_path, privacy=PATIENT))
    site = LocalSite(tmp_path / "sites" / "a.toml")
    admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))
    admitted = site.admitted(study.hash)

    for number in range(1, study.study.rounds + 1):
        site.budget(admitted).reserve_round(number)

    ran = event_of(training_plan(study, admitted.plan, round_number=1))
    assert ran is not None
    reserved = [e.event for e in site.ledger.entries() if e.kind == "reserve"]
    assert [leaves(event) for event in reserved] == [leaves(ran)] * study.study.rounds


def test_a_batch_that_the_public_size_does_not_give_is_refused(tmp_path: Path) -> None:
    file = consortium(tmp_path, privacy=PATIENT)
    file.write_text(file.read_text().replace("sample_rate = 0.3", "batch_size = 500"))

    with pytest.raises(AdmissionRefused, match="batch_size = 500"):
        plan_site(load_study(file), LocalSite(tmp_path / "sites" / "a.toml").site)


def test_there_is_no_accountant_that_may_say_too_little() -> None:
    assert not [name for name in dir(accounting) if "gdp" in name.lower() or "clt" in name.lower()]
    assert set(accounting.pricing.Accountant.__args__) == {"pld", "rdp"}  # type: ignore[attr-defined]  # of a Literal
