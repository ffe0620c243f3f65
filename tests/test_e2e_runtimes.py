"""The same apps on three runtimes: one process, Ray, and a real deployment on loopback.

Once without privacy, once with noise shared out under secure aggregation.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from studies import NO_PRIVACY, write_study
from test_simulate import model_of
from test_simulate_distributed import DISTRIBUTED

from fedward.client.local_site import LocalSite
from fedward.core.run import RunDirectory
from fedward.simulations.simulate import prepare_run, simulate

pytestmark = pytest.mark.usefixtures("swept")

ROUNDS = 2


@pytest.fixture(scope="module")
def run_on(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def run(runtime: str, privacy: str) -> tuple[RunDirectory, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(runtime)
        file = write_study(folder, privacy=privacy, rounds=ROUNDS)
        if privacy == DISTRIBUTED:
            file.write_text(file.read_text().replace("secure = false", "secure = true"))
        directory = prepare_run(file, folder / "run")
        return directory, simulate(file, directory, runtime=runtime)

    return run


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # Ray's and Flower's own
@pytest.mark.parametrize("runtime", ["ray", "loopback"])
def test_without_noise_every_runtime_gives_the_same_model(run_on: Any, runtime: str) -> None:
    here, _ = run_on("in-process", NO_PRIVACY)

    there, result = run_on(runtime, NO_PRIVACY)

    np.testing.assert_allclose(model_of(there), model_of(here), atol=1e-6, rtol=0)
    assert set(result["metrics"]["sites"]) == {"cleveland", "hungary", "switzerland", "va"}


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")  # Ray's and Flower's own
@pytest.mark.parametrize("runtime", ["ray", "loopback"])
def test_under_secure_aggregation_every_runtime_gives_and_spends_the_same(
    run_on: Any, runtime: str
) -> None:
    home, here = run_on("in-process", DISTRIBUTED)

    directory, there = run_on(runtime, DISTRIBUTED)

    np.testing.assert_allclose(model_of(directory), model_of(home), atol=1e-6, rtol=0)
    assert "secure_aggregation" in there
    for site, statement in here["privacy"]["sites"].items():
        other = there["privacy"]["sites"][site]
        for figure in ("epsilon", "epsilon_rdp", "noise_multiplier", "sample_rate", "event"):
            assert other[figure] == statement[figure]
        ledger = LocalSite(Path(directory.path / "sites" / f"{site}.toml")).ledger
        ledger.verify()
        assert ledger.spent(1e-5).epsilon == pytest.approx(statement["epsilon"], abs=1e-3)
