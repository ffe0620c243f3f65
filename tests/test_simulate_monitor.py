"""`monitor.json` in whole runs: paid for, noised, summed, and good for noticing drift."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_real_sites import write_csv
from test_simulate import SITES, model_of
from test_simulate_distributed import DISTRIBUTED

from fedward.client.answers import admit_study, train_round
from fedward.client.local_site import LocalSite
from fedward.client.monitor import count_histograms, release_histograms
from fedward.core.errors import ConfigError, UpdateRejected
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study
from fedward.privacy.mechanisms.stream import BitStream
from fedward.serving.catalogue import Catalogue
from fedward.serving.drift import PREDICTION, parse_monitor
from fedward.serving.inbox import install_inbox
from fedward.serving.store import Store
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, released_parameters, simulate
from fedward.tasks import datasets
from fedward.tasks.parameters import to_vector
from fedward.tasks.reference import size
from fedward.tasks.registry import get_task
from fedward.transport.monitor import (
    NoisedCountSum,
    local_monitor_noise,
    monitor_codec,
    monitor_layout,
    monitor_mechanism,
    monitor_round,
    monitor_sensitivity,
)
from fedward.transport.payload import Payload

ROUNDS = 6
ON = "\n[monitor]\nepsilon = 1.0\n"


def run_study(
    folder: Path, *, extra: str = ON, secure: bool = False, **study: Any
) -> tuple[RunDirectory, dict[str, Any]]:
    file = write_study(folder, rounds=ROUNDS, extra=extra, **study)
    if secure:
        file.write_text(file.read_text().replace("secure = false", "secure = true"))
    run = prepare_run(file, folder / "run")
    return run, simulate(file, run)


def released(run: RunDirectory, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run.path / "release" / name).read_text())
    return value


def exact_counts(run: RunDirectory) -> Any:
    study = load_study(run.path / "study.toml")
    parameters = released_parameters(run, study)
    sites = [LocalSite(run.path / "sites" / f"{site}.toml") for site in SITES]
    return np.sum([count_histograms(site, study, parameters) for site in sites], axis=0)


def errors_of(run: RunDirectory) -> list[float]:
    """What noise did to every share that is not at the edge of what a share can be."""
    study = load_study(run.path / "study.toml")
    layout, monitor = monitor_layout(study), parse_monitor(released(run, "monitor.json"))
    parts = np.split(exact_counts(run), np.cumsum([one.cells for one in layout])[:-1])
    return [
        float(given - true)
        for one, part in zip(layout, parts, strict=True)
        for given, true in zip(monitor[one.name].whole, part / part.sum(), strict=False)
    ]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    return run_study(tmp_path_factory.mktemp("local"))


# --- what it costs -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["local", "distributed"])
def test_the_ledger_charges_it_jointly_with_training_as_dp_accounting_does(
    tmp_path: Path, local: tuple[RunDirectory, dict[str, Any]], mode: str
) -> None:
    run, result = (
        local if mode == "local" else run_study(tmp_path, privacy=DISTRIBUTED, secure=True)
    )

    for site in SITES:
        said = result["privacy"]["sites"][site]
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        step = dp_accounting.PoissonSampledDpEvent(
            0.3, dp_accounting.GaussianDpEvent(said["noise_multiplier"])
        )
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, ROUNDS))
        training_alone = accountant.get_epsilon(1e-5)
        histograms = said["monitor"]["noise_multiplier"]
        accountant.compose(dp_accounting.GaussianDpEvent(histograms))
        alone = pld.PLDAccountant(value_discretization_interval=1e-3)
        alone.compose(dp_accounting.GaussianDpEvent(histograms))
        ledger = LocalSite(run.path / "sites" / f"{site}.toml").ledger

        assert said["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), abs=1e-3)
        assert ledger.spent(1e-5).epsilon == pytest.approx(said["epsilon"], abs=1e-3)
        assert training_alone < said["epsilon"] <= 4.0
        assert said["epsilon"] > 3.9
        assert alone.get_epsilon(1e-5) == pytest.approx(1.0, abs=0.02)
        assert alone.get_epsilon(1e-5) <= 1.001
        own = [e for e in ledger.entries() if e.kind == "reserve" and e.round_number == ROUNDS + 1]
        assert len(own) == 1
        assert own[0].event == dp_accounting.GaussianDpEvent(histograms)
        ledger.verify()


def test_the_report_says_that_its_epsilon_includes_the_histograms(tmp_path: Path) -> None:
    with_histograms, result = run_study(tmp_path / "with")
    without, _ = run_study(tmp_path / "without", extra="")
    noise = next(iter(result["privacy"]["sites"].values()))["monitor"]["noise_multiplier"]
    says = f"Both include one release of histograms for drift (noise multiplier {noise:.3f})."

    assert says in write_report(with_histograms).read_text()
    assert "histograms for drift" not in write_report(without).read_text()


def test_the_adversaries_of_a_distributed_run_see_the_histograms_too(tmp_path: Path) -> None:
    run, result = run_study(tmp_path, privacy=DISTRIBUTED, secure=True)
    against = {
        row["colluders"]: row["epsilon"] for row in released(run, "privacy.json")["adversaries"]
    }

    assert against[0] == pytest.approx(result["privacy"]["sites"]["va"]["epsilon"], abs=1e-2)


# --- the noise ---------------------------------------------------------------------------------


def real_site(folder: Path, study: Study) -> tuple[LocalSite, np.ndarray[Any, Any]]:
    """A site that is not simulated, with the study admitted and trained to its end."""
    folder.mkdir()
    write_csv(folder / "patients.csv", "va")
    (folder / "site.toml").write_text(
        '[site]\nname = "va"\n[data]\nsource = "csv"\npath = "patients.csv"\npatient_id = "pid"\n'
        'public_size = 200\n[data.columns]\nage = "AGE_YRS"\n'
        'cholesterol = { column = "CHOL_MMOL", factor = 38.67 }\n'
        '[policy]\ntasks = ["heart-disease"]\nmax_epsilon = 6.0\nmin_sites = 3\n'
        "require_secure_aggregation = false\n"
    )
    site = LocalSite(folder / "site.toml")
    admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))
    parameters = to_vector(get_task("heart-disease").model("logistic"))
    for number in range(1, ROUNDS + 1):
        asked = {"hash": study.hash, "round": number}
        train_round(site, Payload(asked, {"parameters": parameters}))
    return site, parameters


def ask_histograms(site: LocalSite, study: Study, parameters: Any, **changes: Any) -> Payload:
    asked = {"hash": study.hash, "round": monitor_round(study), **changes}
    return release_histograms(site, Payload(asked, {"parameters": parameters}))


def test_a_real_site_adds_secure_noise_of_the_calibrated_size(tmp_path: Path) -> None:
    """False-alarm rate 1e-9: chi-square on some 500 draws of a known variance."""
    file = write_study(tmp_path, rounds=ROUNDS, extra=ON + "bins = 50\n")
    study = load_study(file)
    site, parameters = real_site(tmp_path / "va", study)

    counts = ask_histograms(site, study, parameters).arrays["counts"].astype(np.float64)

    assert site.source(study).private
    std = 3.7 * np.sqrt(14)  # noise multiplier of epsilon 1 at delta 1e-5, on 14 histograms
    noise = site.admitted(study.hash).plan.monitor_noise * monitor_sensitivity(study)
    assert noise == pytest.approx(std, rel=0.02)
    draws = counts - count_histograms(site, study, parameters)
    assert draws.size == size(monitor_layout(study)) > 350
    p_value = float(stats.chi2.cdf((draws**2).sum() / noise**2, df=draws.size))
    assert 1e-9 < p_value < 1 - 1e-9
    half = float(stats.chi2.cdf((draws**2).sum() / (noise / 2) ** 2, df=draws.size))
    assert half > 1 - 1e-9  # half the noise would have been noticed


def test_it_is_released_once_and_asked_again_the_same_bytes_leave(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, rounds=ROUNDS, extra=ON))
    site, parameters = real_site(tmp_path / "va", study)
    first = ask_histograms(site, study, parameters)
    entries = len(site.ledger.entries())

    again = ask_histograms(LocalSite(site.file), study, parameters)

    assert again.arrays["counts"].tobytes() == first.arrays["counts"].tobytes()
    with pytest.raises(UpdateRejected, match="already"):
        ask_histograms(site, study, parameters + np.float32(1))
    assert len(site.ledger.entries()) == entries


def test_a_site_counts_only_what_its_study_says(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, rounds=ROUNDS, extra=ON))
    site, parameters = real_site(tmp_path / "va", study)
    off = load_study(write_study(tmp_path / "off", rounds=ROUNDS))
    admit_study(LocalSite(site.file), Payload({"study": off.agreed(), "hash": off.hash}))

    with pytest.raises(UpdateRejected, match="round 7"):
        ask_histograms(site, study, parameters, round=3)
    with pytest.raises(UpdateRejected, match=r"no \[monitor\]"):
        release_histograms(
            LocalSite(site.file),
            Payload({"hash": off.hash, "round": 7}, {"parameters": parameters}),
        )


def test_the_sum_is_the_truth_with_the_noise_that_the_release_names(
    local: tuple[RunDirectory, dict[str, Any]],
) -> None:
    """False-alarm rate 1e-9: no share is off by more than 6.5 of its standard deviations."""
    run, _ = local
    made = released(run, "monitor.json")["made"]
    patients = exact_counts(run).sum() / 14

    off = np.abs(errors_of(run))

    assert made["sites"] == 4
    assert off.max() < 6.5 * made["noise_std"] / patients
    assert off.max() > 0


@pytest.mark.parametrize("privacy", [EPSILON_4, DISTRIBUTED], ids=["local", "distributed"])
def test_under_secure_aggregation_only_the_sum_is_seen(tmp_path: Path, privacy: str) -> None:
    run, _ = run_study(tmp_path, privacy=privacy, secure=True)
    study = load_study(run.path / "study.toml")
    made = released(run, "monitor.json")["made"]
    patients = exact_counts(run).sum() / 14

    assert np.abs(errors_of(run)).max() < 6.5 * made["noise_std"] / patients
    plain = 4.0 * (3.73 * np.sqrt(14)) ** 2  # variance of four sites that noise by themselves
    if privacy == DISTRIBUTED:
        share = monitor_mechanism(study, sites=4).share_std
        assert made["noise_std"] == pytest.approx(2 * share, rel=1e-3)
        assert made["noise_std"] ** 2 < 0.4 * plain
    else:
        assert made["noise_std"] ** 2 == pytest.approx(plain, rel=0.02)


# --- off, and without privacy ------------------------------------------------------------------


def test_without_privacy_the_histograms_are_exact(tmp_path: Path) -> None:
    run, _ = run_study(tmp_path, privacy=NO_PRIVACY, extra="\n[monitor]\n")

    assert np.abs(errors_of(run)).max() < 1e-8
    assert released(run, "monitor.json")["made"]["noise_std"] == 0.0


def test_secure_sums_without_privacy_are_exact_too(tmp_path: Path) -> None:
    run, _ = run_study(tmp_path, privacy=NO_PRIVACY, extra="\n[monitor]\n", secure=True)

    assert np.abs(errors_of(run)).max() < 1e-4


def test_off_costs_nothing_and_the_card_says_that_nothing_is_watched(tmp_path: Path) -> None:
    run, result = run_study(tmp_path, extra="")

    assert not (run.path / "release" / "monitor.json").exists()
    assert "not watched" in released(run, "card.json")["monitoring"]["drift"]
    assert "Not watched" in (run.path / "release" / "card.html").read_text()
    assert all("monitor" not in site for site in result["privacy"]["sites"].values())


@pytest.mark.parametrize(
    ("privacy", "extra", "reason"),
    [
        (EPSILON_4, "\n[monitor]\n", "never free"),
        (EPSILON_4, "\n[monitor]\nepsilon = 4.0\n", "leaves nothing"),
        (NO_PRIVACY, ON, "no budget"),
        (EPSILON_4.replace("local", "distributed") + '\nunit = "site"', ON, "no bound"),
    ],
)
def test_a_monitor_that_is_not_paid_for_is_refused(
    tmp_path: Path, privacy: str, extra: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_study(write_study(tmp_path, privacy=privacy, extra=extra))


def test_a_study_without_it_has_the_hash_that_it_had(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))

    assert "monitor" not in study.agreed()


def test_a_coordinator_that_resumes_does_not_ask_twice(tmp_path: Path) -> None:
    run, _ = run_study(tmp_path)
    before = (run.path / "release" / "monitor.json").read_bytes()
    (run.path / "metrics.json").unlink()

    again = prepare_run(tmp_path / "study.toml", run.path, resume=True)
    simulate(tmp_path / "study.toml", again)

    assert (run.path / "release" / "monitor.json").read_bytes() == before
    assert np.isfinite(model_of(again)).all()


# --- what it is for ----------------------------------------------------------------------------


def shifts_of(run: RunDirectory, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter of a hospital says after it has seen some patients."""
    store = Store(run.path / "stores" / "va")
    install_inbox(store)
    engine = store.newest()
    live = Catalogue([engine]).get()
    rows = np.stack([columns[field.name] for field in live.signature.fields], axis=1)
    inputs = rows.astype(np.float32)
    live.drift.see(inputs, live.predict(inputs))
    return {shift.name: shift for shift in live.drift.shifts()}


