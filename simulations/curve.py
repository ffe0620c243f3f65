"""The learning curve of a simulation: the global model on everybody's held-out patients.

A researcher's exact view, which no coordinator of real hospitals has.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fedward.client.evaluation import evaluate_model
from fedward.client.local_site import LocalSite
from fedward.core.run import RunDirectory
from fedward.core.study import Study
from fedward.server.channel import Channel, Reply
from fedward.simulations.channel import TRAIN
from fedward.strategies.strategy import Vector
from fedward.tasks.parameters import from_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Examples
from fedward.transport.payload import Payload

_EVENT = "evaluation"


class Curve:
    """Evaluates global models, and keeps what comes out in the run's log.

    Args:
        run: The run.
        study: Its study.
        sites: Whose held-out patients.
    """

    def __init__(self, run: RunDirectory, study: Study, sites: Iterable[LocalSite]) -> None:
        self._run, self._study, self._sites = run, study, sites
        self._task = get_task(study.study.task)
        self._model = study_model(study, self._task)
        self._pooled: Examples | None = None

    def add(self, parameters: Vector, *, round_number: int) -> None:
        """Add the model that `round_number` rounds gave."""
        self._run.event(_EVENT, round=round_number, metrics=self._metrics(parameters))

    def points(self, parameters: Vector, *, rounds: int) -> list[dict[str, Any]]:
        """The whole curve of a run that gave `parameters`: `round` and metrics, in order."""
        found = {e["round"]: e["metrics"] for e in self._run.events() if e["event"] == _EVENT}
        found[rounds] = self._metrics(parameters)
        return [{"round": number, **found[number]} for number in sorted(found)]

    def _metrics(self, parameters: Vector) -> dict[str, float]:
        from_vector(self._model, parameters)
        return self._task.summarise(evaluate_model(self._task, self._model, self._held_out()))

    def _held_out(self) -> Examples:
        if self._pooled is None:
            parts = [site.examples(self._task, self._study)[1] for site in self._sites]
            self._pooled = Examples(
                np.concatenate([part.features for part in parts]),
                np.concatenate([part.labels for part in parts]),
                np.arange(sum(len(part) for part in parts)),
            )
        return self._pooled


class CurveChannel:
    """A `Channel` that evaluates, every few rounds, the model that it carries to the sites.

    Args:
        inner: What answers.
        curve: Takes the models.
        every: Rounds from one to the next.
    """

    def __init__(self, inner: Channel, curve: Curve, *, every: int) -> None:
        self._inner, self._curve, self._every = inner, curve, every

    def node_ids(self) -> list[int]:
        """All nodes."""
        return self._inner.node_ids()

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """As `Channel`."""
        if kind == TRAIN and payloads and (round_number - 1) % self._every == 0:
            parameters = next(iter(payloads.values())).arrays["parameters"]
            self._curve.add(parameters, round_number=round_number - 1)
        return self._inner.ask(kind, payloads, round_number=round_number, deadline=deadline)


def with_curve(channel: Channel, study: Study, curve: Curve) -> Channel:
    """The channel, with a look at the model every few rounds if the study asks for one."""
    every = study.simulation.evaluate_every
    return channel if every is None else CurveChannel(channel, curve, every=every)
