"""A candidate on trial: two versions answer beside each other, and the new one is judged.

As a shadow the candidate answers every request too, for nobody. As a canary it answers a share of
them; then the old version answers those beside it. The second answer is computed by one thread
behind a bounded queue: what does not fit is not compared, and nobody waits for it.
"""

import hashlib
import itertools
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import ModelSignature
from fedward.serving.engine import Engine
from fedward.serving.guard import Guard
from fedward.serving.problems import Problem
from fedward.serving.staging import EARLY_ROWS, Candidate, Limits, Stage

KEY = b"x-request-key"
_WAITING = 256  # requests; beyond, they are answered and not compared
_MOST_ROWS = 256  # of a request that are compared
_TIMES = 512
# Differences of less than this are the host's, not the model's.
_SECONDS = 0.002


class Trial:
    """Watches one candidate beside the version that serves.

    Args:
        candidate: As the store keeps it.
        old: What serves.
        new: The candidate, running.
    """

    def __init__(self, candidate: Candidate, *, old: Engine, new: Engine) -> None:
        self.candidate, self.old, self.new = candidate, old, new
        self._guard = Guard(new.signature)
        self._turns = itertools.count()
        self._queue: deque[tuple[Engine, NDArray[np.float32], NDArray[np.float32], float]] = deque()
        self._ready, self._lock = threading.Semaphore(0), threading.Lock()
        self._closed = False
        self._begin(candidate.stage)
        self._thread = threading.Thread(target=self._work, name="fedward-trial", daemon=True)
        self._thread.start()

    def _begin(self, stage: Stage) -> None:
        self.stage: Stage = stage
        self.rows = self.disagreeing = self.errors = self.answered = self.not_compared = 0
        self.error = ""
        self._seconds: dict[bool, deque[float]] = {
            new: deque(maxlen=_TIMES) for new in (False, True)
        }

    @property
    def limits(self) -> Limits:
        """By which it is judged."""
        return self.candidate.limits

    def next_stage(self, candidate: Candidate) -> None:
        """Go on in another stage; it is counted anew."""
        with self._lock:
            self.candidate = candidate
            self._begin(candidate.stage)

    def takes(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether the candidate answers a request.

        The same `X-Request-Key` always gets the same version while the canary lasts; requests
        without one are dealt in turn.
        """
        if self.stage != "canary" or self.errors > self.limits.max_errors:
            return False
        key = next((value for name, value in headers if name.lower() == KEY), None)
        if key is None:
            key = str(next(self._turns)).encode()
        seed = f"{self.new.signature.model}/{self.candidate.version}/".encode()
        drawn = int.from_bytes(hashlib.blake2b(seed + key, digest_size=8).digest())
        return drawn < self.limits.share * 2**64

    def predict(self, engine: Engine, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Answer a caller with `engine`, and have the other version answer beside it."""
        start = time.perf_counter()
        try:
            outputs = engine.predict(inputs)
        except Exception as error:
            if engine is self.new:
                self._failed(error)
            raise
        seconds = time.perf_counter() - start
        if len(self._queue) < _WAITING and not self._closed:
            # A copy: the caller's memory may be used for the next request.
            self._queue.append((engine, inputs[:_MOST_ROWS].copy(), outputs[:_MOST_ROWS], seconds))
            self._ready.release()
        else:
            self.not_compared += 1
        return outputs

    def verdict(self) -> str | None:
        """Why the candidate must go back; "" if the stage is passed; None if it goes on."""
        with self._lock:
            if self.errors > self.limits.max_errors:
                return f"{self.errors} errors as {self.stage}, the first: {self.error}"
            wanted = self.limits.rows(self.stage)
            if self.rows < min(wanted, EARLY_ROWS):
                return None
            share = self.disagreeing / self.rows
            if share > self.limits.max_disagreement:
                return (
                    f"as {self.stage} it differed by more than {self.limits.tolerance:g} on "
                    f"{share:.1%} of {self.rows} rows; at most "
                    f"{self.limits.max_disagreement:.1%} may"
                )
            old, new = self._median(new=False), self._median(new=True)
            if new > max(self.limits.max_slowdown * old, _SECONDS):
                return (
                    f"as {self.stage} it took {1e3 * new:.2f} ms and the serving version "
                    f"{1e3 * old:.2f} ms; at most {self.limits.max_slowdown:g} times is allowed"
                )
            done = self.rows if self.stage == "shadow" else self.answered
            return "" if done >= wanted else None

    def settle(self, *, timeout: float = 5.0) -> None:
        """Wait until all that was answered is compared."""
        until = time.monotonic() + timeout
        while self._queue and time.monotonic() < until:
            time.sleep(0.001)
        with self._lock:
            pass

    def close(self) -> None:
        """Stop comparing."""
        self._closed = True
        self._queue.clear()
        self._ready.release()

    def to_json(self) -> dict[str, Any]:
        """What the status shows."""
        with self._lock:
            return {
                "version": self.candidate.version,
                "stage": self.stage,
                "share": self.limits.share if self.stage == "canary" else 0.0,
                "rows": self.rows,
                "answered": self.answered,
                "of": self.limits.rows(self.stage),
                "disagreeing": self.disagreeing,
                "errors": self.errors,
                "not_compared": self.not_compared,
                "seconds_serving": self._median(new=False),
                "seconds_candidate": self._median(new=True),
            }

    def _median(self, *, new: bool) -> float:
        times = self._seconds[new]
        return statistics.median(times) if times else 0.0

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.errors += 1
            # The type, or what the guard says of a field: never a patient's value.
            said = str(error) if isinstance(error, Problem) else type(error).__name__
            self.error = self.error or said

    def _work(self) -> None:
        while True:
            self._ready.acquire()
            if self._closed:
                return
            engine, inputs, outputs, seconds = self._queue[0]
            self._compare(engine, inputs, outputs, seconds)
            # Taken off only now, so that an empty queue means that all is compared.
            if self._queue:
                self._queue.popleft()

    def _compare(
        self,
        engine: Engine,
        inputs: NDArray[np.float32],
        outputs: NDArray[np.float32],
        seconds: float,
    ) -> None:
        by_new = engine is self.new
        other = self.old if by_new else self.new
        start = time.perf_counter()
        try:
            if not by_new:
                self._guard.check(inputs)
            beside = other.predict(inputs)
        except Exception as error:  # noqa: BLE001 (whatever a candidate does, callers go on)
            if not by_new:
                self._failed(error)
            return
        took = time.perf_counter() - start
        apart = np.abs(beside.astype(np.float64) - outputs).max(axis=1)
        with self._lock:
            self.rows += len(inputs)
            self.answered += len(inputs) if by_new else 0
            # A NaN is no agreement.
            self.disagreeing += int((~(apart <= self.limits.tolerance)).sum())
            self._seconds[by_new].append(seconds)
            self._seconds[not by_new].append(took)


def why_not_comparable(old: ModelSignature, new: ModelSignature) -> str | None:
    """Why two versions cannot answer the same request; None if they can."""

    def form(signature: ModelSignature) -> list[tuple[Any, ...]]:
        return [(f.name, f.kind, f.unit, sorted(f.codes.items())) for f in signature.fields]

    if form(old) != form(new) or old.outputs != new.outputs:
        return (
            "its fields or outputs are not those of the version that serves, so that the two "
            "cannot be compared; promote it by hand"
        )
    return None
