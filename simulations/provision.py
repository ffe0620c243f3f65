"""Sites for a run on one machine: a site file and a state folder each, below the run's folder."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedward.client.local_site import LocalSite
from fedward.core.canonical import digest
from fedward.core.errors import ConfigError, some_of
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.core.roster import write_roster
from fedward.core.run import RunDirectory
from fedward.core.site import Site, load_site
from fedward.core.study import Study
from fedward.simulations.partitions import (
    Partition,
    data_card,
    draw_card,
    make_partition,
    read_rows,
    write_rows,
)
from fedward.tasks import datasets
from fedward.tasks.registry import get_task
from fedward.tasks.task import Table

PUBLISHER = Path("keys") / "publisher.pem"
LEDGERS = "ledgers.sqlite"
_COMMENT = "# A simulated site: it draws from the study's seed, and nothing of it is private.\n"
_LISTING, _ROSTER, _ROWS = "sites.txt", "roster.toml", "partition.safetensors"


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What a run on one machine starts from.

    Attributes:
        sites: The site files, in the order of node numbers.
        listing: A file with one of them a line.
        publisher: The publisher's private key.
        registry: Folder of releases.
        roster: Every site's public identity.
        known: What site files hold, of those that were made just now.
    """

    sites: tuple[Path, ...]
    listing: Path
    publisher: Path
    registry: Path
    roster: Path
    known: Mapping[Path, Site] = field(default_factory=dict)

    def load(self) -> dict[Path, Site]:
        """Every site file's content, in the order of node numbers."""
        return {file: self.known.get(file) or load_site(file) for file in self.sites}


def provision(
    run: RunDirectory, study: Study, *, study_file: Path, durable: bool = False
) -> Provisioned:
    """Make the sites that the study's `[simulation]` asks for, or find what an earlier try made.

    Args:
        run: The run's folder.
        study: The study.
        study_file: Its file; paths are relative to it.
        durable: Every site has a ledger file of its own.

    Raises:
        ConfigError: The study names no sites that can be had.
    """
    folder = run.path.resolve()
    publisher = folder / PUBLISHER
    if not publisher.exists():
        Identity.generate_publisher().save(publisher)
    listing = folder / _LISTING
    known: dict[Path, Site] = {}
    if not listing.exists():
        if study.simulation.sites is not None:
            files = _given_sites(study, study_file)
        else:
            # A session of secure aggregation lies in the site's folder, beside its identity.
            durable = durable or study.simulation.durable or study.aggregation.secure
            known = _embedded_sites(study, folder, durable=durable)
            files = list(known)
        write_atomic(listing, "".join(f"{file}\n" for file in files))
    roster = folder / _ROSTER
    files = list(known) or [Path(x) for x in listing.read_text(encoding="utf-8").splitlines()]
    if study.aggregation.secure and not roster.exists():
        sites = [LocalSite(file) for file in files]
        write_roster(roster, {site.name: site.identity.public for site in sites})
    return Provisioned(
        sites=tuple(files),
        listing=listing,
        publisher=publisher,
        registry=folder / "registry",
        roster=roster,
        known=known,
    )


def data_fingerprints(sites: Mapping[Path, Site]) -> dict[str, str]:
    """SHA-256 of each simulated site's table, by site.

    Of a site of a partition: of the pooled table's fingerprint and its rows.
    """
    prints = {}
    pools: dict[str, bytes] = {}
    rows: dict[Path, Mapping[str, Any]] = {}
    for file, site in sites.items():
        data, dataset = site.data, str(site.data.dataset)
        if data.source != "embedded":
            prints[site.name] = digest((file.parent / str(data.path)).read_bytes())
        elif data.path is None:
            table = datasets.load(dataset, partition=str(data.partition))
            prints[site.name] = digest(_bytes_of(table))
        else:
            if dataset not in pools:
                pools[dataset] = digest(_bytes_of(datasets.pooled(dataset))).encode()
            listing = file.parent / data.path
            if listing not in rows:
                rows[listing] = read_rows(listing)
            prints[site.name] = digest(
                pools[dataset] + rows[listing][str(data.partition)].tobytes()
            )
    return prints


def _bytes_of(table: Table) -> bytes:
    columns = b"".join(
        name.encode() + table.columns[name].tobytes() for name in sorted(table.columns)
    )
    return "\n".join(table.patient_ids).encode() + columns


def _given_sites(study: Study, study_file: Path) -> list[Path]:
    pattern = str(study.simulation.sites)
    try:
        found = sorted(study_file.resolve().parent.glob(pattern))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f'= "{pattern}" is no pattern of files: {error}', file="study", key="[simulation] sites"
        ) from error
    if not found:
        raise ConfigError(
            f'= "{pattern}" matches no file beside the study',
            file="study",
            key="[simulation] sites",
        )
    names: dict[str, Path] = {}
    for file in found:
        name = load_site(file).name
        if name in names:
            raise ConfigError(
                f'= "{name}" is {names[name]}, too', file=str(file), key="[site] name"
            )
        names[name] = file
    return [names[name] for name in _present(study, names)]


