"""`[simulation]` of a study: what a simulation plays, and no site agrees to."""

from typing import Annotated, Literal

from pydantic import Field

from fedward.core.toml import Section

Scalar = str | int | float | bool
Args = dict[str, Scalar]


class Dropout(Section):
    """Sites that do not answer in a round.

    `independent`: each round each site is away with probability `rate`. `bursty`: away for spells
    of `mean_length` rounds on average, `rate` of the rounds in all (Gilbert 1960's two states).
    """

    kind: Literal["independent", "bursty"] = "independent"
    rate: float = Field(gt=0, lt=1)
    mean_length: float = Field(default=4.0, ge=1)


class Stragglers(Section):
    """Time that sites take to answer, in virtual seconds: nobody waits for them.

    A site's time has median `median`; its logarithm, or for `pareto` its tail, has `spread`. Who
    takes longer than `deadline` is too late.
    """

    distribution: Literal["lognormal", "pareto", "exponential"] = "lognormal"
    median: float = Field(default=30.0, gt=0)
    spread: float = Field(default=1.0, gt=0)
    deadline: float = Field(default=120.0, gt=0)


class Malicious(Section):
    """Sites that attack the model; `sites` is how many, or their names.

    `scale` multiplies what sign-flip and backdoor send, and is the epsilon of ipm. A backdoor
    marks `share` of the site's rows by setting feature `feature` to `value`.
    """

    attack: Literal["label-flip", "sign-flip", "alie", "ipm", "min-max", "backdoor"]
    sites: int | Annotated[tuple[str, ...], Field(strict=False)] = 1
    scale: float = Field(default=1.0, gt=0)
    share: float = Field(default=0.5, gt=0, le=1)
    feature: int = Field(default=0, ge=0)
    value: float = 3.0


class Resources(Section):
    """What Ray gives a site, and where Ray is; by default on this machine."""

    cpus: float = Field(default=1.0, gt=0)
    gpus: float = Field(default=0.0, ge=0)
    address: str | None = None
    retries: int = Field(default=2, ge=0)


class SimulationSection(Section):
    """`[simulation]`: ignored outside simulation.

    `sites` is a pattern of site files beside the study; without it the embedded data (the task's,
    or `dataset`) are spread by `partition` with `args`, and each site holds out `held_out`. Sites
    in `leave_out` take no part.
    `threads` is how many sites train at a time where they train one by one in this process.
    `durable` gives each site a ledger file of its own, flushed like a real one. `crash` is the
    probability that a site crashes in the middle of a round; `coordinator_crash` the round in
    which the coordinator does, to go on from its checkpoint.
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
