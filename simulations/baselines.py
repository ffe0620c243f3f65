"""What a federated model is compared with: each hospital alone, and everybody's rows pooled.

Pooling patients' rows is what hospitals may not do; it is here for comparison only.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedward.client.objective import study_loss
from fedward.client.plan import plan_site, training_plan
from fedward.client.training import NotPrivate, train
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.privacy.mechanisms import simulated_source
from fedward.strategies.averaging import IterateAverage
from fedward.strategies.strategy import Vector
from fedward.tasks.parameters import from_vector, to_vector
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Examples, Task


def train_centrally(
    task: Task, study: Study, sites: Sequence[Site], examples: Sequence[Examples]
) -> Vector:
    """Train the study's model on the rows of `sites`, as one table, without privacy.

    Takes as many steps of the same optimizer as the federated run does, and averages the same
    share of the later models.

    Returns:
        The model, a flat float32 vector.
    """
    model = study_model(study, task)
    pooled = pool(examples)
    plan = plan_site(study, sites[0])
    weight = sum(plan_site(study, site).weight for site in sites)
    parameters = to_vector(model)
    average = IterateAverage.over_last(study.strategy.average_last, rounds=study.study.rounds)
    names = "+".join(site.name for site in sites)
    for round_number in range(1, study.study.rounds + 1):
        from_vector(model, parameters)
        shaped = replace(
            training_plan(study, plan, round_number=round_number),
            guarantee=NotPrivate(),
            expected_batch_size=plan.sample_rate * weight,
        )
        noise = simulated_source(study.study.seed, names, "train", round_number)
        result = train(model, study_loss(study, task), pooled, plan=shaped, noise=noise)
        parameters = parameters + result.update
        average = average.add(parameters, round_number=round_number)
    return average.released(parameters)


def pool(examples: Sequence[Examples]) -> Examples:
    """Stack examples; patients of different sites stay different units."""
    offsets = np.cumsum([0] + [int(part.units.max(initial=-1)) + 1 for part in examples[:-1]])
    return Examples(
        features=np.concatenate([part.features for part in examples]),
        labels=np.concatenate([part.labels for part in examples]),
        units=np.concatenate(
            [part.units + offset for part, offset in zip(examples, offsets, strict=True)]
        ),
    )
