"""Studies that protect whole sites: DP-FedAvg with a share of the noise from every site."""

import contextlib
import io
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy import stats
from studies import change, write_study
from test_simulate import SITES

from fedward.cli import main
from fedward.client.answers import admit_study, evaluate_release
from fedward.client.local_site import ZEROED, LocalSite
from fedward.core.errors import AdmissionRefused, BudgetExceeded, ConfigError
from fedward.core.run import RunDirectory
from fedward.core.study import Study, load_study, parse_study
from fedward.privacy.mechanisms.distributed import DistributedGaussian
from fedward.privacy.mechanisms.stream import BitStream
from fedward.simulations.report import write_report
from fedward.simulations.simulate import prepare_run, simulate
from fedward.tasks.registry import get_task
from fedward.transport.payload import Payload
from fedward.transport.sums import SiteSum, clip_whole, sum_codec

CLIP, STEPS, RATE = 0.4, 3, 0.8
SITE = 'mode = "distributed"\nunit = "site"\nepsilon = {epsilon}\ndelta = 1e-5\nclip_norm = 0.4'


def site_study(folder: Path, *, epsilon: float = 8.0, rounds: int = 1, extra: str = "") -> Path:
    return change(
        write_study(folder, privacy=SITE.format(epsilon=epsilon), rounds=rounds, extra=extra),
        ("secure = false", "secure = true"),
        ("local_steps = 1", f"local_steps = {STEPS}"),
        ("sample_rate = 0.3", "sample_rate = 1.0"),
        ("learning_rate = 1.0", f"learning_rate = {RATE}\nmomentum = 0.5"),
        ("average_last = 0.5", "average_last = 0.0"),
    )


def by_hand(study: Study, site: LocalSite, start: NDArray[np.float64]) -> NDArray[np.float64]:
    """A site's clipped update: logistic regression on everybody, momentum, no noise."""
    task = get_task(study.study.task)
    examples, _ = site.examples(task, study)
    x = np.column_stack([examples.features, np.ones(len(examples.labels))])
    size = site.site.data.public_size * (1 - site.site.data.held_out)
    local, velocity = start.copy(), np.zeros_like(start)
    for _ in range(STEPS):
        error = 1 / (1 + np.exp(-x @ local)) - examples.labels
        velocity = 0.5 * velocity + x.T @ error / size
        local = local - RATE * velocity
    update = local - start
    return np.asarray(update * min(1.0, CLIP / float(np.linalg.norm(update))))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, dict[str, Any]]:
    file = site_study(tmp_path_factory.mktemp("sites"))
    run = prepare_run(file, file.parent / "run")
    result = simulate(file, run)
    write_report(run)
    return run, result


def opened(run: RunDirectory) -> tuple[Study, list[LocalSite]]:
    files = sorted((run.path / "sites").glob("*.toml"))
    return load_study(run.path / "study.toml"), [LocalSite(file) for file in files]


def codec_of(study: Study, *, size: int = 28) -> SiteSum:
    codec = sum_codec(study, sites=4, size=size)
    assert isinstance(codec, SiteSum)
    return codec


