"""Audit rounds: sums of groups find a site that does not clip, and cost honest runs nothing."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import model_of

from fedward.client.answers import admit_study, train_round
from fedward.client.local_site import LocalSite
from fedward.client.secure import MaskedRound, send_key
from fedward.core.errors import AdmissionRefused, AggregationAborted, ConfigError, UpdateRejected
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.roster import load_roster
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study
from fedward.privacy.mechanisms.encoding import FixedPoint
from fedward.privacy.secagg import Terms
from fedward.server.channel import FlowerChannel, Reply
from fedward.simulations.provision import provision
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate
from fedward.simulations.sites import LocalSites
from fedward.strategies.strategy import Vector
from fedward.transport.payload import Payload
from fedward.transport.sums import UpdateSum, clip_by_norm, sum_codec

CLIP_NORM = 0.5
_LOST = ("train.update", 2)


def audited_study(folder: Path, *, audits: str = "", sites: int = 6, **study: Any) -> Path:
    """A study of simulated sites that clip."""
    file = write_study(folder, **{"privacy": NO_PRIVACY, "rounds": 3, **study})
    secure = f"secure = true\nclip_norm = {CLIP_NORM}\n{audits}"
    spread = (
        f'\n[simulation]\npartition = "dirichlet"\n'
        f"[simulation.args]\nnum_sites = {sites}\nsize = 60\n"
    )
    file.write_text(file.read_text().replace("secure = false", secure) + spread)
    return file


def run_study(file: Path) -> RunDirectory:
    run = prepare_run(file, file.parent / "run")
    simulate(file, run)
    return run


def suspected(run: RunDirectory) -> list[set[str]]:
    return [set(e["site"].split(", ")) for e in run.events() if e["event"] == "suspect"]


def summed(run: RunDirectory) -> list[int]:
    return [e["sites"] for e in run.events() if e["event"] == "round"]


def provisioned(file: Path) -> tuple[RunDirectory, Study, dict[str, LocalSite]]:
    run = prepare_run(file, file.parent / "run")
    study = load_study(file)
    sites = [LocalSite(path) for path in provision(run, study, study_file=file).sites]
    return run, study, {site.name: site for site in sites}


def lying(
    monkeypatch: pytest.MonkeyPatch, liar: str, *, factor: float = 1.0, heavier: float = 1.0
) -> None:
    """Let one site multiply what it has clipped, or its weight."""
    original = MaskedRound.mask

    def mask(masked: MaskedRound, vector: Vector, *, weight: float) -> Payload:
        if masked._site.name == liar:
            vector, weight = vector * np.float32(factor), weight * heavier
        return original(masked, vector, weight=weight)

    monkeypatch.setattr(MaskedRound, "mask", mask)


@pytest.mark.parametrize(
    ("privacy", "sites"), [(NO_PRIVACY, 6), (EPSILON_4, 8)], ids=["none", "local, one batch"]
)
def test_an_honest_run_names_nobody_and_gives_the_model_of_a_run_without_audits(
    tmp_path: Path, privacy: str, sites: int
) -> None:
    without = run_study(audited_study(tmp_path / "without", privacy=privacy, sites=sites))

    audited = run_study(
        audited_study(
            tmp_path / "with", audits="audit_rounds = [1, 3]", privacy=privacy, sites=sites
        )
    )

    assert suspected(audited) == []
    assert summed(audited) == [sites] * 3
    np.testing.assert_allclose(model_of(audited), model_of(without), atol=2e-5, rtol=0)


def test_a_site_may_be_a_new_process_for_each_message_of_an_audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run_study(audited_study(tmp_path / "kept", audits="audit_rounds = [2]"))
    monkeypatch.setattr(LocalSites, "__getitem__", lambda _, file: LocalSite(file))

    forgetful = run_study(audited_study(tmp_path / "forgetful", audits="audit_rounds = [2]"))

    assert summed(forgetful) == [6, 6, 6]
    np.testing.assert_array_equal(model_of(forgetful), model_of(kept))


def test_a_site_that_does_not_clip_is_in_every_suspected_group_and_at_last_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [1, 2, 3, 4, 5]", rounds=6)
    liar = sorted(provisioned(audited_study(tmp_path / "names"))[2])[2]
    lying(monkeypatch, liar, factor=1000)
    shuffling = random.Random(5)  # so that the groups of this test differ enough
    monkeypatch.setattr("fedward.privacy.secagg.audit.secrets.SystemRandom", lambda: shuffling)

    run = run_study(file)

    assert len(suspected(run)) == 5
    write_report(run)
    assert "was not clipped" in (run.path / "report.html").read_text()
    assert set.intersection(*suspected(run)) == {liar}
    assert summed(run) == [3, 3, 3, 3, 3, 6]


def test_a_site_that_lies_about_its_weight_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [1]", rounds=1)
    liar = min(provisioned(audited_study(tmp_path / "names"))[2])
    lying(monkeypatch, liar, heavier=-50.0)

    run = run_study(file)

    (group,) = suspected(run)
    assert liar in group


def test_a_site_that_weighs_more_than_any_may_is_suspected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five times `max_weight`, at a mean within the clip norm."""
    file = audited_study(tmp_path, audits="audit_rounds = [1]", rounds=1)
    liar = min(provisioned(audited_study(tmp_path / "names"))[2])
    original = MaskedRound.mask

    def mask(masked: MaskedRound, vector: Vector, *, weight: float) -> Payload:
        if masked._site.name != liar:
            return original(masked, vector, weight=weight)
        with monkeypatch.context() as forging:
            forging.setattr("fedward.client.secure.sum_codec", heavy_codec)
            return original(masked, vector, weight=1e9)

    def heavy_codec(study: Study, *, sites: int, size: int) -> UpdateSum:
        granule = sum_codec(study, sites=sites, size=size).granularity
        return UpdateSum(study.aggregation, FixedPoint(granularity=granule / 5, bound=1.0))

    monkeypatch.setattr(MaskedRound, "mask", mask)

    run = run_study(file)

    (event,) = [e for e in run.events() if e["event"] == "suspect"]
    assert liar in event["site"]
    assert "max_weight" in event["reason"]


