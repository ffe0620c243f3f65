"""A hospital tries a release on its own patients before it takes it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from studies import EPSILON_4, NO_PRIVACY, write_study

from fedward.client.answers import admit_study, take_release
from fedward.client.app import refusal
from fedward.client.local_site import LocalSite
from fedward.core.errors import AdmissionRefused, FedwardError, ReleaseRejected, SignatureInvalid
from fedward.core.identity import Identity
from fedward.core.inbox import waiting
from fedward.core.study import Study, load_study
from fedward.server.publisher import publish
from fedward.serving.inbox import install_inbox
from fedward.serving.store import Store
from fedward.simulations.provision import provision
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.registry import get_task
from fedward.transport.payload import Payload

SITE = """\
[site]
name = "cleveland"
simulated = true
[data]
source = "embedded"
dataset = "heart-disease"
partition = "cleveland"
public_size = 303
[policy]
tasks = ["heart-disease"]
max_epsilon = 8.0
min_sites = 1
require_secure_aggregation = false
allow_no_privacy = true
{policy}
[serving]
publisher = "publisher.pem"
"""
PUBLISHER = Identity.generate_publisher()
TASK = get_task("heart-disease")
_BINNED = 2e-3  # a site counts probabilities in bins, scikit-learn ranks them
PRIVACY = {"mode": "none", "simulated": True}


def auroc_of(site: LocalSite, study: Study, parameters: Any) -> float:
    """By scikit-learn."""
    model = TASK.model("logistic")
    from_vector(model, parameters)
    held_out = site.examples(TASK, study)[1]
    with torch.no_grad():
        scores = model(torch.from_numpy(held_out.features)).numpy().ravel()
    return float(roc_auc_score(held_out.labels, scores))


@dataclass(frozen=True)
class Hospital:
    """A site that admitted a study, and models of known quality on its held-out patients."""

    folder: Path
    study: Study
    good: Any
    bad: Any

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def site(self, policy: str = "") -> LocalSite:
        """The site as its next process finds it."""
        (self.folder / "site.toml").write_text(SITE.format(policy=policy))
        return LocalSite(self.folder / "site.toml")

    def release(self, parameters: Any, *, study: Study | None = None) -> Payload:
        folder = publish(
            registry=self.folder / "registry",
            study=study or self.study,
            task=TASK,
            parameters=parameters,
            fitted=None,
            privacy=PRIVACY,
            metrics={},
            training={"rounds": 1, "sites": {}},
            identity=PUBLISHER,
        )
        files = {
            path.relative_to(folder).as_posix(): np.frombuffer(path.read_bytes(), np.uint8)
            for path in folder.rglob("*")
            if path.is_file()
        }
        return Payload({"hash": self.study.hash, "release": folder.name}, files)

    def serves(self, parameters: Any) -> None:
        take_release(self.site(), self.release(parameters))
        install_inbox(Store(self.store))

    def refused(self) -> list[dict[str, Any]]:
        lines = (self.folder / "state/refused.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def files(self) -> dict[str, bytes]:
        return {
            path.relative_to(self.store).as_posix(): path.read_bytes()
            for path in self.store.rglob("*")
            if path.is_file()
        }


def make_hospital(folder: Path, privacy: str) -> Hospital:
    study = load_study(write_study(folder, privacy=privacy))
    (folder / "publisher.pem").write_bytes(PUBLISHER.public.pem())
    hospital = Hospital(folder, study, None, None)
    site = hospital.site()
    admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))
    training = site.examples(TASK, study)[0]
    labels = 2.0 * training.labels - 1
    direction = (labels[:, None] * training.features).mean(axis=0)
    good = to_vector(TASK.model("logistic"))
    good[: len(direction)] = direction
    return Hospital(folder, study, good, -good)


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return make_hospital(tmp_path, NO_PRIVACY)


def test_a_release_at_the_floor_is_taken_and_one_below_is_not(hospital: Hospital) -> None:
    exact = auroc_of(hospital.site(), hospital.study, hospital.good)
    request = hospital.release(hospital.good)

    with pytest.raises(ReleaseRejected):
        take_release(hospital.site(f"min_auroc = {exact + _BINNED}"), request)
    before = waiting(hospital.store)
    answer = take_release(hospital.site(f"min_auroc = {exact - _BINNED}"), request)

    assert exact > 0.7
    assert before == []
    assert answer.record == {"site": "cleveland", "version": 1}
    assert len(waiting(hospital.store)) == 1


def test_what_was_refused_is_kept_and_the_store_stays_as_it_was(hospital: Hospital) -> None:
    hospital.serves(hospital.good)
    before = hospital.files()

    with pytest.raises(ReleaseRejected):
        take_release(hospital.site("min_auroc = 0.7"), hospital.release(hospital.bad))

    kept = hospital.refused()
    assert hospital.files() == before
    assert len(kept) == 1
    assert "min_auroc = 0.7" in kept[0]["reason"]
    assert kept[0]["verdict"]["auroc"] == pytest.approx(
        auroc_of(hospital.site(), hospital.study, hospital.bad), abs=_BINNED
    )
    assert (hospital.folder / "state/refused.jsonl").stat().st_mode & 0o077 == 0


def test_the_answer_is_the_same_word_whatever_the_figure(hospital: Hospital) -> None:
    answers = set()
    for share in (1.0, 0.5, 0.1):
        bad = hospital.bad.copy()
        bad[:5] *= share
        with pytest.raises(ReleaseRejected) as caught:
            take_release(hospital.site("min_auroc = 0.9999"), hospital.release(bad))
        answers.add(json.dumps(dict(refusal(caught.value).record)))
        assert caught.value.__cause__ is None

    figures = {entry["verdict"]["auroc"] for entry in hospital.refused()}
    assert len(figures) == 3
    assert len(answers) == 1
    assert json.loads(answers.pop())["kind"] == "ReleaseRejected"


@pytest.mark.parametrize(("margin", "taken"), [(-1e-3, False), (1e-3, True)])
def test_a_release_may_lose_no_more_than_the_margin_of_what_is_served(
    hospital: Hospital, margin: float, taken: bool
) -> None:
    worse = hospital.good.copy()
    worse[: len(worse) // 2] = 0
    site = hospital.site()
    loss = auroc_of(site, hospital.study, hospital.good) - auroc_of(site, hospital.study, worse)
    hospital.serves(hospital.good)
    judging = hospital.site(f"max_loss_of_auroc = {loss + margin}")

    if taken:
        assert take_release(judging, hospital.release(worse)).record["version"] == 2
    else:
        with pytest.raises(ReleaseRejected):
            take_release(judging, hospital.release(worse))

    assert loss > 0.01
    assert len(waiting(hospital.store)) == taken


def test_the_first_release_of_a_store_has_nothing_to_be_worse_than(hospital: Hospital) -> None:
    take_release(hospital.site("max_loss_of_auroc = 0.0"), hospital.release(hospital.bad))

    assert len(waiting(hospital.store)) == 1


def test_what_is_served_and_was_changed_compares_with_nothing(hospital: Hospital) -> None:
    hospital.serves(hospital.bad)
    (hospital.store / "releases/heart/1/card.html").write_bytes(b"changed")

    with pytest.raises(ReleaseRejected, match="local acceptance"):
        take_release(hospital.site("max_loss_of_auroc = 1.0"), hospital.release(hospital.good))

    assert "card.html" in hospital.refused()[0]["reason"]


def test_a_private_study_gets_one_verdict(tmp_path: Path) -> None:
    hospital = make_hospital(tmp_path, EPSILON_4)
    site = hospital.site("min_auroc = 0.6")

    take_release(site, hospital.release(hospital.good))
    take_release(site, hospital.release(hospital.good))  # published again after a crash
    with pytest.raises(ReleaseRejected):
        take_release(site, hospital.release(hospital.good * 2))

    assert len(waiting(hospital.store)) == 2
    assert [entry.get("verdict") for entry in hospital.refused()] == [None]


def test_a_private_study_says_that_the_verdict_is_not_covered(tmp_path: Path) -> None:
    hospital = make_hospital(tmp_path, EPSILON_4)
    plain, judging = hospital.site(), hospital.site("min_auroc = 0.6")
    admitted = plain.admitted(hospital.study.hash)

    assert "not_covered" not in plain.budget(admitted).statement()
    assert "held-out" in judging.budget(admitted).statement()["not_covered"]


def test_a_release_of_another_study_is_not_judged_for_this_one(hospital: Hospital) -> None:
    other = load_study(write_study(hospital.folder / "other", privacy=NO_PRIVACY, rounds=9))

    request = hospital.release(hospital.good, study=other)
    unknown = Payload({"hash": other.hash}, request.arrays)
    site = hospital.site("min_auroc = 0.1")

    with pytest.raises(ReleaseRejected):
        take_release(site, request)
    with pytest.raises(AdmissionRefused):
        take_release(site, unknown)

    assert "another study" in hospital.refused()[0]["reason"]
    assert waiting(hospital.store) == []


def _resigned(
    hospital: Hospital, change: Callable[[dict[str, bytes]], dict[str, bytes]]
) -> Payload:
    """A release that the publisher signed although its parts do not belong together."""
    from fedward.core.modelsigning import BUNDLE_NAME
    from fedward.server.registry import Registry

    request = hospital.release(hospital.good)
    files = {n: a.tobytes() for n, a in request.arrays.items() if n != BUNDLE_NAME}
    folder = Registry(hospital.folder / "again").add(
        "heart", lambda _: change(files), identity=PUBLISHER
    )
    arrays = {n: np.frombuffer(data, np.uint8) for n, data in change(files).items()}
    arrays[BUNDLE_NAME] = np.frombuffer((folder / BUNDLE_NAME).read_bytes(), np.uint8)
    return Payload(request.record, arrays)


def _other_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.numpy import load, save

    weights = load(files["model.safetensors"])
    return files | {"model.safetensors": save({n: 2 * a for n, a in weights.items()})}


def _infinite_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.numpy import load, save

    weights = load(files["model.safetensors"])
    return files | {"model.safetensors": save({n: a + np.inf for n, a in weights.items()})}


def _no_weights(files: dict[str, bytes]) -> dict[str, bytes]:
    from safetensors.numpy import save

    return files | {"model.safetensors": save({"other": np.zeros(3, np.float32)})}


def _no_study(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"training.json": b"{}"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_other_weights, "golden"),
        (_infinite_weights, "not finite"),
        (_no_weights, "do not fit"),
        (_no_study, "training.json"),
    ],
)
def test_parameters_that_are_not_the_served_models_are_refused(
    hospital: Hospital, change: Callable[[dict[str, bytes]], dict[str, bytes]], says: str
) -> None:
    with pytest.raises(ReleaseRejected, match="local acceptance"):
        take_release(hospital.site("min_auroc = 0.0"), _resigned(hospital, change))

    assert says in hospital.refused()[0]["reason"]
    assert waiting(hospital.store) == []


def test_a_bad_signature_is_refused_before_any_patient_is_asked(hospital: Hospital) -> None:
    request = hospital.release(hospital.good)
    spoilt = dict(request.arrays) | {"card.html": np.zeros(3, np.uint8)}

    with pytest.raises(SignatureInvalid):
        take_release(hospital.site("min_auroc = 0.1"), Payload(request.record, spoilt))

    assert "card.html" in hospital.refused()[0]["reason"]
    assert not (hospital.folder / "state/judged").exists()


@pytest.mark.parametrize(
    "line", ["min_auroc = 1.01", "max_loss_of_auroc = -0.1", "min_auroc = nan"]
)
def test_a_limit_that_is_none_is_an_error(hospital: Hospital, line: str) -> None:
    with pytest.raises(FedwardError, match=line.partition(" ")[0]):
        hospital.site(line)


def test_one_hospital_refuses_and_the_others_take_the_release(tmp_path: Path) -> None:
    file = write_study(tmp_path, privacy=EPSILON_4, rounds=2)
    run = prepare_run(file, tmp_path / "run")
    provision(run, load_study(file), study_file=file)
    strict = run.path / "sites" / "va.toml"
    strict.write_text(strict.read_text().replace("[policy]", "[policy]\nmin_auroc = 1.0"))

    result = simulate(file, run)

    said = {e["site"]: e.get("reason", "") for e in run.events() if "accepted" in e["event"]}
    refused = (run.path / "state/va/refused.jsonl").read_text()
    statement = json.loads((run.path / "release/privacy.json").read_text())["sites"]
    assert [site for site, reason in said.items() if reason] == ["va"]
    assert "local acceptance" in said["va"]
    assert not re.search(r"\d\.\d", said["va"])
    assert not (run.path / "stores/va/inbox").exists() or waiting(run.path / "stores/va") == []
    assert len(waiting(run.path / "stores/cleveland")) == 1
    assert "min_auroc = 1" in refused
    assert [site for site, part in statement.items() if "not_covered" in part] == ["va"]
    assert result["release"]
