"""The publisher: a trained model becomes a signed release in the registry."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedward.core.arrays import write_golden
from fedward.core.errors import ConfigError
from fedward.core.fields import Field, ModelSignature
from fedward.core.identity import Identity
from fedward.core.study import Study
from fedward.server.bom import bill_of_materials
from fedward.server.card import card_json
from fedward.server.card_html import card_html
from fedward.server.registry import Registry
from fedward.server.statement import privacy_statement
from fedward.server.units import conversions
from fedward.server.variants import make_variants, measure_variants

if TYPE_CHECKING:
    from fedward.tasks.schema import Field as SchemaField
    from fedward.tasks.task import Fitted, Task

_GOLDEN_ROWS = 64
_GOLDEN_MISSING = 0.2  # of the golden inputs' values, so that missing ones are tested too
# Torch and ONNX Runtime order float32 sums differently; a wrong graph is off by far more.
GOLDEN_TOLERANCE = 1e-5


def publish(
    *,
    registry: Path,
    study: Study,
    task: "Task",
    parameters: NDArray[np.float32],
    fitted: "Fitted | None",
    privacy: Mapping[str, Any],
    metrics: Mapping[str, Any],
    training: Mapping[str, Any],
    identity: Identity,
    monitor: Mapping[str, Any] | None = None,
) -> Path:
    """Publish a model as the next version of the study's name.

    Apart from the signature, equal arguments give equal files.

    Args:
        registry: The registry's folder.
        study: What was trained.
        task: The study's task.
        parameters: The global model, flat, shape `(num_parameters,)`.
        fitted: What the task's preparation was fitted to; None for the schema's public ranges.
        privacy: What was accounted for; see `statement.privacy_statement`.
        metrics: As in a run's `metrics.json`: `pooled`, `mean`, `worst`, `sites`.
        training: Facts of the run for `training.json`, such as rounds, sites, and versions, or a
            run's manifest that holds them.
        identity: The publisher's ECDSA P-256 identity.
        monitor: Histograms of the inputs and predictions, made under differential privacy, for
            the adapter to watch for drift; the form is that of `serving.drift`.

    Returns:
        The release's folder, `registry/NAME/VERSION`.

    Raises:
        ValueError: An argument is incomplete, or `identity` cannot sign releases.
    """
    from safetensors.numpy import save

    from fedward.tasks.golden import raw_probabilities
    from fedward.tasks.parameters import from_vector, to_named
    from fedward.tasks.study_model import published_model, study_model

    model = study_model(study, task)
    from_vector(model, np.ascontiguousarray(parameters, dtype=np.float32))
    published_model(model)
    model.eval()
    statement = privacy_statement(privacy)
    facts = {
        "study": study.study.name,
        "study_hash": study.hash,
        "agreed": study.agreed(),
        "prepared_with": None if fitted is None else dict(fitted),
        "versions": dict(training.get("manifest", {}).get("versions", {})),
        **training,
    }
    onnx = task.export_onnx(model, fitted)
    named = to_named(model)
    variants = make_variants(onnx, num_parameters=sum(array.size for array in named.values()))
    inputs = golden_inputs(task.schema.features, seed=study.hash)
    measured = measure_variants(onnx, variants, inputs)
    golden = write_golden(inputs, raw_probabilities(task, model, inputs, fitted))
    weights = save(named, metadata={"format": "np"})

    def build(version: int) -> dict[str, bytes]:
        signature = ModelSignature(
            model=study.study.name,
            version=version,
            task=task.name,
            outcome=task.schema.label.description,
            fields=tuple(_field(field) for field in task.schema.features),
        )
        card = card_json(
            signature,
            statement=statement,
            metrics=metrics,
            training=facts,
            monitor=monitor,
            forms=measured,
            about=study.publish.card.model_dump(),
        )
        watched = {} if monitor is None else {"monitor.json": _pretty(dict(monitor))}
        files = {
            **watched,
            **variants,
            "model.safetensors": weights,
            "model.onnx": onnx,
            "signature.json": _pretty(signature.to_json()),
            "card.json": _pretty(card),
            "card.html": card_html(card, signature).encode(),
            "privacy.json": _pretty(statement),
            "training.json": _pretty(facts),
            "golden.npz": golden,
        }
        bill = bill_of_materials(signature, files, training=facts)
        return {**files, "bom.cdx.json": _pretty(bill)}

    return Registry(registry).add(study.study.name, build, identity=identity)


def refuse_unpublishable(study: Study, task: "Task") -> None:
    """Check, before anybody spends anything, that what will be trained can be published.

    Raises:
        ConfigError: The task has no ONNX form of the study's model.
    """
    from fedward.tasks.study_model import published_model, study_model

    model = study_model(study, task)
    published_model(model)
    try:
        task.export_onnx(model.eval(), None)
    except ValueError as error:
        raise ConfigError(
            f'= "{study.model.name}" could be trained and not published: {error}; choose another '
            "model, or give the task an export_onnx that knows it",
            file="study",
            key="[model] name",
        ) from error


def golden_inputs(fields: "tuple[SchemaField, ...]", *, seed: str) -> NDArray[np.float32]:
    """Inputs that no patient gave: uniform over the schema's ranges and codes, some missing.

    Args:
        fields: The schema's features.
        seed: Any text; the same gives the same inputs.

    Returns:
        Shape `(64, len(fields))`; NaN is missing.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]))
    columns = []
    for field in fields:
        if field.allowed is not None:
            low, high = field.allowed
            values = rng.uniform(low, high, _GOLDEN_ROWS)
        else:
            values = rng.integers(len(_codes(field)), size=_GOLDEN_ROWS).astype(np.float64)
        values[rng.random(_GOLDEN_ROWS) < _GOLDEN_MISSING] = np.nan
        columns.append(values)
    return np.stack(columns, axis=1).astype(np.float32)


def _codes(field: "SchemaField") -> dict[str, float]:
    match field.kind:
        case "number":
            return {}
        case "category":
            return {name: float(code) for code, name in enumerate(field.categories)}
        case "flag":
            return {"no": 0.0, "yes": 1.0}


def _field(field: "SchemaField") -> Field:
    low, high = field.allowed or (None, None)
    return Field(
        name=field.name,
        title=field.description,
        kind=field.kind,
        unit=field.unit,
        low=low,
        high=high,
        codes=_codes(field),
        units=conversions(field.unit, field.loinc),
        loinc=field.loinc,
    )


def _pretty(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