def _present(study: Study, names: Collection[str]) -> list[str]:
    """The names of sites that are not left out."""
    out = study.simulation.leave_out
    unknown = sorted(set(out) - set(names))
    problem = f"names no site {', '.join(unknown)}; sites: {some_of(names)}" if unknown else ""
    if set(names) == set(out):
        problem = "leaves out every site"
    if problem:
        raise ConfigError(problem, file="study", key="[simulation] leave_out")
    return [name for name in names if name not in out]


def spread(study: Study) -> tuple[Partition, Table]:
    """Spread embedded data over sites, as the study asks.

    Returns:
        The partition, without the sites that are left out, and the pooled table that it is of.

    Raises:
        ConfigError: There is no such data set or partitioner, or its arguments do not fit.
    """
    task, simulation = get_task(study.study.task), study.simulation
    table = datasets.pooled(simulation.dataset or task.name)
    partition = make_partition(
        table,
        label=task.schema.label.name,
        kind=simulation.partition,
        args=simulation.args,
        seed=study.study.seed,
    )
    rows = {name: partition.rows[name] for name in _present(study, partition.rows)}
    return replace(partition, rows=rows), table


def site_names(study: Study, *, study_file: Path) -> list[str]:
    """The names of the sites that `provision` would make or find. Raises as it does."""
    if study.simulation.sites is not None:
        return [load_site(file).name for file in _given_sites(study, study_file)]
    return list(spread(study)[0].rows)


def _embedded_sites(study: Study, folder: Path, *, durable: bool) -> dict[Path, Site]:
    task = get_task(study.study.task)
    dataset = study.simulation.dataset or task.name
    partition, table = spread(study)
    card = data_card(partition, table, label=task.schema.label.name)
    write_atomic(folder / "partition.json", json.dumps(card, indent=1) + "\n")
    write_atomic(folder / "partition.svg", draw_card(card))
    if study.simulation.partition == "natural":
        published, path = datasets.partitions(dataset), None
        sizes = {name: published[name] for name in partition.rows}
    else:
        write_rows(partition, folder / _ROWS)
        sizes, path = {name: len(rows) for name, rows in partition.rows.items()}, f"../{_ROWS}"
    (folder / "sites").mkdir(parents=True, exist_ok=True)
    made, first = dict[Path, Site](), None
    for name, public_size in sizes.items():
        values = _site_values(name, public_size, dataset, study, path=path, durable=durable)
        file = folder / "sites" / f"{name}.toml"
        # Not flushed: a power cut costs no more than a simulation begun anew.
        file.write_text(_COMMENT + _toml(values), encoding="utf-8")
        site = Site.model_validate(values)
        first = first or site
        made[file] = _sharing(site, first)
    return made


def _sharing(site: Site, other: Site) -> Site:
    """The same; what both have in common, which is most of it, is in memory once.

    That is the policy, and the sets of names that say which settings were given.
    """
    if site.policy != other.policy:
        return site
    given = {name: getattr(site, name) for name in ("site", "data", "serving")}
    slim = {
        name: section.model_construct(getattr(other, name).model_fields_set, **vars(section))
        for name, section in given.items()
    }
    if {name: s.model_fields_set for name, s in given.items()} != {
        name: s.model_fields_set for name, s in slim.items()
    }:
        return site
    return Site.model_construct(other.model_fields_set, policy=other.policy, **slim)


def _site_values(
    name: str, public_size: int, dataset: str, study: Study, *, path: str | None, durable: bool
) -> dict[str, dict[str, Any]]:
    site: dict[str, Any] = {"name": name, "state": f"../state/{name}", "simulated": True}
    if not durable:
        site["ledgers"] = f"../{LEDGERS}"
    if study.simulation.device != "cpu":
        site["device"] = study.simulation.device
    epsilon = study.privacy.epsilon or 0.0
    data: dict[str, Any] = {"source": "embedded", "dataset": dataset, "partition": name}
    if path is not None:
        data["path"] = path
    return {
        "site": site,
        "data": {**data, "public_size": public_size, "held_out": study.simulation.held_out},
        "policy": {
            "tasks": (study.study.task,),
            # Of a patient, who bears more where it is the site that the study's epsilon is for.
            "max_epsilon": max(8.0, (4 if study.protects_sites else 2) * epsilon),
            "delta": study.privacy.delta,
            "min_sites": 1,
            "require_secure_aggregation": False,
            "allow_no_privacy": True,
            "allow_record_unit": study.privacy.unit == "record",
            "roster": f"../{_ROSTER}",
        },
        "serving": {
            "store": f"../stores/{name}",
            "publisher": f"../{PUBLISHER.as_posix()}.pub",
        },
    }


def _toml(values: Mapping[str, Mapping[str, Any]]) -> str:
    """Tables of strings, numbers, booleans and lists of strings, whose JSON form is TOML."""
    return "\n".join(
        f"[{table}]\n" + "".join(f"{key} = {_value(v)}\n" for key, v in entries.items())
        for table, entries in values.items()
    )


def _value(value: Any) -> str:
    return str(value) if isinstance(value, float) else json.dumps(value)
