"""Mode "distributed": every site adds a share, and the sum carries pooled DP-SGD's noise."""

import json
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats
from studies import write_study
from test_simulate import SITES

from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study
from fedward.privacy.accounting import DpEvent, PrivacySpent, privacy_spent
from fedward.privacy.mechanisms.stream import BitStream
from fedward.privacy.units import patient_guarantee
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate
from fedward.transport.sums import GradientSum, distributed_mechanism, sum_codec

DISTRIBUTED = 'mode = "distributed"\nepsilon = 4.0\ndelta = 1e-5\nclip_norm = 1.0'


def distributed_study(folder: Path, **study: Any) -> Path:
    file = write_study(folder, privacy=DISTRIBUTED, **study)
    file.write_text(file.read_text().replace("secure = false", "secure = true"))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    file = distributed_study(tmp_path_factory.mktemp("distributed"), rounds=20)
    run = prepare_run(file, file.parent / "run")
    return run, simulate(file, run)


def test_the_charge_is_that_of_pooled_dp_sgd_with_the_noise_of_the_fewest_sites(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, result = finished
    study = load_study(run.path / "study.toml")
    mechanism = distributed_mechanism(study, sites=4, size=28)

    for site in SITES:
        said = result["privacy"]["sites"][site]
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        step = dp_accounting.PoissonSampledDpEvent(
            0.3, dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, 20))
        ledger = LocalSite(run.path / "sites" / f"{site}.toml").ledger

        assert said["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)
        assert ledger.spent(1e-5).epsilon == pytest.approx(said["epsilon"], abs=1e-3)
        assert 3.9 < said["epsilon"] <= 4.0


def test_the_statement_names_each_adversary(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, _ = finished
    statement = json.loads((run.path / "release" / "privacy.json").read_text())
    against = {row["colluders"]: row["epsilon"] for row in statement["adversaries"]}

    assert against[0] == pytest.approx(statement["sites"]["va"]["epsilon"], abs=1e-2)
    assert against[2] > against[0]


def test_the_model_learns(finished: tuple[RunDirectory, dict[str, Any]]) -> None:
    _, result = finished

    assert result["metrics"]["pooled"]["auroc"] > 0.85


def _codec(study: Study) -> GradientSum:
    codec = sum_codec(study, sites=4, size=2000)
    assert isinstance(codec, GradientSum)
    return codec


def _sum_of_nothing(codec: GradientSum, shares: int) -> Any:
    """The decoded sum of `shares` sites whose patients all have no gradient, as a gradient."""
    total = np.zeros(2001, np.uint32)
    for _ in range(shares):
        empty = np.zeros(2000, np.float32)
        total += codec.encode(empty, weight=100.0, bits=BitStream.secure())
    update, weight = codec.decode(total)
    return -update.astype(np.float64) * codec.sample_rate * weight / codec.learning_rate


def test_the_sum_of_the_shares_has_the_calibrated_noise_and_one_share_less_has_not(
    tmp_path: Path,
) -> None:
    """False-alarm rate 1e-9: chi-square on 20,000 draws of a known variance."""
    study = load_study(distributed_study(tmp_path, rounds=20))
    codec = _codec(study)
    least = codec.mechanism.noise_multiplier * codec.mechanism.sensitivity

    def p_value(shares: int) -> float:
        draws = np.concatenate([_sum_of_nothing(codec, shares) for _ in range(10)])
        statistic = float((draws**2).sum()) / least**2
        return float(stats.chi2.cdf(statistic, df=draws.size))

    assert p_value(3) > 1e-9  # the fewest sites that a sum may hold
    assert p_value(2) < 1e-9  # one of them forgot its share


def test_more_patients_than_promised_are_cut_and_not_wrapped_around(tmp_path: Path) -> None:
    study = load_study(distributed_study(tmp_path, rounds=20))
    codec = _codec(study)
    huge = np.full(2000, 1e9, np.float32)

    update, _ = codec.decode(codec.encode(huge, weight=1e9, bits=BitStream.secure()))

    assert (update < 0).all()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("secure = true", "secure = false", r"\[aggregation\] secure = true"),
        ("local_steps = 1", "local_steps = 2", r"\[training\] local_steps = 1"),
        ("sample_rate = 0.3", "batch_size = 30", "sample_rate"),
        ("learning_rate = 1.0", "learning_rate = 1.0\nmomentum = 0.5", "momentum"),
        ("learning_rate = 1.0", 'learning_rate = 1.0\nschedule = "linear"', "schedule"),
    ],
)
def test_what_would_not_be_pooled_dp_sgd_is_refused(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    file = distributed_study(tmp_path, rounds=2)
    file.write_text(file.read_text().replace(old, new))
    run = prepare_run(file, tmp_path / "run")

    with pytest.raises(ConfigError, match=says):
        simulate(file, run)


def test_more_than_64_sites_share_masks_on_a_graph_whose_numbers_are_said(tmp_path: Path) -> None:
    file = distributed_study(tmp_path, rounds=1)
    text = file.read_text().replace(
        "min_sites = 3", 'min_sites = 60\nadversary = "honest-but-curious"'
    )
    file.write_text(
        f'{text}\n[simulation]\npartition = "dirichlet"\n'
        "[simulation.args]\nnum_sites = 66\nsize = 30\n"
    )
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    events = {event["event"]: event for event in run.events()}
    assert events["graph"]["neighbors"] < 65
    assert events["graph"]["collusion"] <= -40
    assert events["round"]["sites"] == 66


def test_more_than_64_sites_against_a_malicious_coordinator_is_refused(tmp_path: Path) -> None:
    file = distributed_study(tmp_path, rounds=1)
    file.write_text(
        f'{file.read_text()}\n[simulation]\npartition = "dirichlet"\n'
        "[simulation.args]\nnum_sites = 66\nsize = 30\n"
    )
    run = prepare_run(file, tmp_path / "run")

    with pytest.raises(ConfigError, match=r"\[aggregation\] adversary.*honest-but-curious"):
        simulate(file, run)


def test_against_each_adversary_an_epsilon_per_record_says_what_it_means_for_patients(
    tmp_path: Path,
) -> None:
    file = distributed_study(tmp_path, rounds=20)
    file.write_text(file.read_text().replace("epsilon = 4.0", 'unit = "record"\nepsilon = 2.0'))
    run = prepare_run(file, tmp_path / "run")

    result = simulate(file, run)

    study = load_study(file)
    mechanism = distributed_mechanism(study, sites=4, size=28)
    rows = {row["colluders"]: row for row in result["privacy"]["adversaries"]}
    for colluders, row in rows.items():
        event = mechanism.against(survivors=3, colluders=colluders).event(sample_rate=0.3, steps=20)
        alone = result["privacy"]["sites"]["va"]["patients"] if not colluders else None
        assert [one["records"] for one in row["patients"]] == [2, 5, 10]
        for number, one in enumerate(row["patients"]):
            exact = patient_guarantee(event, records=one["records"], delta=1e-5).epsilon
            assert one["unit"] == "patient"
            if one["epsilon"] is None:
                # Beyond 30, what the discrete noise may fail with would eat up delta.
                assert exact > 29
                continue
            assert one["epsilon"] == pytest.approx(exact, abs=2e-2)
            assert one["epsilon"] > row["epsilon"]
            if alone is not None:
                assert one["epsilon"] == pytest.approx(alone[number]["epsilon"], abs=2e-2)
    assert rows[0]["patients"][0]["epsilon"] < rows[2]["patients"][0]["epsilon"]
    write_report(run)
    report = (run.path / "report.html").read_text()
    assert "per patient with 10 records" in report
    assert f"{rows[2]['patients'][0]['epsilon']:.3f}" in report


def test_nothing_is_promised_where_the_discrete_noise_may_fail_more_often_than_delta(
    tmp_path: Path,
) -> None:
    study = load_study(distributed_study(tmp_path, rounds=20))
    mechanism = distributed_mechanism(study, sites=4, size=28)

    def price(event: DpEvent, delta: float) -> PrivacySpent:
        return privacy_spent(event, delta=delta, unit="patient")

    with pytest.raises(ValueError, match="fails with"):
        mechanism.bound(price, sample_rate=0.3, steps=20, delta=1e-5, ceiling=60.0)
    with pytest.raises(ValueError, match="add noise"):
        mechanism.bound(price, sample_rate=0.3, steps=20, delta=1e-5, ceiling=1.0)