def losing(monkeypatch: pytest.MonkeyPatch, sites: int) -> None:
    """Lose the masked vectors of the first sites in round 2."""
    original = FlowerChannel.ask

    def ask(
        channel: FlowerChannel,
        kind: str,
        payloads: Mapping[int, Payload],
        *,
        round_number: int,
        deadline: float,
    ) -> Iterator[Reply]:
        lost = set(channel.node_ids()[:sites]) if (kind, round_number) == _LOST else set()
        for reply in original(
            channel, kind, payloads, round_number=round_number, deadline=deadline
        ):
            gone = Reply(reply.node_id, None, "connection lost")
            yield gone if reply.node_id in lost else reply

    monkeypatch.setattr(FlowerChannel, "ask", ask)


def test_a_group_below_its_threshold_is_void_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 1)

    run = run_study(audited_study(tmp_path, audits="audit_rounds = [2]"))

    assert [e["round"] for e in run.events() if e["event"] == "void group"] == [2]
    assert summed(run) == [6, 3, 6]


def test_without_any_group_left_the_round_is_void(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, 4)

    with pytest.raises(AggregationAborted, match="round 2 is void"):
        run_study(audited_study(tmp_path, audits="audit_rounds = [2]"))


class Asked:
    """One site of six that has agreed on keys with all, and a coordinator that asks it."""

    def __init__(self, folder: Path) -> None:
        file = audited_study(folder, audits="audit_rounds = [2, 4]", rounds=5)
        run, self.study, sites = provisioned(file)
        self.roster = load_roster(run.path / "roster.toml")
        self.name, self.site = min(sites.items())
        self.others = [name for name in sorted(sites) if name != self.name]
        record = {"hash": self.study.hash, "study": self.study.agreed()}
        admit_study(self.site, Payload(record))
        self.agree(self.roster)

    def agree(
        self,
        roster: Mapping[str, PublicIdentity],
        *,
        audit: int | None = None,
        terms: Terms | None = None,
        **more: Any,
    ) -> Terms:
        terms = terms or Terms.propose(study=self.study.hash, roster=roster, length=29, **more)
        asked = {} if audit is None else {"audit": audit}
        record = {"hash": self.study.hash, "terms": terms.to_json(), **asked}
        send_key(self.site, Payload(record))
        return terms

    def group(self, *others: int) -> dict[str, PublicIdentity]:
        names = [self.name, *(self.others[i] for i in others)]
        return {name: self.roster[name] for name in names}

    def train(self, number: int, **audit: int) -> Payload:
        arrays: dict[str, np.ndarray[Any, Any]] = {
            "parameters": np.zeros(28, np.float32),
            "secagg": np.zeros(40, np.uint8),
        }
        return train_round(
            self.site, Payload({"hash": self.study.hash, "round": number, **audit}, arrays)
        )


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def test_a_site_refuses_an_audit_round_that_its_study_does_not_name(asked: Asked) -> None:
    for number in (1, 3, 6):
        with pytest.raises(UpdateRejected, match=f"audit_rounds has no round {number}"):
            asked.agree(asked.group(0, 1), audit=number)


