"""What a hospital can see of its own site: data, ledger, budget.

Looking at a ledger imports neither torch nor Flower: a second, not fifteen.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedward.core.errors import LedgerCorrupt
from fedward.core.identity import Identity
from fedward.core.site import Site, load_site
from fedward.privacy.accounting import Unit
from fedward.privacy.accounting.events import Leaves, event_of, leaves
from fedward.privacy.ledger import Entry, Ledger, Population
from fedward.privacy.ledger.simulated import take_out
from fedward.privacy.ledger.state import borne
from fedward.privacy.units import (
    guarantees_to_json,
    patient_guarantees,
    patient_of_a_site,
    worst_guarantees,
)

_POPULATIONS: tuple[Population, ...] = ("training", "held-out")
_POINTS = 8  # of the picture: each is priced, which takes some 25 ms


def check_site(file: Path) -> dict[str, Any]:
    """Read the site's data once for each task that its policy permits.

    Raises:
        ConfigError, DataError: What is wrong, where, and what to do.
    """
    from fedward.client.local_site import LocalSite
    from fedward.client.sources import read_source
    from fedward.tasks.registry import get_task

    site = LocalSite(file)
    read = {}
    for name in site.site.policy.tasks:
        table = read_source(site.site, file, get_task(name))
        read[name] = {"patients": len(set(table.patient_ids)), "rows": len(table.patient_ids)}
    return {
        "site": site.name,
        "tasks": read,
        "public_size": site.site.data.public_size,
        "max_epsilon": site.site.policy.max_epsilon,
        "device": str(site.device),
        "key": site.identity.public.fingerprint,
    }


def ledger_summary(file: Path) -> dict[str, Any]:
    """What the site's patients have spent, in total and by study, and how it grew.

    The history is that of the patients who have spent most.

    Raises:
        LedgerCorrupt: There is no ledger, or its entries do not follow from one another.
    """
    site, ledger = _open(file)
    with ledger:
        delta = site.policy.delta
        populations = {
            population: ledger.spent(delta, population=population) for population in _POPULATIONS
        }
        worst = max(_POPULATIONS, key=lambda name: populations[name].epsilon)
        entries = ledger.entries()
        shown = {
            name: spent.to_json() | _patients(entries, delta, unit=spent.unit, population=name)
            for name, spent in populations.items()
        }
        # A patient is in one population; with several records another one may be the worse.
        patients = worst_guarantees(
            total["patients"] for total in shown.values() if "patients" in total
        )
        return {
            "site": ledger.site,
            "simulated": ledger.simulated,
            "limit": site.policy.max_epsilon,
            "spent": shown[worst] | ({"patients": patients} if patients else {}),
            "populations": shown,
            "studies": _by_study(ledger, entries, delta),
            "history": [
                {"time": point.time.isoformat(), "study": point.study, "epsilon": point.epsilon}
                for point in ledger.history(delta, population=worst, points=_POINTS)
            ],
            "head": ledger.head,
        }


def _patients(
    entries: Sequence[Entry], delta: float, *, unit: Unit, population: Population, study: str = ""
) -> dict[str, Any]:
    """What a total per record means for patients with several, under the key `patients`."""
    if unit != "record":
        return {}
    by_unit: dict[bool, Leaves] = {True: Counter(), False: Counter()}
    for entry in entries:
        if entry.kind != "reserve" or (study and entry.study != study):
            continue
        if entry.population in {population, "all"}:
            by_unit[entry.unit == "record"].update(
                borne(leaves(entry.event), entry.unit or "patient")
            )
    found = patient_guarantees(
        event_of(by_unit[True]), delta=delta, beside=event_of(by_unit[False])
    )
    return {"patients": guarantees_to_json(found)}


def _by_study(ledger: Ledger, entries: Sequence[Entry], delta: float) -> list[dict[str, Any]]:
    studies: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if entry.kind == "allot":
            begun: dict[str, Any] = {"study": entry.study, "population": entry.population}
            begun |= {"rounds": 0, "unsettled": 0, "first": entry.time.isoformat()}
            studies.setdefault(entry.study, begun)
        if entry.study not in studies:
            continue
        row = studies[entry.study]
        row["last"] = entry.time.isoformat()
        if entry.kind == "allot":
            row["state"] = entry.state
        if entry.kind == "reserve":
            row["rounds"] += 1
            row["unsettled"] += entry.state == "reserved"
    for study, row in studies.items():
        spent, population = ledger.spent_by(study, delta), row["population"]
        row.update({"epsilon": spent.to_json()["epsilon"], "unit": spent.unit, "note": spent.note})
        row.update(_patients(entries, delta, unit=spent.unit, population=population, study=study))
        if spent.unit == "site":
            total: Leaves = Counter()
            for entry in entries:
                if entry.kind == "reserve" and entry.study == study:
                    total.update(leaves(entry.event))
            row["patient"] = patient_of_a_site(event_of(total), delta=delta).to_json()
    return list(studies.values())


def verify_ledger(file: Path, *, head: str | None = None) -> dict[str, Any]:
    """Check the whole ledger: chain, signatures, rules, and every epsilon anew.

    A ledger that does not contain a head that was seen before was rolled back to an older copy,
    or replaced. The heads in the releases of the site's own store have been seen.

    Args:
        file: The site file.
        head: Another one, such as the coordinator's.

    Raises:
        LedgerCorrupt: Something was changed; says where.
        ValueError: `head` does not look like `12:9f...`.
    """
    site, ledger = _open(file)
    with ledger:
        ledger.verify(against_head=head)
        released = _released_heads(file.parent / site.serving.store, site.name)
        for seen, folder in released.items():
            try:
                ledger.verify(against_head=seen)
            except (LedgerCorrupt, ValueError) as error:
                raise LedgerCorrupt(f"the release in {folder} has seen another: {error}") from error
        return {
            "site": ledger.site,
            "verified": True,
            "entries": len(ledger.entries()),
            "head": ledger.head,
            "against_head": head,
            "against_releases": len(released),
        }


def _released_heads(store: Path, site: str) -> dict[str, Path]:
    """The site's head in each release that its store holds, and where it stands."""
    found: dict[str, Path] = {}
    for path in sorted(store.rglob("privacy.json")):
        try:
            head = json.loads(path.read_bytes())["sites"][site]["ledger_head"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of other sites, or damaged, which the store itself refuses
        found[str(head)] = path.parent
    return found


def export_ledger(file: Path) -> dict[str, Any]:
    """Everything in the ledger, as a JSON value that `verify_export` checks away from the site.

    Raises:
        LedgerCorrupt: There is no ledger, or its entries do not follow from one another.
    """
    _, ledger = _open(file)
    with ledger:
        return ledger.export()


def _open(file: Path) -> tuple[Site, Ledger]:
    """The site and its ledger, to be looked at and not written."""
    site = load_site(file)
    state = file.parent / site.site.state
    if site.site.simulated and site.site.ledgers is not None:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        take_out(file.parent / site.site.ledgers, site.name, state=state)
    path = state / "ledger.sqlite"
    if not path.exists():
        raise LedgerCorrupt(f"{path} does not exist; the site has not trained yet")
    ledger = Ledger.read(path, public=Identity.load(state / "identity.pem").public)
    if ledger.site != site.name:
        ledger.shut()
        raise LedgerCorrupt(
            f"{path} is the ledger of {ledger.site}, not of {site.name}: the file was replaced"
        )
    return site, ledger
