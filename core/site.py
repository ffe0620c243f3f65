"""A site: a hospital's data source, its policy and its state.

The file stays in the hospital. Paths in it are relative to it.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fedward.core.study import Name
from fedward.core.toml import Section, read_toml


class SiteSection(Section):
    """`[site]`: its name, the folder of its state (identity, ledger), and whether it is real.

    A `simulated` site draws sampling and noise from the study's seed, so that runs repeat; all
    that it sends is stamped as not private. Only the site's own file can say so. `ledgers` is
    the file in which many simulated sites' ledgers lie together.

    `device` is where it trains: "cuda", "cuda:1" and so on, "cpu", or "auto", which is the GPU
    where there is one (and the processor where the site is simulated, so that runs repeat).
    """

    name: Name
    state: str = "state"
    simulated: bool = False
    ledgers: str | None = None
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")


class Column(Section):
    """A column of a file in `[data.columns]`, where its name alone does not say enough.

    `factor` turns the file's unit into the field's: 38.67 for cholesterol from mmol/l to mg/dl.
    `values` translates local codes, such as `{ "M" = "male" }`.
    """

    column: str
    factor: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    values: dict[str, str] = Field(default_factory=dict)


class DataSection(Section):
    """`[data]`: where the patients are.

    Of an embedded data set a site is one natural `partition` or, where a `path` is given, those
    patients that the file of a simulation's partition lists under that name.

    `public_size` is the number of patients as the hospital would print it in a brochure. Sample
    rates and weights are computed from it and never from the true, private count.
    `held_out` is the share of patients kept for evaluation, chosen by a keyed hash of the
    patient's id, so that a patient stays on one side for good.
    """

    source: Literal["csv", "embedded"]
    path: str | None = None
    dataset: str | None = None
    partition: str | None = None
    patient_id: str | None = None
    public_size: int = Field(ge=1)
    held_out: float = Field(default=0.3, ge=0, lt=1)
    columns: dict[str, str | Column] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _complete(self) -> "DataSection":
        if self.source == "csv" and (self.path is None or self.patient_id is None):
            raise ValueError('source = "csv" needs `path` and `patient_id`')
        if self.source == "embedded" and (self.dataset is None or self.partition is None):
            raise ValueError('source = "embedded" needs `dataset` and `partition`')
        return self


class PolicySection(Section):
    """`[policy]`: what this hospital permits, whatever a coordinator asks.

    With `allow_record_unit` a study may protect records: then `max_epsilon` bounds what a record
    has lost, and a patient with many of them has lost more.
    `roster` is the consortium's file of sites and public identities; secure aggregation needs it.
    A release is taken only if its AUROC on this site's held-out patients is at least `min_auroc`,
    and at most `max_loss_of_auroc` below that of the release that the store serves. Either one
    lets the coordinator see one word a study, accepted or refused, that no epsilon covers.
    """

    tasks: tuple[str, ...] = Field(strict=False)
    max_epsilon: float = Field(gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    min_sites: int = Field(default=3, ge=1)
    require_secure_aggregation: bool = True
    allow_no_privacy: bool = False
    allow_record_unit: bool = False
    roster: str | None = None
    min_auroc: float | None = Field(default=None, ge=0, le=1)
    max_loss_of_auroc: float | None = Field(default=None, ge=0, le=1)

    @property
    def judges(self) -> bool:
        """Whether releases are tried on held-out patients."""
        return self.min_auroc is not None or self.max_loss_of_auroc is not None


class ServingSection(Section):
    """`[serving]`: the folder of verified releases, and whose releases this hospital takes.

    `publisher` is the publisher's public key in PEM, received out of band. Without it the site
    takes part in training and accepts no release.
    """

    store: str = "store"
    publisher: str | None = None


class Site(Section):
    """A whole site file."""

    site: SiteSection
    data: DataSection
    policy: PolicySection
    serving: ServingSection = Field(default_factory=ServingSection)

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name


def load_site(path: Path) -> Site:
    """Read a site file. Raises `ConfigError`, with file, line, key and what is allowed."""
    return read_toml(path, Site)