def test_the_adapter_notices_drift_with_a_release_of_a_run(
    local: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, _ = local
    table = datasets.pooled("heart-disease")
    ages = np.clip(table.columns["age"] + 25, 18, 120)

    same = shifts_of(run, table.columns)
    older = shifts_of(run, {**table.columns, "age": ages})

    assert set(same) == {f.name for f in get_task("heart-disease").schema.features} | {PREDICTION}
    assert not any(shift.alarm for shift in same.values())
    assert older["age"].alarm
    assert not older["sex"].alarm


def test_the_sum_of_the_fewest_shares_has_the_calibrated_noise_and_one_less_has_not(
    tmp_path: Path,
) -> None:
    """False-alarm rate 1e-9: chi-square on some 7,000 draws of a known variance."""
    file = write_study(tmp_path, privacy=DISTRIBUTED, rounds=ROUNDS, extra=ON + "bins = 50\n")
    file.write_text(file.read_text().replace("secure = false", "secure = true"))
    study = load_study(file)
    codec = monitor_codec(study, sites=4)
    assert isinstance(codec, NoisedCountSum)
    cells = size(monitor_layout(study))
    least = codec.mechanism.noise_multiplier * codec.mechanism.sensitivity

    def p_value(shares: int) -> float:
        draws = []
        for _ in range(20):
            total = np.zeros(cells + 1, np.uint32)
            for _ in range(shares):
                empty = np.zeros(cells, np.float32)
                total += codec.encode(empty, weight=1.0, bits=BitStream.secure())
            counts, sites = codec.decode(total)
            assert sites == shares
            draws.append(counts.astype(np.float64))
        drawn = np.concatenate(draws)
        return float(stats.chi2.cdf((drawn**2).sum() / least**2, df=drawn.size))

    assert codec.mechanism.noise_multiplier >= local_monitor_noise(study)
    assert codec.mechanism.clip_norm == pytest.approx(np.sqrt(14))
    assert p_value(3) > 1e-9  # the fewest sites that a sum may hold
    assert p_value(2) < 1e-9  # one of them forgot its share
