"""The round loop: admit, train round by round, evaluate, publish."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedward.core.canonical import digest
from fedward.core.errors import AggregationAborted, ConfigError, UpdateRejected
from fedward.core.identity import Identity, PublicIdentity
from fedward.core.run import RunDirectory
from fedward.core.study import Study
from fedward.privacy.secagg.terms import MAX_COMPLETE
from fedward.server.channel import Channel, Reply
from fedward.server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedward.server.execution import Execution
from fedward.server.members import Member, admit
from fedward.server.monitor import collect_monitor
from fedward.server.outcome import collect_outcome, publish_outcome
from fedward.server.publisher import refuse_unpublishable
from fedward.server.secure import SecureRounds
from fedward.strategies.averaging import IterateAverage
from fedward.strategies.registry import make_strategy
from fedward.strategies.strategy import State, Strategy, Vector
from fedward.tasks.parameters import to_vector
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model
from fedward.tasks.subgroups import groupings
from fedward.tasks.weights import class_weights
from fedward.transport.payload import Payload

_POLL_NODES = 0.2

Roster = Mapping[str, PublicIdentity]
OneRound = Callable[[Strategy, State, int], tuple[State, list[str]]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a coordinator is told beside the study.

    Attributes:
        registry: Folder of releases.
        sites: How many sites to wait for before the study is sent.
        patience: Seconds to wait for them.
        deadline: Seconds that a site has for one answer.
        roster: Every site's public identity; secure aggregation needs it.
        durable: Flush checkpoints to disk. Without it a power cut may take a run, though nothing
            less may.
    """

    registry: Path
    sites: int
    patience: float = 120.0
    deadline: float = 600.0
    roster: Roster | None = None
    durable: bool = True


def coordinate(
    channel: Channel, study: Study, run: RunDirectory, *, settings: Settings, publisher: Identity
) -> dict[str, Any]:
    """Run a study to its release; what is on disk of an earlier try is gone on from.

    Returns:
        What `metrics.json` holds.

    Raises:
        ConfigError: The study asks for what cannot be had; nothing was sent.
        AggregationAborted: A round is void.
    """
    started = time.monotonic()
    refuse_impossible(study, settings.roster)
    task = get_task(study.study.task)
    strategy = make_strategy(study.strategy.name, study.strategy.args)
    model = study_model(study, task)
    checkpoint = load_checkpoint(run.path / "checkpoints", study_hash=study.hash) or Checkpoint(
        round_number=0,
        study_hash=study.hash,
        state=strategy.init(to_vector(model)),
        average=IterateAverage.over_last(study.strategy.average_last, rounds=study.study.rounds),
    )
    run.event("started", study=study.study.name, hash=study.hash, rounds=study.study.rounds)
    _wait_for_sites(channel, settings)
    members = admit(channel, study, run, deadline=settings.deadline)
    execution = Execution(
        channel,
        study,
        run,
        task,
        members,
        deadline=settings.deadline,
        roster_size=len(settings.roster or ()),
        durable=settings.durable,
    )
    secure = _secure_rounds(execution, checkpoint, settings.roster)
    checkpoint = _train(execution, strategy, checkpoint, secure)
    parameters = checkpoint.average.released(checkpoint.state.parameters)
    monitor = collect_monitor(execution, parameters, secure)
    outcome = collect_outcome(execution, parameters)
    return publish_outcome(
        execution,
        parameters,
        outcome,
        registry=settings.registry,
        publisher=publisher,
        seconds=round(time.monotonic() - started, 3),
        secure=None if secure is None or not secure.agreed else secure.cost.to_json(),
        monitor=monitor,
    )


def refuse_impossible(study: Study, roster: Mapping[str, object] | None) -> None:
    """Check, before anything is sent, that the study's lines go together.

    Raises:
        ConfigError: Two lines are in conflict; both are named.
    """
    strategy = make_strategy(study.strategy.name, study.strategy.args)
    task = get_task(study.study.task)
    groupings(task.schema, study.evaluation.subgroups)
    class_weights(study, task.schema)
    refuse_unpublishable(study, task)
    if study.aggregation.secure and strategy.needs == "each":
        raise ConfigError(
            f'[strategy] name = "{study.strategy.name}" must see every single update, and '
            "[aggregation] secure = true shows only their sum; change one of the two lines",
            file="study",
        )
    if study.privacy.mode == "central":
        raise ConfigError(
            '= "central" cannot be run by this version; use mode = "local" or "distributed"',
            file="study",
            key="[privacy] mode",
        )
    if study.privacy.mode == "distributed":
        if study.protects_sites:
            _refuse_plain_sums(study)
        else:
            _refuse_half_distributed(study)
    if study.aggregation.secure and roster is None:
        raise ConfigError(
            "= true needs the consortium's roster at the coordinator; give it with --roster",
            file="study",
            key="[aggregation] secure",
        )
    if (
        study.aggregation.secure
        and len(roster or ()) > MAX_COMPLETE
        and study.aggregation.adversary == "malicious"
    ):
        raise ConfigError(
            f'= "malicious" is withstood by up to {MAX_COMPLETE} sites and the roster has '
            f'{len(roster or ())}; use "honest-but-curious"',
            file="study",
            key="[aggregation] adversary",
        )
    if study.aggregation.audit_rounds and len(roster or ()) < 2 * study.aggregation.min_sites:
        raise ConfigError(
            f"needs two groups of [aggregation] min_sites = {study.aggregation.min_sites} and the "
            f"roster has {len(roster or ())} sites; remove it, or lower min_sites",
            file="study",
            key="[aggregation] audit_rounds",
        )