def test_a_round_is_the_mean_of_equally_weighted_clipped_updates_and_the_calibrated_noise(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    """False-alarm rate 2e-9: chi-square on the 28 parameters, in both directions."""
    run, _ = finished
    study, sites = opened(run)
    released = load_file(run.path / "release" / "model.safetensors")
    (weight,) = (value for name, value in released.items() if name.endswith("weight"))
    (bias,) = (value for name, value in released.items() if name.endswith("bias"))
    found = np.append(weight.ravel(), bias.ravel()).astype(np.float64)

    updates = [by_hand(study, site, np.zeros(found.size)) for site in sites]
    std = codec_of(study, size=found.size).mechanism.share_std * math.sqrt(4) / 4
    statistic = float((((found - np.sum(updates, axis=0) / 4) / std) ** 2).sum())

    assert len({site.site.data.public_size for site in sites}) == 4
    assert 1e-9 < stats.chi2.cdf(statistic, df=found.size) < 1 - 1e-9


@pytest.mark.parametrize("missing", [0, 1])
def test_at_negligible_noise_it_is_the_sum_over_the_public_number_of_sites(
    finished: tuple[RunDirectory, dict[str, Any]], missing: int
) -> None:
    run, _ = finished
    study, sites = opened(run)
    mechanism = DistributedGaussian(
        clip_norm=CLIP, share_std=1e-7, granularity=1e-8, length=28, honest=3
    )
    codec = SiteSum(mechanism, sites=4)
    start = np.zeros(28, np.float32)
    total = np.zeros(29, np.uint32)
    for site in sites[missing:]:
        request = Payload({"study": study.agreed(), "hash": study.hash})
        admit_study(site, request)
        update = site.train(site.admitted(study.hash), start, round_number=1)
        total += codec.encode(update, weight=1e6 * len(site.name), bits=BitStream.secure())

    mean, present = codec.decode(total)

    wanted = np.sum([by_hand(study, s, start.astype(float)) for s in sites[missing:]], axis=0) / 4
    assert present == 4 - missing
    np.testing.assert_allclose(mean, wanted, rtol=0, atol=2e-6)
    norms = [np.linalg.norm(by_hand(study, s, start.astype(float))) for s in sites]
    assert max(norms) == pytest.approx(CLIP)


ADVERSARIAL = {
    "huge": np.full(500, 1e30),
    "one coordinate": np.eye(1, 500).ravel() * 1e9,
    "just over": np.full(500, 1.01 * CLIP / math.sqrt(500)),
    "alternating": np.tile([1e4, -1e4], 250),
    "infinite": np.append(np.full(499, 1.0), np.inf),
    "not a number": np.append(np.nan, np.full(499, 1e9)),
    "tiny": np.full(500, 1e-9),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_an_adversarial_site_moves_the_sum_by_the_clip_norm_and_the_stated_rounding(
    name: str,
) -> None:
    granularity = 1e-3  # coarse, so that rounding shows
    mechanism = DistributedGaussian(
        clip_norm=CLIP, share_std=0.01, granularity=granularity, length=500, honest=3
    )
    fixed = mechanism.fixed_point(largest_batch=1)
    others = np.zeros(500, np.uint32)
    rng = np.random.default_rng(1)
    for number in range(5):
        vector = clip_whole(rng.normal(size=500).astype(np.float32), clip_norm=CLIP)
        others += fixed.encode(vector, bits=BitStream.simulated("other", number))

    for attempt in range(50):
        update = ADVERSARIAL[name].astype(np.float32)
        mine = clip_whole(update, clip_norm=CLIP)
        with_me = others + fixed.encode(mine, bits=BitStream.simulated("mine", attempt))
        moved = np.linalg.norm(fixed.decode(with_me) - fixed.decode(others))

        # Always, and but for a probability of 2^-80.
        assert moved <= CLIP + granularity * math.sqrt(500)
        assert moved <= mechanism.sensitivity
        if name in {"huge", "one coordinate", "just over", "alternating"}:
            assert moved > 0.95 * CLIP
        if name in {"infinite", "not a number"}:
            assert moved == 0


def test_a_patient_of_a_site_moves_the_sum_by_twice_that_at_most() -> None:
    mechanism = DistributedGaussian(
        clip_norm=CLIP, share_std=0.01, granularity=1e-3, length=500, honest=3
    )
    fixed = mechanism.fixed_point(largest_batch=1)
    rng = np.random.default_rng(2)
    moves = []
    for attempt in range(200):
        one = clip_whole(rng.normal(size=500).astype(np.float32), clip_norm=CLIP)
        # The worst that a patient can do is to turn the update round.
        other = (
            -one
            if attempt % 2
            else clip_whole((one + 0.1 * rng.normal(size=500)).astype(np.float32), clip_norm=CLIP)
        )
        # The same uniform numbers round both: they do not depend on the data.
        rounded = [
            fixed.decode(fixed.encode(vector, bits=BitStream.simulated("bits", attempt)))
            for vector in (one, other)
        ]
        moves.append(float(np.linalg.norm(rounded[0] - rounded[1])))

    assert max(moves) <= 2 * mechanism.sensitivity
    assert max(moves) > 1.9 * CLIP


def test_the_sum_of_the_shares_has_the_calibrated_noise_and_one_share_less_has_not(
    tmp_path: Path,
) -> None:
    """False-alarm rate 1e-9: chi-square on 20,000 draws of a known variance."""
    codec = codec_of(load_study(site_study(tmp_path, rounds=20)), size=2000)
    least = codec.mechanism.noise_multiplier * codec.mechanism.sensitivity

    def p_value(shares: int) -> float:
        draws = []
        for _ in range(10):
            total = np.zeros(2001, np.uint32)
            for _ in range(shares):
                nothing = np.zeros(2000, np.float32)
                total += codec.encode(nothing, weight=1.0, bits=BitStream.secure())
            draws.append(codec.decode(total)[0].astype(np.float64) * 4)
        noise = np.concatenate(draws)
        return float(stats.chi2.cdf(float((noise**2).sum()) / least**2, df=noise.size))

    assert p_value(3) > 1e-9  # the fewest sites that a sum may hold
    assert p_value(2) < 1e-9  # one of them forgot its share


def test_the_charge_is_that_of_gaussian_releases_and_a_patients_that_of_half_the_noise(
    tmp_path: Path,
) -> None:
    rounds = 7
    file = site_study(tmp_path, rounds=rounds)
    run = prepare_run(file, tmp_path / "run")
    result = simulate(file, run)
    study, sites = opened(run)
    noise = codec_of(study).mechanism.noise_multiplier

    def priced(multiplier: float) -> float:
        accountant = pld.PLDAccountant(value_discretization_interval=1e-3)
        event = dp_accounting.GaussianDpEvent(multiplier)
        accountant.compose(dp_accounting.SelfComposedDpEvent(event, rounds))
        return float(accountant.get_epsilon(1e-5))

    for name, said in result["privacy"]["sites"].items():
        assert (said["unit"], said["patient"]["unit"]) == ("site", "patient")
        assert said["epsilon"] == pytest.approx(priced(noise), abs=2e-3)
        assert said["patient"]["epsilon"] == pytest.approx(priced(noise / 2), abs=5e-3)
        ledger = next(site.ledger for site in sites if site.name == name)
        assert ledger.spent(1e-5).unit == "patient"
        assert ledger.spent(1e-5).epsilon == pytest.approx(said["patient"]["epsilon"])
        assert ledger.spent_by(study.hash, 1e-5).epsilon == pytest.approx(said["epsilon"])
        ledger.verify()
    assert 7.9 < result["privacy"]["epsilon"] <= 8.0
    against = {row["colluders"]: row for row in result["privacy"]["adversaries"]}
    assert against[0]["patient"]["epsilon"] == pytest.approx(priced(noise / 2), abs=1e-2)
    assert against[2]["epsilon"] > against[0]["epsilon"]


def test_of_a_sites_patients_nothing_leaves_but_the_masked_update(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    run, result = finished
    study, sites = opened(run)
    admit_study(sites[0], Payload({"study": study.agreed(), "hash": study.hash}))
    request = Payload({"hash": study.hash}, {"parameters": np.zeros(28, np.float32)})

    answers = [evaluate_release(sites[0], request) for _ in range(2)]

    assert [dict(answer.arrays) for answer in answers] == [{}, {}]
    reported = result["reported"]
    assert not any(reported[part] for part in ("pooled", "mean", "worst", "sites"))
    populations = {entry.population for entry in sites[1].ledger.entries() if entry.population}
    assert populations == {"training"}
    admitted = [event for event in run.events() if event["event"] == "admitted"]
    assert {event["weight"] for event in admitted} == {None}


def test_every_page_names_the_unit_and_what_it_means_for_a_patient(
    finished: tuple[RunDirectory, dict[str, Any]],
) -> None:
    from fedward.console import privacy_line

    run, result = finished
    ledger, argv = io.StringIO(), sys.argv
    sys.argv = ["fedward", "ledger", "show", str(run.path / "sites" / "va.toml")]
    try:
        with contextlib.suppress(SystemExit), redirect_stdout(ledger):
            main()
    finally:
        sys.argv = argv
    pages = {
        "report": (run.path / "report.html").read_text(),
        "card": (run.path / "release" / "card.html").read_text(),
        "privacy.json": (run.path / "release" / "privacy.json").read_text(),
        "closing line": privacy_line(result["privacy"]),
        "ledger": ledger.getvalue(),
    }
    figure = f"{result['privacy']['patient']['epsilon']:.2f}"

    for name, page in pages.items():
        assert "per site" in page, name
        assert "per patient" in page, name
        assert figure in page, name
    assert "seen no metrics" in pages["card"]
    assert "…" not in pages["ledger"]  # nothing is cut, however narrow the terminal


def test_an_update_that_is_not_finite_is_zero_and_counted_at_the_site(tmp_path: Path) -> None:
    file = site_study(tmp_path, rounds=2)
    # A decay so strong that every site's model overflows.
    text = file.read_text()
    old = f"learning_rate = {RATE}\nmomentum = 0.5"
    assert old in text
    file.write_text(text.replace(old, "learning_rate = 1e30\nweight_decay = 1e30"))
    run = prepare_run(file, tmp_path / "run")

    simulate(file, run)

    study, _ = opened(run)
    noted = (run.path / "state" / "va" / ZEROED).read_text().splitlines()
    assert [json.loads(line)["round"] for line in noted] == [1, 2]
    assert json.loads(noted[0])["study"] == study.hash
    released = load_file(run.path / "release" / "model.safetensors")
    assert all(np.isfinite(value).all() for value in released.values())


def test_sites_that_are_away_are_survived_as_far_as_the_threshold_goes(tmp_path: Path) -> None:
    extra = '\n[simulation]\ndropout = { kind = "independent", rate = 0.15 }\n'
    file = site_study(tmp_path, rounds=6, extra=extra)
    run = prepare_run(file, tmp_path / "run")

    result = simulate(file, run)

    present = [event["sites"] for event in run.events() if event["event"] == "round"]
    assert len(present) == 6
    assert set(present) == {3, 4}
    assert result["privacy"]["adversaries"][0]["epsilon"] <= 8.0 + 1e-6


def test_a_site_counts_its_limit_against_what_its_patients_bear(tmp_path: Path) -> None:
    file = site_study(tmp_path)
    run = prepare_run(file, tmp_path / "run")
    simulate(file, run)
    study, sites = opened(run)
    path = sites[0].file.with_name("other.toml")
    own = f"../state/{sites[0].name}"
    path.write_text(sites[0].file.read_text().replace(own, "../state/other"))
    site = LocalSite(path)
    policy = site.site.policy.model_copy(update={"max_epsilon": 10.0})
    site.site = site.site.model_copy(update={"policy": policy})

    with pytest.raises(BudgetExceeded) as refused:
        admit_study(site, Payload({"study": study.agreed(), "hash": study.hash}))

    assert refused.value.limit == 10.0
    assert refused.value.asked > 15.0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('mode = "distributed"', 'mode = "local"', 'choose mode = "distributed"'),
        ("[aggregation]", "[monitor]\nepsilon = 1.0\n[aggregation]", r"remove \[monitor\]"),
        ("[aggregation]", "[evaluation]\nsubgroups = { sex = [] }\n[aggregation]", "no metrics"),
    ],
)
def test_what_would_not_protect_a_whole_site_is_no_study(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = site_study(tmp_path).read_text()
    assert old in text

    with pytest.raises(ConfigError, match=says):
        parse_study(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("secure = true", "secure = false", r"\[privacy\] unit.*set it to true"),
        ('mode = "distributed"', 'mode = "central"', "cannot be run"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_sent(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    file = site_study(tmp_path)
    file.write_text(file.read_text().replace(old, new))
    run = prepare_run(file, tmp_path / "run")

    with pytest.raises(ConfigError, match=says):
        simulate(file, run)

    assert not [event for event in run.events() if event["event"] == "admitted"]


def test_a_consortium_too_small_for_its_colluders_is_refused_by_the_site(
    finished: tuple[RunDirectory, dict[str, Any]], tmp_path: Path
) -> None:
    run, _ = finished
    _, sites = opened(run)
    file = site_study(tmp_path)
    file.write_text(file.read_text().replace("clip_norm = 0.4", "clip_norm = 0.4\ncolluders = 3"))
    study = load_study(file)

    with pytest.raises(AdmissionRefused, match="honest survivor"):
        admit_study(sites[0], Payload({"study": study.agreed(), "hash": study.hash}))


def test_the_example_is_a_study_of_whole_sites() -> None:
    study = load_study(Path(__file__).parents[1] / "examples" / "whole-hospitals.toml")

    assert study.protects_sites
    assert isinstance(sum_codec(study, sites=40, size=28), SiteSum)


def test_the_four_hospitals_are_all_there(finished: tuple[RunDirectory, dict[str, Any]]) -> None:
    _, result = finished

    assert set(result["privacy"]["sites"]) == set(SITES)