def test_a_site_refuses_a_group_without_itself_or_with_a_stranger(asked: Asked) -> None:
    without = {name: asked.roster[name] for name in asked.others[:3]}
    invented = {**asked.group(0, 1), "stranger": Identity.generate_site().public}
    swapped = {**asked.group(0, 1), asked.others[1]: Identity.generate_site().public}

    for group in (without, invented, swapped):
        with pytest.raises(AdmissionRefused, match="other sites or identities"):
            asked.agree(group, audit=2)


def test_a_part_of_the_roster_is_no_agreement_of_the_run(asked: Asked) -> None:
    with pytest.raises(AdmissionRefused, match="other sites or identities"):
        asked.agree(asked.group(0, 1))


def test_a_site_refuses_a_group_below_its_own_least_or_that_of_the_study(asked: Asked) -> None:
    policy = asked.site.site.policy.model_copy(update={"min_sites": 4})
    asked.site.site = asked.site.site.model_copy(update={"policy": policy})

    with pytest.raises(AdmissionRefused, match="min_sites = 4"):
        asked.agree(asked.group(0, 1), audit=2)
    with pytest.raises(ValueError, match="min_sites must be"):
        asked.agree(asked.group(0, 1), audit=2, min_sites=4)
    asked.agree(asked.group(0, 1, 2), audit=2, min_sites=4)


def test_a_site_holds_the_least_of_the_study_as_well(tmp_path: Path) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [2]")
    file.write_text(file.read_text().replace("min_sites = 3", "min_sites = 4"))
    run, study, sites = provisioned(file)
    roster, name = load_roster(run.path / "roster.toml"), min(sites)
    policy = sites[name].site.policy.model_copy(update={"min_sites": 3})
    sites[name].site = sites[name].site.model_copy(update={"policy": policy})
    admit_study(sites[name], Payload({"hash": study.hash, "study": study.agreed()}))
    terms = Terms.propose(study=study.hash, roster=roster, length=29, min_sites=3)

    with pytest.raises(AdmissionRefused, match="min_sites = 4 of the study"):
        send_key(sites[name], Payload({"hash": study.hash, "terms": terms.to_json()}))


