"""A study: what is to be trained and how.

One file, the same for every site and every runtime. A study's hash pins what a site admitted:
it covers everything except `[simulation]` and `[publish]`, which change nothing at a site.
"""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedward.core.canonical import digest_json
from fedward.core.simulated import Args, SimulationSection
from fedward.core.toml import Section, parse_toml, read_toml

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Unit = Literal["record", "patient", "site"]
Mode = Literal["none", "local", "distributed", "central"]
_TRAINING_BEFORE: dict[str, Any] = {
    "schedule": "constant",
    "averaging": "last",
    "class_weights": None,
    "prevalence": None,
    "freeze": [],
    "adapters": None,
}
_ADAPTIVE = ("clip_quantile", "clip_learning_rate", "clip_count_noise")


class StudySection(Section):
    """`[study]`: name, task, length."""

    name: Name
    task: str
    rounds: int = Field(ge=1, le=100_000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class ModelSection(Section):
    """`[model]`: one of the task's models; `args` go to its constructor."""

    name: str
    args: Args = Field(default_factory=dict)


class AdaptersSection(Section):
    """`[training] adapters`: train corrections of low rank in place of these linear layers.

    `layers` are names of the model's, `rank` that of the corrections, and `scale` the alpha of Hu
    et al., ICLR 2022. Other layers are trained as they are, unless `freeze` names them.
    """

    layers: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    rank: int = Field(ge=1, le=4096)
    scale: float = Field(default=8.0, gt=0)


class TrainingSection(Section):
    """`[training]`: what a site does in a round.

    `sample_rate` is the Poisson inclusion probability of a patient in a step. `batch_size`, its
    expected number, may be given instead; the rate is then batch_size over the site's declared
    `public_size`. Exactly one of `local_epochs` and `local_steps` says how long a round is.
    `schedule` is how the learning rate falls to zero over the steps of all rounds; `averaging` is
    what a site gives of a round: its last iterate, the mean of the second half of them ("tail") or
    their exponential moving average ("ema"). Neither costs privacy.

    `class_weights` are public numbers, one a class of the label, by which the loss of its examples
    is multiplied before anything is clipped; "balanced" makes them of `prevalence`, the public
    share of the positive class, or the shares of all classes.

    What `freeze` names of the model's layers stays as the task gives it.
    """

    local_epochs: float | None = Field(default=None, gt=0)
    local_steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    sample_rate: float | None = Field(default=None, gt=0, le=1)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    averaging: Literal["last", "tail", "ema"] = "last"
    class_weights: (
        Literal["balanced"] | Annotated[tuple[float, ...], Field(strict=False)] | None
    ) = None
    freeze: tuple[str, ...] = Field(default=(), strict=False)
    adapters: AdaptersSection | None = None
    prevalence: float | Annotated[tuple[float, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> "TrainingSection":
        if (self.local_epochs is None) == (self.local_steps is None):
            raise ValueError("needs exactly one of `local_epochs` and `local_steps`")
        if (self.batch_size is None) == (self.sample_rate is None):
            raise ValueError("needs exactly one of `batch_size` and `sample_rate`")
        if self.prevalence is not None and self.class_weights != "balanced":
            raise ValueError(
                'prevalence belongs to class_weights = "balanced"; add that, or remove prevalence'
            )
        return self


class StrategySection(Section):
    """`[strategy]`: how updates become a model; `args` go to its constructor.

    The model that is published is the mean over the last `average_last` of the rounds.
    """

    name: str = "fedavg"
    average_last: float = Field(default=0.0, ge=0, lt=1)
    args: Args = Field(default_factory=dict)


class PrivacySection(Section):
    """`[privacy]`: the guarantee of the whole run, per unit.

    In mode "distributed" it holds against the coordinator together with `colluders` sites. With
    `unit = "site"` what is protected is all that a hospital holds: it trains without noise,
    `clip_norm` bounds its whole update of a round, and the sum over the sites carries the noise.

    With `clipping = "adaptive"`, in mode "local", `clip_norm` is where each site starts; from there
    its own follows the quantile `clip_quantile` of its patients' gradients, at
    `clip_learning_rate`. How many are within it is counted with noise of `clip_count_noise`
    patients; the noise on gradients is raised so that both together keep `epsilon`.
    """

    mode: Mode
    unit: Unit = "patient"
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    clipping: Literal["fixed", "adaptive"] = "fixed"
    clip_quantile: float | None = Field(default=None, gt=0, lt=1)
    clip_learning_rate: float | None = Field(default=None, gt=0)
    clip_count_noise: float | None = Field(default=None, gt=0)
    max_records: int = Field(default=1, ge=1)
    colluders: int = Field(default=0, ge=0)
    acknowledge: str | None = None

    @model_validator(mode="after")
    def _named_or_priced(self) -> "PrivacySection":
        if self.mode == "none":
            if self.acknowledge != "no privacy":
                raise ValueError(
                    'mode = "none" trains without any privacy; if that is meant, add '
                    'acknowledge = "no privacy"'
                )
            if self.epsilon is not None:
                raise ValueError('mode = "none" takes no epsilon; remove it, or choose a mode')
        else:
            if self.epsilon is None:
                raise ValueError(f'mode = "{self.mode}" needs epsilon, such as epsilon = 4.0')
            if self.acknowledge is not None:
                raise ValueError('acknowledge belongs to mode = "none"; remove it')
        if self.unit == "site" and self.mode == "local":
            raise ValueError(
                'unit = "site" cannot be had in mode = "local": a hospital\'s own noise would have '
                "to hide the whole hospital from the coordinator, and with it what it learnt; "
                'choose mode = "distributed" with [aggregation] secure = true, where the '
                'noise of all sites hides each of them, or unit = "patient"'
            )
        if self.unit == "record" and self.max_records > 1:
            raise ValueError(
                f"max_records = {self.max_records} bounds a patient's rows where the unit is the "
                'patient; with unit = "record" each row counts by itself: remove it'
            )
        return self

    @model_validator(mode="after")
    def _clipping_is_accounted(self) -> "PrivacySection":
        if self.clipping == "fixed":
            for name in _ADAPTIVE:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f'{name} belongs to clipping = "adaptive"; add that, or remove {name}'
                    )
        elif self.mode == "none":
            raise ValueError('mode = "none" clips nothing; remove clipping = "adaptive"')
        elif self.mode != "local":
            raise ValueError(
                f'mode = "{self.mode}" takes clipping = "fixed" only: one clip norm has to hold '
                "for all sites in a sum, and no site may see the others' counts; remove clipping, "
                'or choose mode = "local"'
            )
        return self


class AggregationSection(Section):
    """`[aggregation]`: who sees what of a round.

    With `secure` the coordinator sees only sums. Before a site's update goes into the sum, each
    of its coordinates is cut to `max_update`, and a weight to `max_weight` patients: that fixes
    the scale of the integers that are summed. `adversary` is whom the protocol withstands.

    With `clip_norm` a site scales its update down to that L2 norm before it leaves; where there
    is local noise it is part of the update. In the rounds `audit_rounds` the coordinator sees one
    sum for each of several random groups of `min_sites` sites or more, and leaves out those that
    are longer than updates of that norm can make them.
    """

    secure: bool = True
    min_sites: int = Field(default=3, ge=1)
    adversary: Literal["malicious", "honest-but-curious"] = "malicious"
    max_update: float = Field(default=8.0, gt=0)
    max_weight: int = Field(default=10_000, ge=1)
    clip_norm: float | None = Field(default=None, gt=0)
    audit_rounds: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)


class MonitorSection(Section):
    """`[monitor]`: release reference histograms of inputs and predictions, to watch for drift.

    They are of the training patients. `epsilon` is what they cost by themselves; the noise of
    training is solved so that both together keep `[privacy] epsilon`. `bins` is how many a number
    has: public, so few where a consortium is small, for noise comes on each.
    """

    epsilon: float | None = Field(default=None, gt=0)
    bins: int = Field(default=5, ge=2, le=50)


class EvaluationSection(Section):
    """`[evaluation]`: what is reported of the held-out patients beside the overall figures.

    `subgroups` names fields: `{ sex = [], age = [50, 65] }`, a number with the values at which it
    is cut. All come out of the one noised release of metrics, so each more makes it noisier.
    """

    subgroups: dict[str, Annotated[tuple[float, ...], Field(strict=False)]] = Field(
        default_factory=dict
    )


class CardSection(Section):
    """`[publish.card]`: what the model card says and no run can know. Empty is shown as such."""

    developer: str = ""
    contact: str = ""
    stage: str = "research"
    regulatory: str = ""
    population: str = ""
    risk_level: str = ""
    bias: str = ""
    maintenance: str = ""
    funding: str = ""
    consent: str = ""
    references: str = ""


class PublishSection(Section):
    """`[publish]`: where releases go, and who signs them.

    Both are paths relative to the study's file; `key` is an ECDSA P-256 private key in PEM. A
    simulation without one makes its own. `mirror`, as in oci://registry.example/hospitals, is an
    OCI registry that each publication is copied to. `card` is what the model card cannot know.
    """

    registry: str = "releases"
    key: str | None = None
    mirror: str | None = None
    card: CardSection = Field(default_factory=CardSection)


class Study(Section):
    """A whole study file."""

    study: StudySection
    model: ModelSection
    training: TrainingSection
    strategy: StrategySection = Field(default_factory=StrategySection)
    privacy: PrivacySection
    aggregation: AggregationSection = Field(default_factory=AggregationSection)
    monitor: MonitorSection | None = None
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    publish: PublishSection = Field(default_factory=PublishSection)
    simulation: SimulationSection = Field(default_factory=SimulationSection)

    @field_validator("aggregation")
    @classmethod
    def _secure_needs_three(cls, aggregation: AggregationSection) -> AggregationSection:
        if aggregation.secure and aggregation.min_sites < 3:  # noqa: PLR2004
            raise ValueError(
                "secure = true needs min_sites of 3 or more: of a sum of two, each knows the other"
            )
        return aggregation

    @field_validator("aggregation")
    @classmethod
    def _clips_and_audits_fit(
        cls, aggregation: AggregationSection, info: ValidationInfo
    ) -> AggregationSection:
        privacy, study = info.data.get("privacy"), info.data.get("study")
        mode = "none" if privacy is None else privacy.mode
        if aggregation.clip_norm is not None and mode not in {"none", "local"}:
            raise ValueError(
                f'[aggregation] clip_norm bounds updates, and [privacy] mode = "{mode}" sends '
                "none; remove clip_norm: [privacy] clip_norm bounds each patient"
            )
        if not aggregation.audit_rounds:
            return aggregation
        if aggregation.clip_norm is None:
            raise ValueError(
                "[aggregation] audit_rounds needs [aggregation] clip_norm: without a bound no sum "
                "is too long"
            )
        if not aggregation.secure:
            raise ValueError(
                "[aggregation] audit_rounds needs [aggregation] secure = true: without it every "
                "update is seen"
            )
        if study is not None and max(aggregation.audit_rounds) > study.rounds:
            raise ValueError(
                f"[aggregation] audit_rounds goes beyond [study] rounds = {study.rounds}"
            )
        return aggregation

    @field_validator("monitor")
    @classmethod
    def _monitor_is_paid_for(
        cls, monitor: MonitorSection | None, info: ValidationInfo
    ) -> MonitorSection | None:
        privacy = info.data.get("privacy")
        if monitor is None or privacy is None:
            return monitor
        if privacy.mode == "none" and monitor.epsilon is not None:
            raise ValueError('[privacy] mode = "none" has no budget; remove [monitor] epsilon')
        if privacy.mode == "none":
            return monitor
        if privacy.unit == "site":
            raise ValueError(
                '[privacy] unit = "site" has no bound on what a hospital adds to a histogram; '
                'remove [monitor], or choose unit = "patient"'
            )
        if monitor.epsilon is None:
            raise ValueError("[monitor] needs epsilon, such as epsilon = 0.5: it is never free")
        if not monitor.epsilon < (privacy.epsilon or 0.0):
            raise ValueError(
                f"[monitor] epsilon = {monitor.epsilon:g} leaves nothing of [privacy] epsilon = "
                f"{privacy.epsilon:g} for training"
            )
        return monitor

    @field_validator("evaluation")
    @classmethod
    def _sites_report_no_metrics(
        cls, evaluation: EvaluationSection, info: ValidationInfo
    ) -> EvaluationSection:
        privacy = info.data.get("privacy")
        by_site = privacy is not None and privacy.mode != "none" and privacy.unit == "site"
        if by_site and evaluation.subgroups:
            raise ValueError(
                '[privacy] unit = "site" lets no metrics leave a hospital, for each would be of '
                "one hospital alone; remove [evaluation] subgroups, and let hospitals judge the "
                "release themselves ([policy] min_auroc)"
            )
        return evaluation

    @property
    def protects_sites(self) -> bool:
        """Whether what is protected is all that a hospital holds."""
        return self.privacy.mode != "none" and self.privacy.unit == "site"

    @field_validator("simulation")
    @classmethod
    def _scenario_fits(
        cls, simulation: SimulationSection, info: ValidationInfo
    ) -> SimulationSection:
        study, privacy = info.data.get("study"), info.data.get("privacy")
        aggregation = info.data.get("aggregation")
        crash, attack = simulation.coordinator_crash, simulation.malicious
        if study is not None and crash is not None and crash > study.rounds:
            raise ValueError(
                f"[simulation] coordinator_crash = {crash} is after the last of "
                f"[study] rounds = {study.rounds}"
            )
        if attack is None or aggregation is None or privacy is None:
            return simulation
        if aggregation.secure and attack.sees_updates:
            raise ValueError(
                f'[simulation] malicious attack = "{attack.attack}" is made of the updates of '
                "others, which [aggregation] secure = true hides; choose label-flip, sign-flip or "
                "backdoor"
            )
        if privacy.mode == "distributed" and attack.changes_update:
            raise ValueError(
                f'[simulation] malicious attack = "{attack.attack}" changes updates, and '
                '[privacy] mode = "distributed" sends none; choose label-flip, or backdoor with '
                "scale = 1.0"
            )
        return simulation

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what a site agrees to, 64 hexadecimal digits."""
        return digest_json(self.agreed())

    def agreed(self) -> dict[str, Any]:
        """The part of the study that the hash covers, as JSON values."""
        agreed = self.model_dump(mode="json", exclude={"simulation", "publish"})
        if self.monitor is None:
            del agreed["monitor"]  # as studies were hashed before there was one
        # As studies were hashed before they could say these.
        for name, before in _TRAINING_BEFORE.items():
            if agreed["training"][name] == before:
                del agreed["training"][name]
        if self.privacy.clipping == "fixed":
            for name in ("clipping", *_ADAPTIVE):
                del agreed["privacy"][name]
        if not self.evaluation.subgroups:
            del agreed["evaluation"]
        return agreed


def load_study(path: Path) -> Study:
    """Read a study file. Raises `ConfigError`, with file, line, key and what is allowed."""
    return read_toml(path, Study)


def parse_study(text: str, *, file: str = "study") -> Study:
    """Read a study's text. Raises `ConfigError`."""
    return parse_toml(text, Study, file=file)
