"""Local acceptance: what a hospital's own patients say of a release, before it is taken.

The figures stay in the site's state folder. Outside goes one word, accepted or refused, which is
nevertheless a fact about held-out patients that no epsilon covers. So a private study gets one
verdict: the same parameters get the same word again, others get none, and a coordinator cannot
find the figure by asking with many models.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import nn

from fedward.client.evaluation import evaluate_model
from fedward.client.local_site import LocalSite
from fedward.core.canonical import digest
from fedward.core.errors import ConfigError, FedwardError
from fedward.core.files import write_atomic
from fedward.core.identity import PublicIdentity
from fedward.core.release import Release
from fedward.core.served import served_release
from fedward.core.study import Study
from fedward.core.toml import build
from fedward.tasks.golden import raw_probabilities
from fedward.tasks.parameters import from_named
from fedward.tasks.registry import get_task
from fedward.tasks.task import Examples, Task

REFUSED = "refused.jsonl"
# Wider than between two runs on one machine: hospitals' processors round float32 differently.
_GOLDEN_TOLERANCE = 1e-4


class NotAccepted(Exception):
    """The release does not pass here. The message and the verdict are for the site alone."""

    def __init__(self, reason: str, verdict: "Verdict | None" = None) -> None:
        self.verdict = verdict
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the held-out patients said, as kept at the site.

    Attributes:
        parameters: SHA-256 of the released parameters and golden answers.
        min_auroc: The policy's floor then.
        max_loss_of_auroc: The policy's margin then.
        auroc: Of the release; None if it is not defined on these patients.
        served: Of the release that the store serves; None where there is none to hold it against.
        reason: Why it is refused; None if it is accepted.
    """

    parameters: str
    min_auroc: float | None
    max_loss_of_auroc: float | None
    auroc: float | None
    served: float | None
    reason: str | None


def judge(
    site: LocalSite, release: Release, *, study_hash: str, store: Path, trusted: PublicIdentity
) -> None:
    """Hold a verified release against the site's floor and what it serves, where policy says so.

    Args:
        site: Whose patients.
        release: Signature and digests are verified.
        study_hash: Of the study that the coordinator says it ends.
        store: The site's store.
        trusted: The pinned publisher.

    Raises:
        NotAccepted: It is not to be taken.
        AdmissionRefused: The study was not admitted here.
    """
    policy = site.site.policy
    if not policy.judges:
        return
    study = site.admitted(study_hash).study
    asked = digest(release.files["model.safetensors"] + release.files["golden.npz"])
    file = site.state / "judged" / f"{study.hash}.json"
    verdict = _kept(file)
    if verdict is not None and study.privacy.mode != "none" and verdict.parameters != asked:
        raise NotAccepted("another model of this private study was judged here before")
    limits = (policy.min_auroc, policy.max_loss_of_auroc)
    if (
        verdict is None
        or verdict.parameters != asked
        or (verdict.min_auroc, verdict.max_loss_of_auroc) != limits
    ):
        verdict = _evaluate(site, release, study, asked, store=store, trusted=trusted)
        # On disk before the word leaves, so that a crash cannot make room for a second one.
        write_atomic(file, json.dumps(asdict(verdict), indent=1) + "\n", mode=0o600)
    if verdict.reason is not None:
        raise NotAccepted(verdict.reason, verdict)


def keep_refusal(site: LocalSite, *, reason: str, verdict: Verdict | None = None) -> None:
    """Add a line to the site's `refused.jsonl`, which only its own people read."""
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "reason": reason,
    }
    if verdict is not None:
        entry["verdict"] = asdict(verdict)
    site.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = site.state / REFUSED
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _evaluate(
    site: LocalSite,
    release: Release,
    study: Study,
    asked: str,
    *,
    store: Path,
    trusted: PublicIdentity,
) -> Verdict:
    policy = site.site.policy
    task = get_task(study.study.task)
    if _study_of(release).hash != study.hash:
        raise NotAccepted("it is signed as the release of another study than was admitted")
    _, held_out = site.examples(task, study)
    auroc = _auroc(task, _model_of(task, release), held_out)
    served = None
    if policy.max_loss_of_auroc is not None:
        served = _served_auroc(release, task, held_out, store=store, trusted=trusted)
    reason = None
    if auroc is None:
        reason = "the held-out patients do not have both outcomes, or the model is not finite"
    elif policy.min_auroc is not None and auroc < policy.min_auroc:
        reason = f"AUROC is {auroc:.4f} and [policy] min_auroc = {policy.min_auroc:g}"
    elif (
        policy.max_loss_of_auroc is not None
        and served is not None
        and auroc < served - policy.max_loss_of_auroc
    ):
        reason = (
            f"AUROC is {auroc:.4f}, what is served has {served:.4f}, and [policy] "
            f"max_loss_of_auroc = {policy.max_loss_of_auroc:g}"
        )
    return Verdict(
        parameters=asked,
        min_auroc=policy.min_auroc,
        max_loss_of_auroc=policy.max_loss_of_auroc,
        auroc=auroc,
        served=served,
        reason=reason,
    )


def _served_auroc(
    release: Release,
    task: Task,
    held_out: Examples,
    *,
    store: Path,
    trusted: PublicIdentity,
) -> float | None:
    try:
        served = served_release(store, release.signature.model, trusted)
    except FedwardError as error:
        # A comparison that cannot be made is not one that was passed.
        raise NotAccepted(f"what is served cannot be read: {error}") from error
    if served is None:
        return None
    if served.signature.task != task.name:
        raise NotAccepted(f"{served.label} is of the task {served.signature.task}")
    return _auroc(task, _model_of(task, served), held_out)


def _study_of(release: Release) -> Study:
    try:
        training = json.loads(release.files["training.json"])
        if training.get("prepared_with") is not None:
            raise NotAccepted("its preparation was fitted, and acceptance knows public ranges only")
        return build(training["agreed"], Study, file="training.json")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise NotAccepted(f"training.json does not say which study it is of: {error}") from error


def _model_of(task: Task, release: Release) -> nn.Module:
    """A release's model, once it is seen to give the answers that the adapter will hold ONNX to."""
    chosen = _study_of(release).model
    try:
        model = task.model(chosen.name, **chosen.args)
        from_named(model, load(release.files["model.safetensors"]))
        model.eval()
        given = raw_probabilities(task, model, release.golden_inputs, None)
    except (ValueError, SafetensorError, ConfigError) as error:
        raise NotAccepted(f"its parameters do not fit its model: {error}") from error
    expected = release.golden_outputs
    if given.shape != expected.shape or not np.allclose(
        given, expected, rtol=0, atol=_GOLDEN_TOLERANCE
    ):
        raise NotAccepted("model.safetensors does not give the golden answers")
    return model


def _auroc(task: Task, model: nn.Module, held_out: Examples) -> float | None:
    try:
        return task.summarise(evaluate_model(task, model, held_out)).get("auroc")
    except ValueError:
        return None  # a probability that is none: not finite


def _kept(file: Path) -> Verdict | None:
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Verdict(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise NotAccepted(f"{file} is malformed") from error
