"""The models that are served now: replaced in one step, read without a lock."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import ModelSignature
from fedward.serving.drift import DriftMonitor, Histogram, parse_monitor
from fedward.serving.engine import Engine
from fedward.serving.explain import reference_input
from fedward.serving.guard import Guard
from fedward.serving.problems import Problem
from fedward.serving.trial import Trial


@dataclass(frozen=True, slots=True)
class Live:
    """One served version: whoever holds it answers with it, whatever is promoted meanwhile.

    Attributes:
        engine: Runs it.
        guard: Checks its inputs.
        privacy: What its release says of privacy.
        drift: Watches its inputs and answers.
        reference: What its explanations are relative to.
        histograms: Its release's reference, by field; empty without one.
        trial: The trial that it is in, if it is in one.
        starts: By caller, how a line of the audit log on one row begins.
    """

    engine: Engine
    guard: Guard
    privacy: str
    drift: DriftMonitor
    reference: NDArray[np.float32]
    histograms: Mapping[str, Histogram]
    trial: Trial | None = None
    starts: dict[str, str] = field(default_factory=dict)

    @property
    def signature(self) -> ModelSignature:
        """The model's interface."""
        return self.engine.signature

    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Guarded probabilities, shape `(n, outputs)`. Raises `Problem`."""
        self.guard.check(inputs)
        if self.trial is None:
            return self.engine.predict(inputs)
        return self.trial.predict(self.engine, inputs)

    def predict_row(self, row: Sequence[float | None]) -> list[float] | None:
        """The probabilities of one row; None where `predict` has to say what is to be said."""
        single = self.engine.single
        if single is None or self.trial is not None or not self.guard.passes(row):
            return None
        outputs = single.run_row(row)
        return outputs if outputs is not None and all(map(math.isfinite, outputs)) else None


class Catalogue:
    """Name to what is served under it."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._live: dict[str, Live] = {}
        self._canaries: dict[str, Live] = {}
        for engine in engines:
            self.promote(engine)

    def promote(self, engine: Engine) -> Live:
        """Serve `engine` under its model's name from the next request on."""
        name = engine.signature.model
        self.end_trial(name)
        live = _live(engine)
        # A new dict, so that no reader ever sees one that changes under it.
        self._live = {**self._live, name: live}
        return live

    def begin_trial(self, trial: Trial) -> None:
        """Watch a candidate beside what is served; if it is a canary, it gets its requests."""
        name = trial.new.signature.model
        self.end_trial(name)
        serving = replace(self._live[name], trial=trial)
        self._canaries = {**self._canaries, name: replace(_live(trial.new), trial=trial)}
        self._live = {**self._live, name: serving}

    def end_trial(self, name: str) -> None:
        """Let a candidate go, if there is one: what is served goes on alone."""
        self._canaries = {n: live for n, live in self._canaries.items() if n != name}
        served = self._live.get(name)
        if served is not None and served.trial is not None:
            served.trial.close()
            self._live = {**self._live, name: replace(served, trial=None)}

    def trial(self, name: str) -> Trial | None:
        """The trial that a model is in, if it is in one."""
        live = self._live.get(name)
        return None if live is None else live.trial

    def choose(
        self, name: str | None, version: str | None, headers: Iterable[tuple[bytes, bytes]]
    ) -> Live:
        """What answers a request: what is served, or its canary. Raises as `get`."""
        if not self._canaries:
            return self.get(name, version)
        canary = self._canaries.get(next(iter(self._live)) if name is None else name)
        if canary is None or canary.trial is None or (name is None and len(self._live) > 1):
            return self.get(name, version)
        if version is not None:
            asked = version == str(canary.signature.version) and canary.trial.stage == "canary"
            return canary if asked else self.get(name, version)
        return canary if canary.trial.takes(headers) else self.get(name)

    def names(self) -> tuple[str, ...]:
        """Names of the models served."""
        return tuple(sorted(self._live))

    def get(self, name: str | None = None, version: str | None = None) -> Live:
        """What is served under a name; None if there is only one.

        Raises:
            Problem: 404 if it is not served, and what is.
        """
        live = self._live
        if name is None:
            if len(live) != 1:
                raise Problem(404, f"name a model: POST /predict/NAME; {self._served()}")
            return next(iter(live.values()))
        found = live.get(name)
        if found is None:
            raise Problem(404, f"model {name[:64]!r} is not found; {self._served()}")
        if version is not None and version != str(found.signature.version):
            raise Problem(404, f"version {version[:16]!r} is not served; {self._served()}")
        return found

    def _served(self) -> str:
        served = [f"{n} version {self._live[n].signature.version}" for n in self.names()]
        return "served: " + (", ".join(served) or "nothing")


def _live(engine: Engine) -> Live:
    signature = engine.signature
    monitor = engine.release.files.get("monitor.json")
    histograms = {} if monitor is None else parse_monitor(json.loads(monitor))
    return Live(
        engine,
        Guard(signature),
        privacy=str(engine.release.privacy["statement"]),
        drift=DriftMonitor(signature, histograms),
        reference=reference_input(signature, histograms),
        histograms=histograms,
    )
