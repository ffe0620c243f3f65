"""`[simulation]` of a study: the sites, the engine, and what happens to whom.

Ignored outside simulation: no part of what a site agrees to.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedward.core.toml import Section

Scalar = str | int | float | bool
Args = dict[str, Scalar]

_COLLUDING = frozenset({"alie", "ipm", "min-max"})
_SCALED = frozenset({"sign-flip", "ipm", "backdoor"})
_MARKS = frozenset({"share", "feature", "value"})
_ADDRESS = re.compile(r"(ray://)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_FROM_FILES = ("partition", "args", "dataset", "held_out")


class Dropout(Section):
    """Sites that do not answer in a round.

    `independent`: each round each site is away with probability `rate`. `bursty`: away for spells
    of `mean_length` rounds on average, `rate` of the rounds in all (Gilbert 1960's two states).
    """

    kind: Literal["independent", "bursty"] = "independent"
    rate: float = Field(gt=0, lt=1)
    mean_length: float = Field(default=4.0, ge=1)

    @model_validator(mode="after")
    def _can_be(self) -> "Dropout":
        if self.kind == "independent" and "mean_length" in self.model_fields_set:
            raise ValueError('mean_length belongs to kind = "bursty"; remove it, or name the kind')
        shortest = self.rate / (1 - self.rate)
        if self.kind == "bursty" and self.mean_length < shortest:
            # Spells that short would need a site to leave more than once a round.
            raise ValueError(
                f"rate = {self.rate:g} needs a mean_length of {shortest:.3g} rounds or more"
            )
        return self


class Stragglers(Section):
    """Time that sites take to answer, in virtual seconds: nobody waits for them.

    A site's time has median `median`; its logarithm, or for `pareto` its tail, has `spread`. Who
    takes longer than `deadline` is too late.
    """

    distribution: Literal["lognormal", "pareto", "exponential"] = "lognormal"
    median: float = Field(default=30.0, gt=0)
    spread: float = Field(default=1.0, gt=0)
    deadline: float = Field(default=120.0, gt=0)

    @model_validator(mode="after")
    def _has_a_spread(self) -> "Stragglers":
        if self.distribution == "exponential" and "spread" in self.model_fields_set:
            raise ValueError(
                "an exponential distribution's spread follows from its median; remove spread"
            )
        return self


class Malicious(Section):
    """Sites that attack the model; `sites` is how many, or their names.

    `scale` multiplies what sign-flip and backdoor send, and is the epsilon of ipm. A backdoor
    marks `share` of the site's rows by setting feature `feature` to `value`.
    """

    attack: Literal["label-flip", "sign-flip", "alie", "ipm", "min-max", "backdoor"]
    sites: (
        Annotated[int, Field(ge=1)] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    ) = 1
    scale: float = Field(default=1.0, gt=0)
    share: float = Field(default=0.5, gt=0, le=1)
    feature: int = Field(default=0, ge=0)
    value: float = 3.0

    @model_validator(mode="after")
    def _takes_them(self) -> "Malicious":
        given = self.model_fields_set
        strange = sorted(given & _MARKS) if self.attack != "backdoor" else []
        if "scale" in given and self.attack not in _SCALED:
            strange.append("scale")
        if strange:
            raise ValueError(f'attack = "{self.attack}" takes no {", ".join(strange)}; remove it')
        return self

    @property
    def sees_updates(self) -> bool:
        """Whether it is made of the round's honest updates."""
        return self.attack in _COLLUDING

    @property
    def changes_update(self) -> bool:
        """Whether an attacker sends something else than what its training gave."""
        return self.sees_updates or self.factor != 1

    @property
    def factor(self) -> float:
        """What an attacker that acts alone multiplies its update by."""
        if self.attack == "sign-flip":
            return -self.scale
        # Model replacement: Bagdasaryan et al. 2020, section 4.2.
        return self.scale if self.attack == "backdoor" else 1.0


class Resources(Section):
    """What Ray gives a site, and where Ray is; by default on this machine.

    `address` is host:port of a cluster's head, ray://host:port of its Ray Client server, or auto
    for the cluster that this machine is part of.
    """

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    address: str | None = None
    retries: int = Field(default=2, ge=0)

    @field_validator("address")
    @classmethod
    def _can_be_somewhere(cls, address: str | None) -> str | None:
        if address not in {None, "auto"} and not _ADDRESS.fullmatch(str(address)):
            raise ValueError(
                f'= "{address}" is not where a Ray cluster is: write host:port, ray://host:port or '
                "auto, or remove it to use this machine"
            )
        return address


class SimulationSection(Section):
    """`[simulation]`: ignored outside simulation.

    `sites` is a pattern of site files beside the study; without it the embedded data (the task's,
    or `dataset`) are spread by `partition` with `args`, and each site holds out `held_out`. Sites
    in `leave_out` take no part.
    `threads` is how many sites train at a time where they train one by one in this process.
    `durable` gives each site a ledger file of its own, flushed like a real one. `crash` is the
    probability that a site crashes in the middle of a round; `coordinator_crash` the round in
    which the coordinator does, to go on from its checkpoint. Every `evaluate_every` rounds the
    global model is evaluated on everybody's held-out patients, for a learning curve.
    """

    sites: str | None = None
    dataset: str | None = None
    leave_out: tuple[str, ...] = Field(default=(), strict=False)
    partition: str = "natural"
    held_out: float = Field(default=0.3, ge=0, lt=1)
    args: Args = Field(default_factory=dict)
    runtime: Literal["in-process", "ray", "loopback"] = "in-process"
    engine: Literal["auto", "per-site", "vectorised"] = "auto"
    threads: int = Field(default=1, ge=1, le=256)
    device: str = "cpu"
    durable: bool = False
    resources: Resources = Field(default_factory=Resources)
    dropout: Dropout | None = None
    stragglers: Stragglers | None = None
    malicious: Malicious | None = None
    crash: float = Field(default=0.0, ge=0, lt=1)
    coordinator_crash: int | None = Field(default=None, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> "SimulationSection":
        strange = [name for name in _FROM_FILES if name in self.model_fields_set]
        if self.sites is not None and strange:
            raise ValueError(
                f"sites names files, which say themselves what data they have; remove "
                f"{', '.join(strange)}"
            )
        return self

    @property
    def happens(self) -> bool:
        """Whether anything is to happen to anybody."""
        return bool(
            self.dropout
            or self.stragglers
            or self.malicious
            or self.crash
            or self.coordinator_crash
        )
