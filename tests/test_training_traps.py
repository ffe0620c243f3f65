"""Two traps of Opacus 1.6, reproduced, and what stands in their place; the others are tested with
what closes them (`test_training_loop`, `test_training_bookkeeping`)."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedward.core.errors import RunError
from fedward.core.identity import Identity
from fedward.privacy.accounting import compose, dp_sgd_event, privacy_spent
from fedward.privacy.ledger import Ledger
from fedward.server.checkpoint import load_checkpoint

DELTA = 1e-5
LOUD = dp_sgd_event(noise_multiplier=1.0, sample_rate=0.05, steps=100)
QUIET = dp_sgd_event(noise_multiplier=4.0, sample_rate=0.05, steps=1)


def test_a_changed_noise_erases_the_history_of_gdp_in_opacus() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental and can underestimate"
        from opacus.accountants import GaussianAccountant

        accountant: Any = GaussianAccountant()
    for _ in range(100):
        accountant.step(noise_multiplier=1.0, sample_rate=0.05)

    with pytest.raises(ValueError, match="have to stay constant"):
        accountant.step(noise_multiplier=4.0, sample_rate=0.05)

    accountant.step(noise_multiplier=4.0, sample_rate=0.05)
    assert accountant.history == [(4.0, 0.05, 1)]


def test_a_changed_noise_adds_to_what_was_spent() -> None:
    before = privacy_spent(LOUD, delta=DELTA, unit="patient")

    after = privacy_spent(compose([LOUD, QUIET]), delta=DELTA, unit="patient")

    assert after.epsilon > before.epsilon
    assert after.epsilon_rdp > before.epsilon_rdp


def test_a_changed_noise_adds_to_what_the_ledger_says() -> None:
    identity = Identity.generate_site()
    with Ledger.open(None, identity=identity, site="va", simulated=True) as ledger:
        whole = compose([LOUD, QUIET])
        ledger.allot(study="s", event=whole, max_epsilon=50.0, delta=DELTA, unit="patient")
        ledger.reserve(study="s", round_number=1, event=LOUD)
        before = ledger.spent(DELTA).epsilon

        ledger.reserve(study="s", round_number=2, event=QUIET)

        assert ledger.spent(DELTA).epsilon > before
        assert len([e for e in ledger.entries() if "round" in str(e).lower()]) >= 2


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.trace, "was here")


def test_loading_a_checkpoint_runs_its_code_in_opacus(tmp_path: Path) -> None:
    from opacus import PrivacyEngine

    trace, file = tmp_path / "trace", tmp_path / "checkpoint.pt"
    torch.save(Hostile(trace), file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Secure RNG turned off"
        engine: Any = PrivacyEngine(accountant="rdp")

    with pytest.raises(TypeError):  # what came out is no checkpoint, but it has run
        engine.load_checkpoint(path=file, module=nn.Linear(2, 1))

    assert trace.read_text() == "was here"


@pytest.mark.parametrize("legacy", [False, True])  # a zip archive, or a bare pickle
def test_loading_a_checkpoint_of_ours_runs_nothing(tmp_path: Path, legacy: bool) -> None:
    trace, file = tmp_path / "trace", tmp_path / "round-000003.safetensors"
    torch.save(Hostile(trace), file, _use_new_zipfile_serialization=not legacy)

    with pytest.raises(RunError, match="is damaged"):
        load_checkpoint(tmp_path, study_hash="abc")

    assert not trace.exists()
