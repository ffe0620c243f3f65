"""What the adapter does, whatever protocol asks: admit, guard, predict, explain, count, record."""

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.serving import clinical
from fedward.serving.approval import waiting
from fedward.serving.audit import AuditLog, start_of
from fedward.serving.catalogue import Catalogue, Live
from fedward.serving.explanations import Asked, explanation_of
from fedward.serving.gate import Gate, Headers
from fedward.serving.oip import numbers, to_float32
from fedward.serving.outcomes import Outcomes, Receipts, parse_outcome
from fedward.serving.problems import Problem
from fedward.serving.roles import Caller, Role
from fedward.serving.store import Store
from fedward.serving.telemetry import Telemetry
from fedward.serving.traces import Traces
from fedward.serving.vault import Values, Vault

# A batch this large would hold up other requests for more than about a millisecond.
_ROWS_IN_THREAD = 256
_MOST_FOLLOWERS = 16
_MOST_STARTS = 256
_TICK, _SILENCE = 0.5, 15.0  # seconds between looks, and until a sign of life


@dataclass(slots=True)
class Service:
    """One adapter's state. Used from the event loop.

    Attributes:
        catalogue: What is served.
        gate: Who may ask.
        telemetry: What is counted.
        audit: Where it is recorded; None records nothing (a service made for a test).
        store: Where releases are; None cannot roll back.
        state: Folder of receipts' key and outcomes; None takes no outcomes.
        vault: Keys of patients' values in the audit log; None keeps no values.
        traces: Where spans go; None sends none.
        alarms: What an operator should see, the newest last.
        stopping: Whether the adapter is: ends what would go on.
        stale: Why the registry that is followed is not current; None if it is, or none is.
    """

    catalogue: Catalogue
    gate: Gate = field(default_factory=lambda: Gate(()))
    telemetry: Telemetry = field(default_factory=Telemetry)
    audit: AuditLog | None = None
    store: Store | None = None
    state: Path | None = None
    vault: Vault | None = None
    traces: Traces | None = None
    alarms: list[str] = field(default_factory=list)
    stale: str | None = None
    stopping: bool = False
    _followers: int = 0
    _receipts: Receipts | None = None
    _outcomes: dict[str, Outcomes] = field(default_factory=dict)

    def answered(self, route: str, status: int, seconds: float, headers: Headers) -> None:
        """Count a request that was answered, and send its span where one is asked for."""
        self.telemetry.answered(route, status, seconds)
        if self.traces is not None:
            self.traces.answered(route, status, seconds, headers)

    def admit(self, headers: Headers, roles: Sequence[Role], *, path: str = "") -> Caller:
        """Who asks, if one of `roles` may. Raises `Problem` 401, 403 or 429."""
        return self.gate.admit(headers, roles, path=path)

    async def predict(
        self,
        live: Live,
        inputs: NDArray[np.float32],
        *,
        caller: Caller,
        action: str,
        patient: str | None = None,
    ) -> NDArray[np.float32]:
        """Guarded probabilities, counted, watched for drift and recorded.

        Args:
            live: The version that answers.
            inputs: float32, shape `(n, fields)`; NaN is missing.
            caller: Who asks.
            action: What the audit log calls it.
            patient: Whose row it is: their values are kept, sealed, if the hospital says so.

        Returns:
            float32, shape `(n, outputs)`.

        Raises:
            Problem: 400, 413 or 422; see `Guard.check`.
        """
        if len(inputs) <= _ROWS_IN_THREAD:
            return self.predict_now(live, inputs, caller=caller, action=action, patient=patient)
        try:
            outputs = await asyncio.to_thread(live.predict, inputs)
        except Problem as problem:
            self.note_refusal(live, problem)
            raise
        self._predicted(live, inputs, outputs, caller=caller, action=action)
        return outputs

    def predict_now(
        self,
        live: Live,
        inputs: NDArray[np.float32],
        *,
        caller: Caller,
        action: str,
        patient: str | None = None,
    ) -> NDArray[np.float32]:
        """As `predict`, on the event loop: for few rows."""
        try:
            outputs = live.predict(inputs)
        except Problem as problem:
            self.note_refusal(live, problem)
            raise
        self._predicted(live, inputs, outputs, caller=caller, action=action, patient=patient)
        return outputs

    def _predicted(
        self,
        live: Live,
        inputs: NDArray[np.float32],
        outputs: NDArray[np.float32],
        *,
        caller: Caller,
        action: str,
        patient: str | None = None,
    ) -> None:
        signature = live.signature
        live.drift.see(inputs, outputs)
        self.telemetry.predicted(signature.model, signature.version, len(inputs))
        kept = None
        if patient is not None and len(inputs) == 1:
            row = [None if value != value else value for value in inputs[0].tolist()]  # noqa: PLR0124 (NaN)
            kept = patient, dict(zip((f.name for f in signature.fields), row, strict=True))
        self.record(action, live, caller, rows=len(inputs), patient=kept)

    def predict_row(
        self, live: Live, row: Sequence[float | None], *, caller: Caller
    ) -> list[float] | None:
        """As `predict_now`, of one row of an inference; None where that has to say what is wrong.

        Args:
            live: The version that answers.
            row: Numbers, one a field; None is missing.
            caller: Who asks.
        """
        outputs = live.predict_row(row)
        if outputs is None:
            return None
        live.drift.see_row(row, outputs)
        signature = live.signature
        self.telemetry.predicted(signature.model, signature.version, 1)
        if self.audit is not None:
            start = live.starts.get(caller.name)
            if start is None:
                start = self._start(live, caller)
            self.audit.append_again(start)
        return outputs

    @staticmethod
    def _start(live: Live, caller: Caller) -> str:
        if len(live.starts) >= _MOST_STARTS:
            live.starts.clear()
        signature = live.signature
        start = start_of(
            "infer", model=signature.model, version=signature.version, caller=caller.name, rows=1
        )
        live.starts[caller.name] = start
        return start

    async def answer_patient(
        self, live: Live, values: dict[str, Any], *, caller: Caller, patient: str | None = None
    ) -> dict[str, Any]:
        """What `/predict` answers. Raises `Problem`."""
        inputs = self.parse_patient(live, values)
        outputs = await self.predict(live, inputs, caller=caller, action="predict", patient=patient)
        answer = clinical.answer(live.signature, inputs, outputs, privacy=live.privacy)
        if self.stale is not None:
            answer["stale"] = self.stale
        receipts = self._receipt_maker()
        if receipts is not None and outputs.shape[1] == 1:
            signature = live.signature
            answer["receipt"] = receipts.make(
                signature.model, signature.version, float(outputs[0, 0])
            )
        return answer

    async def explain_patient(
        self,
        live: Live,
        values: dict[str, Any],
        *,
        caller: Caller,
        patient: str | None = None,
        asked: Asked,
    ) -> dict[str, Any]:
        """`/predict`'s answer with each value's contribution. Raises `Problem`."""
        inputs = self.parse_patient(live, values)
        outputs = await self.predict(live, inputs, caller=caller, action="explain", patient=patient)
        answer = clinical.answer(live.signature, inputs, outputs, privacy=live.privacy)
        return {**answer, "explanation": await self.contributions(live, inputs[0], asked)}

    async def contributions(
        self, live: Live, inputs: NDArray[np.float32], asked: Asked
    ) -> dict[str, Any]:
        """Each value's contribution to one row's answer; off the event loop. Raises `Problem`."""
        return await asyncio.to_thread(explanation_of, live, inputs, asked)

    def parse_patient(self, live: Live, values: dict[str, Any]) -> NDArray[np.float32]:
        """Named values as the model's input; a refusal is counted. Raises `Problem` 422."""
        try:
            return clinical.parse_patient(values, live.signature)
        except Problem as problem:
            self.note_refusal(live, problem)
            raise

    async def add_outcome(
        self, live: Live, value: Mapping[str, Any], *, caller: Caller
    ) -> dict[str, Any]:
        """Keep what became of a patient. Raises `Problem` 409 or 422."""
        receipts = self._receipt_maker()
        if receipts is None:
            raise Problem(404, "this adapter takes no outcomes")
        receipt = receipts.read(live.signature.model, value.get("receipt"))
        outcome, groups = parse_outcome(value)
        outcomes = self._outcomes_of(live.signature.model)
        await asyncio.to_thread(outcomes.add, receipt, outcome=outcome, groups=groups)
        self.record("outcome", live, caller)
        return {"kept": True}

    def monitor(self, live: Live) -> dict[str, Any]:
        """Drift and calibration of what is served, as JSON values."""
        signature = live.signature
        calibration: dict[str, Any] = {"outcomes": 0}
        if self.state is not None:
            calibration = self._outcomes_of(signature.model).report(
                signature.version, threshold=signature.threshold
            )
        return {
            "model": signature.model,
            "version": signature.version,
            "variants": [asdict(one) for one in live.engine.measured],
            "drift": [asdict(shift) for shift in live.drift.shifts()],
            "calibration": calibration,
        }

    def metrics(self) -> str:
        """Prometheus text."""
        gauges: list[tuple[str, dict[str, str], float]] = [
            ("stale", {}, float(self.stale is not None))
        ]
        for name in self.catalogue.names():
            live = self.catalogue.get(name)
            gauges.append(("model_version", {"model": name}, live.signature.version))
            for shift in live.drift.shifts():
                labels = {"model": name, "field": shift.name}
                gauges.append(("drift_psi", labels, shift.psi))
                gauges.append(("drift_ks", labels, shift.ks))
            calibration = self.monitor(live)["calibration"]
            gauges.append(("outcomes", {"model": name}, calibration["outcomes"]))
            gauges += [
                (f"calibration_{measure}", {"model": name}, calibration[measure])
                for measure in ("brier", "ece")
                if measure in calibration
            ]
        return self.telemetry.text(gauges)

    def told(self, action: str, *, model: str, version: int, reason: str = "") -> None:
        """Of a swap by the watcher, from its thread."""
        self.telemetry.swapped(model, action)
        if action == "refused":
            self.alarms.append(f"{model} version {version} refused: {reason}")
        if self.audit is not None:
            self.audit.append(action, model=model, version=version, reason=reason)

    def record(
        self,
        action: str,
        live: Live,
        caller: Caller,
        *,
        rows: int = 1,
        facts: Mapping[str, str] | None = None,
        patient: tuple[str, Values] | None = None,
    ) -> None:
        """A line in the audit log; `facts` are codes, never a patient's values."""
        if self.audit is not None:
            signature = live.signature
            self.audit.append(
                action,
                model=signature.model,
                version=signature.version,
                caller=caller.name,
                rows=rows,
                patient=patient,
                **(facts or {}),
            )

    def note_refusal(self, live: Live, problem: Problem) -> None:
        """Count a refused field, if it is one of the model's own."""
        if any(problem.field == known.name for known in live.signature.fields):
            self.telemetry.refused(live.signature.model, str(problem.field))

    def status(self) -> dict[str, Any]:
        """What the page shows."""
        models = []
        for name in self.catalogue.names():
            live = self.catalogue.get(name)
            served = {} if self.store is None else self.store.served()
            models.append(
                {
                    **self.monitor(live),
                    "privacy": live.privacy,
                    "previous": served[name].previous if name in served else None,
                }
            )
        return {
            "models": models,
            "requests": self.telemetry.requests(),
            "alarms": self.alarms[-20:],
            "stale": self.stale,
            "waiting": {} if self.store is None else self._waiting(self.store),
            "rollout": self._rollout(),
            "audit_head": None if self.audit is None else self.audit.head,
        }

    def events(self) -> AsyncGenerator[bytes, None]:
        """`status` as server-sent events: at once, and whenever it has changed.

        Raises:
            Problem: 429 where too many follow already.
        """
        if self._followers >= _MOST_FOLLOWERS:
            raise Problem(429, "too many follow already", headers={"retry-after": "10"})
        return self._events()

    async def _events(self) -> AsyncGenerator[bytes, None]:
        self._followers += 1
        before, waited = "", 0.0
        try:
            while not self.stopping:
                now = json.dumps(self.status())
                if now != before:
                    before, waited = now, 0.0
                    yield f"data: {now}\n\n".encode()
                elif waited >= _SILENCE:
                    waited = 0.0
                    yield b": still here\n\n"
                await asyncio.sleep(_TICK)
                waited += _TICK
        finally:
            self._followers -= 1

    def _rollout(self) -> dict[str, Any]:
        """Candidates by model: stage, and what was seen of them or why they were sent back."""
        found: dict[str, Any] = {}
        if self.store is not None:
            for name, one in self.store.candidates().items():
                found[name] = {"version": one.version, "stage": one.stage, "reason": one.reason}
        for name in self.catalogue.names():
            trial = self.catalogue.trial(name)
            if trial is not None:
                found[name] = trial.to_json()
        return found

    @staticmethod
    def _waiting(store: Store) -> dict[str, int]:
        entries = waiting(store.folder)
        return {name: entry.version for name, entry in entries.items() if not entry.declined}

    def _receipt_maker(self) -> Receipts | None:
        if self._receipts is None and self.state is not None:
            self._receipts = Receipts(self.state / "receipts.key")
        return self._receipts

    def _outcomes_of(self, model: str) -> Outcomes:
        if model not in self._outcomes:
            folder = Path() if self.state is None else self.state
            self._outcomes[model] = Outcomes(folder / f"outcomes-{model}.jsonl")
        return self._outcomes[model]


def parse_instances(live: Live, body: dict[str, Any]) -> NDArray[np.float32]:
    """KServe V1's `instances`: rows of raw values, or of named fields. Raises `Problem`."""
    instances = body.get("instances")
    if not isinstance(instances, list) or not instances:
        raise Problem(400, "`instances` must be a list of at least one row")
    if all(isinstance(instance, dict) for instance in instances):
        rows = [clinical.parse_patient(instance, live.signature) for instance in instances]
        return np.concatenate(rows)
    return to_float32(numbers(instances))
