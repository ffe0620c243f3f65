"""Sites for a run on one machine: a site file and a state folder each, below the run's folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from fedward.client.local_site import LocalSite
from fedward.core.canonical import digest
from fedward.core.errors import ConfigError
from fedward.core.files import write_atomic
from fedward.core.identity import Identity
from fedward.core.roster import write_roster
from fedward.core.run import RunDirectory
from fedward.core.site import load_site
from fedward.core.study import Study
from fedward.tasks import datasets
from fedward.tasks.registry import get_task

PUBLISHER = Path("keys") / "publisher.pem"
_LISTING, _ROSTER = "sites.txt", "roster.toml"


@dataclass(frozen=True, slots=True)
class Provisioned:
    """What a run on one machine starts from.

    Attributes:
        sites: The site files, in the order of node numbers.
        listing: A file with one of them a line.
        publisher: The publisher's private key.
        registry: Folder of releases.
        roster: Every site's public identity.
    """

    sites: tuple[Path, ...]
    listing: Path
    publisher: Path
    registry: Path
    roster: Path


def provision(run: RunDirectory, study: Study, *, study_file: Path) -> Provisioned:
    """Make the sites that the study's `[simulation]` asks for, or find what an earlier try made.

    Raises:
        ConfigError: The study names no sites that can be had.
    """
    folder = run.path.resolve()
    publisher = folder / PUBLISHER
    if not publisher.exists():
        Identity.generate_publisher().save(publisher)
    listing = folder / _LISTING
    if not listing.exists():
        files = (
            _given_sites(study, study_file)
            if study.simulation.sites is not None
            else _embedded_sites(study, folder / "sites")
        )
        write_atomic(listing, "".join(f"{file}\n" for file in files))
    roster = folder / _ROSTER
    files = [Path(line) for line in listing.read_text(encoding="utf-8").splitlines()]
    if study.aggregation.secure and not roster.exists():
        sites = [LocalSite(file) for file in files]
        write_roster(roster, {site.name: site.identity.public for site in sites})
    return Provisioned(
        sites=tuple(files),
        listing=listing,
        publisher=publisher,
        registry=folder / "registry",
        roster=roster,
    )


def data_fingerprints(sites: tuple[Path, ...]) -> dict[str, str]:
    """SHA-256 of each simulated site's table, by site."""
    prints = {}
    for file in sites:
        site = load_site(file)
        if site.data.source == "embedded":
            table = datasets.load(str(site.data.dataset), partition=str(site.data.partition))
            columns = b"".join(
                name.encode() + table.columns[name].tobytes() for name in sorted(table.columns)
            )
            prints[site.name] = digest("\n".join(table.patient_ids).encode() + columns)
        else:
            prints[site.name] = digest((file.parent / str(site.data.path)).read_bytes())
    return prints


def _given_sites(study: Study, study_file: Path) -> list[Path]:
    pattern = str(study.simulation.sites)
    files = sorted(study_file.resolve().parent.glob(pattern))
    if not files:
        raise ConfigError(
            f'= "{pattern}" matches no file beside the study',
            file=str(study_file),
            key="[simulation] sites",
        )
    for file in files:
        load_site(file)
    return files


def _embedded_sites(study: Study, folder: Path) -> list[Path]:
    if study.simulation.partition != "natural":
        raise ConfigError(
            f'= "{study.simulation.partition}" is not known; allowed: natural',
            file="study",
            key="[simulation] partition",
        )
    task = get_task(study.study.task)
    files = []
    for name, public_size in datasets.partitions(task.name).items():
        if name in study.simulation.leave_out:
            continue
        file = folder / f"{name}.toml"
        write_atomic(file, _site_file(name, public_size, task.name, study))
        files.append(file)
    return files


def _site_file(name: str, public_size: int, task: str, study: Study) -> str:
    most = max(8.0, 2 * (study.privacy.epsilon or 0.0))
    return f"""\
# Made for a simulation: this site draws from the study's seed, and nothing of it is private.
[site]
name = {json.dumps(name)}
state = {json.dumps(f"../state/{name}")}
simulated = true

[data]
source = "embedded"
dataset = {json.dumps(task)}
partition = {json.dumps(name)}
public_size = {public_size}

[policy]
tasks = [{json.dumps(study.study.task)}]
max_epsilon = {most}
delta = {study.privacy.delta}
min_sites = 1
require_secure_aggregation = false
allow_no_privacy = true
roster = {json.dumps(f"../{_ROSTER}")}

[serving]
store = {json.dumps(f"../stores/{name}")}
publisher = {json.dumps(f"../{PUBLISHER.as_posix()}.pub")}
"""