def test_a_site_is_in_one_group_a_round_and_in_no_older_one(asked: Asked) -> None:
    terms = asked.agree(asked.group(0, 1), audit=2)
    asked.agree(asked.group(0, 1), audit=2, terms=terms)  # its answer may have been lost

    with pytest.raises(UpdateRejected, match="there is one a round"):
        asked.agree(asked.group(2, 3), audit=2)
    with pytest.raises(UpdateRejected, match="there is one a round"):
        asked.agree(asked.group(0, 1), audit=2)
    asked.agree(asked.group(2, 3), audit=4)
    with pytest.raises(UpdateRejected, match="there is one a round"):
        asked.agree(asked.group(0, 1), audit=2, terms=terms)
    asked.agree(asked.roster)  # a new agreement of the run opens nothing again
    with pytest.raises(UpdateRejected, match="there is one a round"):
        asked.agree(asked.group(0, 1), audit=4)


def test_a_round_is_asked_of_groups_or_of_all_as_the_study_says(asked: Asked) -> None:
    asked.agree(asked.group(0, 1), audit=2)

    with pytest.raises(UpdateRejected, match="an audit round is asked of groups"):
        asked.train(2)
    with pytest.raises(UpdateRejected, match="an audit round is asked of groups"):
        asked.train(3, audit=2)
    with pytest.raises(UpdateRejected, match="no keys were agreed on for audit round 4"):
        asked.train(4, audit=4)


def test_after_a_run_its_audit_rounds_stay_closed_and_the_keys_are_gone(tmp_path: Path) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [2]", rounds=2)
    run = run_study(file)
    study, roster = load_study(file), load_roster(run.path / "roster.toml")
    names = sorted(roster)
    site = LocalSite(run.path / "sites" / f"{names[0]}.toml")
    assert json.loads(site.session_file(study).read_text()) == {"last_round": 2}
    everybody = Terms.propose(study=study.hash, roster=roster, length=29)
    send_key(site, Payload({"hash": study.hash, "terms": everybody.to_json()}))
    group = {name: roster[name] for name in names[:3]}
    terms = Terms.propose(study=study.hash, roster=group, length=29)

    with pytest.raises(UpdateRejected, match="round 2 was answered here already"):
        send_key(site, Payload({"hash": study.hash, "terms": terms.to_json(), "audit": 2}))


def test_terms_weaker_than_the_study_are_refused(asked: Asked) -> None:
    with pytest.raises(AdmissionRefused, match='adversary = "malicious"'):
        asked.agree(asked.roster, adversary="honest-but-curious")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("clip_norm = 0.5", "", r"audit_rounds needs \[aggregation\] clip_norm"),
        ("secure = true", "secure = false", r"audit_rounds needs \[aggregation\] secure = true"),
        ("audit_rounds = [1]", "audit_rounds = [9]", r"beyond \[study\] rounds = 3"),
        ("audit_rounds = [1]", "audit_rounds = [0]", r"audit_rounds"),
        (NO_PRIVACY, 'mode = "distributed"\nepsilon = 4.0', r'mode = "distributed".*clip_norm'),
    ],
)
def test_what_does_not_go_with_an_audit_is_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [1]")
    file.write_text(file.read_text().replace(old, new))

    with pytest.raises(ConfigError, match=says):
        load_study(file)


def test_too_few_sites_for_two_groups_are_refused_at_the_start(tmp_path: Path) -> None:
    file = audited_study(tmp_path, audits="audit_rounds = [1]", sites=5)

    with pytest.raises(ConfigError, match=r"audit_rounds needs two groups.*min_sites = 3"):
        run_study(file)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40),
    clip_norm=st.floats(1e-3, 1e3),
)
def test_what_leaves_is_never_longer_than_the_clip_norm(
    values: list[float], clip_norm: float
) -> None:
    update = np.array(values, np.float32)

    sent = clip_by_norm(update, clip_norm=clip_norm).astype(np.float64)
    sent[~np.isfinite(sent)] = 0  # so the codec counts it

    assert np.linalg.norm(sent) <= clip_norm * (1 + 1e-6)
