"""A released model, running: ONNX Runtime on one thread, without torch."""

import statistics
import time
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
    """

    release: Release
    session: Any
    measured: tuple[Measured, ...] = ()

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
        return _run(self.session, inputs)


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
    return Engine(replace(release, files=light), session, measured)


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
