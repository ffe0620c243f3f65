"""What this hospital permits, whatever a coordinator asks."""

from fedward.core.errors import AdmissionRefused
from fedward.core.site import Site
from fedward.core.study import Study


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
