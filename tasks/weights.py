"""Class weights of a study: public numbers, or of a prevalence that is public."""

import math
from collections.abc import Sequence

from fedward.core.errors import ConfigError
from fedward.core.study import Study
from fedward.tasks.schema import Schema

LARGEST = 10.0
"""Beyond it, all of a rare class would be clipped, and a weight would only take from the others."""

_SUM = 0.01  # that shares may be off by, as printed numbers are


def class_weights(study: Study, schema: Schema) -> tuple[float, ...] | None:
    """The weight of each class's examples in the loss; None where all count the same.

    "balanced" gives a class of share p of k classes the weight 1 / (k p), cut at `LARGEST`.

    Raises:
        ConfigError: The study's weights or shares do not fit the task's label.
    """
    asked = study.training.class_weights
    if asked is None:
        return None
    classes = _classes(schema)
    if asked == "balanced":
        shares = _shares(study.training.prevalence, classes)
        return tuple(min(LARGEST, 1 / (classes * share)) for share in shares)
    if len(asked) != classes:
        raise _wrong("class_weights", f"has to be {classes} numbers, one a class of the label")
    if any(not 0 < weight <= LARGEST for weight in asked):
        raise _wrong("class_weights", f"are above 0 and at most {LARGEST:g}, got {list(asked)}")
    return asked


def _classes(schema: Schema) -> int:
    match schema.label.kind:
        case "flag":
            return 2
        case "category":
            return len(schema.label.categories)
        case "number":
            raise _wrong("class_weights", f"need classes, and {schema.label.name} is a number")


def _shares(prevalence: float | Sequence[float] | None, classes: int) -> tuple[float, ...]:
    if prevalence is None:
        raise _wrong(
            "class_weights",
            '= "balanced" needs prevalence, a public number such as prevalence = 0.2: counted from '
            "patients it would be a release that nothing pays for",
        )
    if isinstance(prevalence, float):
        shares: tuple[float, ...] = (1 - prevalence, prevalence)
    else:
        shares = tuple(prevalence)
    if len(shares) != classes:
        raise _wrong("prevalence", f"has to be {classes} shares, one a class of the label")
    if any(not 0 < share < 1 for share in shares) or not math.isclose(
        sum(shares), 1.0, abs_tol=_SUM
    ):
        raise _wrong("prevalence", f"are shares in (0, 1) that add up to 1, got {list(shares)}")
    return shares


def _wrong(key: str, problem: str) -> ConfigError:
    return ConfigError(problem, file="study", key=f"[training] {key}")
