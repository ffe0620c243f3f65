"""A released model, running: ONNX Runtime on one thread, without torch."""

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


@dataclass(frozen=True, slots=True)
class Engine:
    """Runs one verified release.

    Attributes:
        release: What it runs.
        session: The ONNX Runtime session.
    """

    release: Release
    session: Any

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
        outputs: NDArray[np.float32] = self.session.run([OUTPUT], {INPUT: inputs})[0]
        return outputs.reshape(len(inputs), -1)


def start_engine(release: Release) -> Engine:
    """Load a verified release and ask it for its golden answers.

    Raises:
        ReleaseRejected: The graph does not load, takes or gives something else than
            `signature.json` says, or answers otherwise than the trained model did.
    """
    options = ort.SessionOptions()
    # One thread that sleeps between requests: a hospital's machine has other work, and a small
    # model gains nothing from more.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            release.files["model.onnx"], options, providers=["CPUExecutionProvider"]
        )
        takes = [(node.name, node.type, node.shape[-1]) for node in session.get_inputs()]
        engine = Engine(release, session)
        got = engine.predict(release.golden_inputs)
    except Exception as error:
        # ONNX Runtime's errors have no common base but this one.
        raise ReleaseRejected(
            release=release.label, reason=f"model.onnx does not run: {_first_line(error)}"
        ) from error
    if takes != [(INPUT, "tensor(float)", len(release.signature.fields))]:
        raise ReleaseRejected(
            release=release.label,
            reason=f"model.onnx takes {takes} and signature.json says otherwise",
        )
    wanted = release.golden_outputs
    off = float(np.abs(got - wanted).max()) if got.shape == wanted.shape else np.inf
    if not off <= GOLDEN_TOLERANCE:  # also refuses NaN
        raise ReleaseRejected(
            release=release.label,
            reason=f"its answers to the golden inputs differ by {off:.2g} from the trained "
            f"model's; at most {GOLDEN_TOLERANCE:g} is allowed on this machine",
        )
    # The session holds its own copy: a large model must not be in memory three times.
    light = {path: data for path, data in release.files.items() if path.endswith(".json")}
    return Engine(replace(release, files=light), session)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
