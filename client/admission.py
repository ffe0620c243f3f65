"""What this hospital permits, whatever a coordinator asks."""

from torch import nn

from fedward.client.training.modes import validate
from fedward.core.errors import AdmissionRefused, ConfigError
from fedward.core.site import Site
from fedward.core.study import Study
from fedward.tasks.adapters import LowRank
from fedward.tasks.study_model import study_model
from fedward.tasks.task import Task

# Of these no record's gradient depends on another; Opacus need not be imported to say so.
_PLAIN = (nn.Sequential, nn.Linear, LowRank, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Identity)


def check_policy(site: Site, study: Study) -> None:
    """Hold a study against the site's policy.

    The budget is checked by the ledger, in the transaction that records it.

    Raises:
        AdmissionRefused: Names the line of the policy that says no.
    """
    policy = site.policy

    def refuse(line: str, reason: str) -> AdmissionRefused:
        return AdmissionRefused(site=site.name, policy=f"[policy] {line}", reason=reason)

    if study.study.task not in policy.tasks:
        allowed = ", ".join(policy.tasks)
        raise refuse(f"tasks = {allowed}", f"the study's task is {study.study.task}")
    if study.aggregation.min_sites < policy.min_sites:
        raise refuse(
            f"min_sites = {policy.min_sites}",
            f"the study may aggregate as few as {study.aggregation.min_sites} sites; raise "
            "[aggregation] min_sites in the study",
        )
    if policy.require_secure_aggregation and not study.aggregation.secure:
        raise refuse(
            "require_secure_aggregation = true",
            "the study has [aggregation] secure = false; set it to true",
        )
    if study.privacy.mode == "none" and not policy.allow_no_privacy:
        raise refuse(
            "allow_no_privacy = false", 'the study has [privacy] mode = "none"; choose a mode'
        )
    record = study.privacy.mode != "none" and study.privacy.unit == "record"
    if record and not policy.allow_record_unit:
        raise refuse(
            "allow_record_unit = false",
            'the study has [privacy] unit = "record", which protects a patient with many records '
            'less; choose unit = "patient" with max_records',
        )
    if study.privacy.mode != "none" and study.privacy.delta > policy.delta:
        raise refuse(
            f"delta = {policy.delta:g}",
            f"the study's delta is {study.privacy.delta:g}; lower it to the policy's",
        )
    if study.aggregation.secure and policy.roster is None:
        raise refuse(
            "roster is not set",
            "the study has [aggregation] secure = true, which needs the consortium's roster; "
            'add roster = "roster.toml"',
        )


def check_model(study: Study, task: Task) -> None:
    """See, before anything is granted or paid, whether the study's model can be trained privately.

    Raises:
        ConfigError: One record's gradient would depend on another record, as with batch
            normalisation, so that nothing bounds what a patient changes.
    """
    if study.privacy.mode == "none" or study.protects_sites:
        return  # nobody's gradient is clipped
    model = study_model(study, task)
    if all(type(module) in _PLAIN for module in model.modules()):
        return
    try:
        validate(model)
    except ValueError as error:
        found = str(error).split(". ", 1)[0]
        raise ConfigError(
            f'= "{study.model.name}": {found}; choose another model, or replace the layer (group '
            "normalisation does the work of batch normalisation)",
            file="study of the coordinator",
            key="[model] name",
        ) from error
