"""A site that stops in the middle of a round goes on from there, and pays once."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from test_simulate_units import PATIENT, consortium

from fedward.client import local_site
from fedward.client.answers import admit_study, train_round
from fedward.client.local_site import LocalSite
from fedward.client.progress import Progress
from fedward.client.training import TrainingState
from fedward.client.training.session import Session
from fedward.core.study import Study, load_study
from fedward.transport.payload import Payload

STEPS = 9


class Stopped(BaseException):
    """As a kill: nothing of the site's own code handles it."""


def admitted(folder: Path) -> tuple[Path, Study]:
    file = consortium(folder, privacy=PATIENT)
    file.write_text(file.read_text().replace("local_steps = 1", f"local_steps = {STEPS}"))
    study, home = load_study(file), folder / "sites" / "a.toml"
    admit_study(LocalSite(home), Payload({"study": study.agreed(), "hash": study.hash}))
    return home, study


def asked(study: Study, parameters: NDArray[np.float32], *, number: int = 1) -> Payload:
    return Payload({"hash": study.hash, "round": number}, {"parameters": parameters})


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of every step that is taken; every state is kept."""
    taken: list[int] = []
    plain = Session.take

    def counted(self: Session, *given: object) -> None:
        plain(self, *given)  # type: ignore[arg-type]  # passed on as it came
        taken.append(self.steps)

    monkeypatch.setattr(Session, "take", counted)
    monkeypatch.setattr(local_site, "Progress", partial(Progress, seconds=0.0))
    return taken


def train_until_stopped(home: Path, request: Payload, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps of a round, after which the site stops."""
    plain = Progress.keep

    def keep(self: Progress, state: TrainingState) -> None:
        plain(self, state)
        if state.steps == 4:
            raise Stopped

    with monkeypatch.context() as until:
        until.setattr(Progress, "keep", keep)
        with pytest.raises(Stopped):
            train_round(LocalSite(home), request)


def start(home: Path, study: Study) -> NDArray[np.float32]:
    return np.zeros(LocalSite(home).size(study), dtype=np.float32)


def reserved(home: Path) -> list[int | None]:
    return [e.round_number for e in LocalSite(home).ledger.entries() if e.kind == "reserve"]


def test_a_site_that_stops_goes_on_at_the_step_and_pays_once(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, study = admitted(tmp_path)
    request = asked(study, start(home, study))
    train_until_stopped(home, request, monkeypatch)

    reply = train_round(LocalSite(home), request)

    assert steps == list(range(1, STEPS + 1))  # each once
    assert reserved(home) == [1]
    assert np.isfinite(reply.arrays["update"]).all()
    assert np.abs(reply.arrays["update"]).max() > 0
    states = {e.state for e in LocalSite(home).ledger.entries() if e.kind == "reserve"}
    assert states == {"settled"}
    assert list((home.parent / "a" / "training").iterdir()) == []


def test_another_model_does_not_go_on_from_there_and_pays(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, study = admitted(tmp_path)
    train_until_stopped(home, asked(study, start(home, study)), monkeypatch)

    train_round(LocalSite(home), asked(study, start(home, study) + 1))

    assert steps == [*range(1, 5), *range(1, STEPS + 1)]
    assert reserved(home) == [1, 1]


@pytest.mark.parametrize("spoil", ["cut", "gone", "other"])
def test_a_state_that_is_not_whole_or_not_of_this_round_is_not_gone_on_from(
    tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    home, study = admitted(tmp_path)
    request = asked(study, start(home, study))
    train_until_stopped(home, request, monkeypatch)
    (file,) = (home.parent / "a" / "training").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    match spoil:
        case "cut":
            file.write_bytes(file.read_bytes()[:-9])
        case "gone":
            file.unlink()
        case _:
            file.write_bytes(re.sub(rb'("reservation":")\d', rb"\g<1>9", file.read_bytes()))

    train_round(LocalSite(home), request)

    assert steps == [*range(1, 5), *range(1, STEPS + 1)]
    assert reserved(home) == [1, 1]


def test_a_state_is_not_written_more_often_than_it_saves(tmp_path: Path) -> None:
    state = TrainingState(1, 1.0, 0, {"parameters": np.zeros(3, dtype=np.float32)})
    progress = Progress(tmp_path / "state", 1, "ab", seconds=60.0)

    progress.keep(state)

    assert progress.newest() is None
