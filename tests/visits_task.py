"""A task for tests whose patients come more than once: heart disease, a row a visit."""

from dataclasses import replace

from fedward.tasks.heart_disease import HEART_DISEASE

VISITS = replace(
    HEART_DISEASE,
    name="visits",
    schema=replace(HEART_DISEASE.schema, one_row_a_patient=False),
)
