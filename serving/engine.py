"""A released model, running: ONNX Runtime on one thread, without torch."""

import statistics
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from fedward.core.errors import ReleaseRejected
from fedward.core.fields import INPUT, OUTPUT, ModelSignature
from fedward.core.release import Release

# Torch and ONNX Runtime order float32 sums differently; a wrong graph is off by far more.
GOLDEN_TOLERANCE = 1e-5
# What a clinician is shown must not change by more than half a percentage point.
VARIANT_TOLERANCE = 5e-3
# A variant must be this much faster to be worth its rounding.
_WORTH = 0.9
_REPEATS = 7
ORIGINAL = "model.onnx"
_NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Measured:
    """What this host found of one form of a model.

    Attributes:
        name: `model.onnx`, or a variant's path.
        seconds: Median time for the golden inputs, one by one.
        off: Largest difference of a probability from the trained model's.
        chosen: Whether it is the one that is served.
    """

    name: str
    seconds: float
    off: float
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs one verified release.

    Attributes:
        release: What it runs.
        session: The ONNX Runtime session.
        measured: What this host found of the model and of its variants, the model first.
        single: The session's shorter way for one patient; None if it has none.
    """

    release: Release
    session: Any
    measured: tuple[Measured, ...] = ()
    single: "SingleRow | None" = None

    @property
    def signature(self) -> ModelSignature:
        """The model's interface."""
        return self.release.signature

    def predict(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Probabilities for raw clinical values.

        Args:
            inputs: float32, shape `(n, fields)`, in the signature's units and order; NaN is
                missing.

        Returns:
            float32, shape `(n, outputs)`.
        """
        if self.single is not None and len(inputs) == 1:
            outputs = self.single.run(inputs)
            if outputs is not None:
                return outputs
        return _run(self.session, inputs)


class SingleRow:
    """Runs a session for one row in memory that is bound to it once.

    Most requests are of one patient, for whom finding and checking names, and making arrays, costs
    as much as the model.

    Args:
        session: The ONNX Runtime session.
        width: Number of the input's columns.
        outputs: Number of the output's columns.
    """

    def __init__(self, session: Any, *, width: int, outputs: int) -> None:
        self._session = session
        self._inputs = np.zeros((1, width), np.float32)
        self._outputs = np.zeros((1, outputs), np.float32)
        self._binding = session.io_binding()
        self._binding.bind_input(
            INPUT, "cpu", 0, np.float32, self._inputs.shape, self._inputs.ctypes.data
        )
        self._binding.bind_output(
            OUTPUT, "cpu", 0, np.float32, self._outputs.shape, self._outputs.ctypes.data
        )
        self._memory = self._inputs.data.cast("B")
        self._pack = struct.Struct(f"{width}f").pack_into
        self._free = threading.Lock()

    def run_row(self, row: Sequence[float | None]) -> list[float] | None:
        """As `run`, of numbers that float32 can hold; None is missing."""
        if not self._free.acquire(blocking=False):
            return None
        try:
            if None in row:
                row = [_NAN if value is None else value for value in row]
            self._pack(self._memory, 0, *row)
            self._session.run_with_iobinding(self._binding)
            found: list[float] = self._outputs[0].tolist()
            return found
        finally:
            self._free.release()

    def run(self, inputs: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """Probabilities of shape `(1, outputs)`; None while another thread is at it."""
        if not self._free.acquire(blocking=False):
            return None
        try:
            self._inputs[:] = inputs
            self._session.run_with_iobinding(self._binding)
            return self._outputs.copy()
        finally:
            self._free.release()


def start_engine(release: Release) -> Engine:
    """Load a verified release and ask it for its golden answers.

    Of its variants the fastest is taken that answers within 0.005 of the trained model and is at
    least a tenth faster than the original on this host.

    Raises:
        ReleaseRejected: The graph does not load, takes or gives something else than
            `signature.json` says, or answers otherwise than the trained model did.
    """
    original, off = _load(release, ORIGINAL)
    if not off <= GOLDEN_TOLERANCE:  # also refuses NaN
        raise ReleaseRejected(
            release=release.label,
            reason=f"its answers to the golden inputs differ by {off:.2g} from the trained "
            f"model's; at most {GOLDEN_TOLERANCE:g} is allowed on this machine",
        )
    session, measured = _choose(release, original, off)
    # The session holds its own copy: a large model must not be in memory three times.
    light = {path: data for path, data in release.files.items() if path.endswith(".json")}
    single = _single_row(session, release)
    return Engine(replace(release, files=light), session, measured, single)


def _single_row(session: Any, release: Release) -> SingleRow | None:
    """The shorter way, if it gives what the session gives."""
    one = release.golden_inputs[:1]
    try:
        single = SingleRow(
            session, width=len(release.signature.fields), outputs=len(release.signature.outputs)
        )
        got, wanted = single.run(one), _run(session, one)
    except Exception:  # noqa: BLE001 (ONNX Runtime's errors have no common base but this one)
        return None  # an output of another shape: the longer way takes it
    return single if got is not None and np.array_equal(got, wanted) else None


def _choose(release: Release, original: Any, off: float) -> tuple[Any, tuple[Measured, ...]]:
    variants = sorted(path for path in release.files if path.startswith("variants/"))
    if not variants:
        return original, ()
    sessions = {ORIGINAL: original}
    found = [Measured(ORIGINAL, _seconds(original, release.golden_inputs), off)]
    for path in variants:
        sessions[path], differs = _load(release, path)
        seconds = _seconds(sessions[path], release.golden_inputs)
        found.append(Measured(path, seconds, differs))
    worthy = [
        one
        for one in found[1:]
        if one.off <= VARIANT_TOLERANCE and one.seconds <= _WORTH * found[0].seconds
    ]
    best = min(worthy, key=lambda one: one.seconds, default=found[0])
    marked = tuple(replace(one, chosen=one is best) for one in found)
    return sessions[best.name], marked


def _load(release: Release, path: str) -> tuple[Any, float]:
    """A form of the model, and how far its golden answers are off. Raises `ReleaseRejected`."""
    options = ort.SessionOptions()
    # One thread that sleeps between requests: a hospital's machine has other work, and a small
    # model gains nothing from more.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            release.files[path], options, providers=["CPUExecutionProvider"]
        )
        takes = [(node.name, node.type, node.shape[-1]) for node in session.get_inputs()]
        got = _run(session, release.golden_inputs)
    except Exception as error:
        # ONNX Runtime's errors have no common base but this one.
        raise ReleaseRejected(
            release=release.label, reason=f"{path} does not run: {_first_line(error)}"
        ) from error
    if takes != [(INPUT, "tensor(float)", len(release.signature.fields))]:
        raise ReleaseRejected(
            release=release.label, reason=f"{path} takes {takes} and signature.json says otherwise"
        )
    wanted = release.golden_outputs
    return session, float(np.abs(got - wanted).max()) if got.shape == wanted.shape else np.inf


def _run(session: Any, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    outputs: NDArray[np.float32] = session.run([OUTPUT], {INPUT: inputs})[0]
    return outputs.reshape(len(inputs), -1)


def _seconds(session: Any, inputs: NDArray[np.float32]) -> float:
    """Median time of the golden inputs, one patient after the other, as they come."""
    found = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for row in inputs:
            _run(session, row[None])
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