def _refuse_plain_sums(study: Study) -> None:
    if not study.aggregation.secure:
        raise ConfigError(
            '= "site" hides each hospital in the sum of all, and [aggregation] secure = false '
            "shows each by itself; set it to true",
            file="study",
            key="[privacy] unit",
        )


def _refuse_half_distributed(study: Study) -> None:
    training = study.training
    wrong = {
        "[aggregation] secure = true": not study.aggregation.secure,
        "[training] local_steps = 1": training.local_steps != 1,
        "[training] sample_rate, the same at every site": training.sample_rate is None,
        '[training] optimizer = "sgd" without momentum and weight_decay': (
            training.optimizer != "sgd" or training.momentum > 0 or training.weight_decay > 0
        ),
        '[training] schedule = "constant" and averaging = "last"': (
            training.schedule != "constant" or training.averaging != "last"
        ),
    }
    for needed, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(
                f'= "distributed" is DP-SGD on everybody\'s patients, a step a round; it needs '
                f"{needed}",
                file="study",
                key="[privacy] mode",
            )


def _wait_for_sites(channel: Channel, settings: Settings) -> None:
    until = time.monotonic() + settings.patience
    while len(channel.node_ids()) < settings.sites and time.monotonic() < until:
        time.sleep(_POLL_NODES)


def _secure_rounds(
    execution: Execution, checkpoint: Checkpoint, roster: Roster | None
) -> SecureRounds | None:
    if not execution.study.aggregation.secure or roster is None:
        return None
    return SecureRounds(execution, roster=roster, size=checkpoint.state.parameters.size)


def _train(
    execution: Execution, strategy: Strategy, checkpoint: Checkpoint, secure: SecureRounds | None
) -> Checkpoint:
    study, run = execution.study, execution.run
    first = checkpoint.round_number + 1
    one_round: OneRound = partial(_one_round, execution)
    if secure is not None and first <= study.study.rounds:
        secure.agree()
        one_round = secure.round
        # A round that was opened and not finished is void: sites never answer its number again.
        opened = [event["round"] for event in run.events() if event["event"] == "opened"]
        first = max([first, *(number + 1 for number in opened)])
    for round_number in range(first, study.study.rounds + 1):
        begun = time.monotonic()
        if secure is not None:
            run.event("opened", round=round_number)
        state, survivors = one_round(strategy, checkpoint.state, round_number)
        checkpoint = Checkpoint(
            round_number,
            study.hash,
            state,
            checkpoint.average.add(state.parameters, round_number=round_number),
        )
        save_checkpoint(run.path / "checkpoints", checkpoint, durable=execution.durable)
        run.event(
            "round",
            round=round_number,
            of=study.study.rounds,
            sites=len(survivors),
            seconds=round(time.monotonic() - begun, 4),
            parameters=digest(state.parameters.tobytes())[:16],
        )
    return checkpoint


def _one_round(
    execution: Execution, strategy: Strategy, state: State, round_number: int
) -> tuple[State, list[str]]:
    request = Payload(
        {
            "hash": execution.study.hash,
            "round": round_number,
            "instructions": dict(strategy.instructions(state)),
        },
        {"parameters": state.parameters},
    )
    missing: list[str] = []
    first = ""
    for member, reply in execution.ask_all("train.update", request, round_number=round_number):
        try:
            update = _read_update(member, reply, round_number, state)
        except UpdateRejected as error:
            execution.run.event("failed", round=round_number, site=member.site, reason=error.reason)
            missing.append(member.site)
            first = first or error.reason
            continue
        state = strategy.fold(state, update, member.weight or 0.0)
    survivors = [member.site for member in execution.members if member.site not in missing]
    threshold = execution.study.aggregation.min_sites
    if len(survivors) < threshold:
        raise AggregationAborted(
            round_number=round_number, missing=missing, threshold=threshold, reason=first
        )
    return strategy.finish(state), survivors


def _read_update(member: Member, reply: Reply, round_number: int, state: State) -> Vector:
    if reply.payload is None:
        raise UpdateRejected(site=member.site, reason=str(reply.problem))
    record, arrays = reply.payload.record, reply.payload.arrays
    if record.get("site") != member.site or record.get("round") != round_number:
        raise UpdateRejected(site=member.site, reason="it answers another round or as another site")
    update = arrays.get("update")
    if update is None or update.dtype != np.float32 or update.shape != state.parameters.shape:
        raise UpdateRejected(site=member.site, reason="its update has another type or shape")
    # Where the sum of squares is finite, so is every part: one pass, and no array of booleans.
    if not (math.isfinite(np.dot(update, update)) or np.isfinite(update).all()):
        raise UpdateRejected(site=member.site, reason="its update is not finite")
    return update
