"""What a hospital can see of its own site: data, ledger, budget."""

from pathlib import Path
from typing import Any

from fedward.client.local_site import LocalSite
from fedward.client.sources import read_source
from fedward.core.errors import LedgerCorrupt
from fedward.privacy.ledger import Ledger, Population
from fedward.tasks.registry import get_task

_POPULATIONS: tuple[Population, ...] = ("training", "held-out")


def check_site(file: Path) -> dict[str, Any]:
    """Read the site's data once for each task that its policy permits.

    Raises:
        ConfigError, DataError: What is wrong, where, and what to do.
    """
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
        "key": site.identity.public.fingerprint,
    }


def ledger_summary(file: Path) -> dict[str, Any]:
    """What the site's patients have spent, in total and by study, and how it grew."""
    site = _with_ledger(file)
    policy, ledger = site.site.policy, site.ledger
    populations = {
        population: ledger.spent(policy.delta, population=population) for population in _POPULATIONS
    }
    worst = max(populations.values(), key=lambda spent: spent.epsilon)
    return {
        "site": site.name,
        "simulated": site.simulated,
        "limit": policy.max_epsilon,
        "spent": worst.to_json(),
        "populations": {name: spent.to_json() for name, spent in populations.items()},
        "studies": _by_study(ledger, policy.delta),
        "history": [
            {"time": point.time.isoformat(), "study": point.study, "epsilon": point.epsilon}
            for point in ledger.history(policy.delta, points=20)
        ],
        "head": ledger.head,
    }


def _by_study(ledger: Ledger, delta: float) -> list[dict[str, Any]]:
    studies: dict[str, dict[str, Any]] = {}
    for entry in ledger.entries():
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
        row["epsilon"] = ledger.spent_by(study, delta).to_json()["epsilon"]
    return list(studies.values())


def verify_ledger(file: Path) -> dict[str, Any]:
    """Check the whole ledger.

    Raises:
        LedgerCorrupt: Something was changed; says where.
    """
    site = _with_ledger(file)
    site.ledger.verify()
    return {
        "site": site.name,
        "verified": True,
        "entries": len(site.ledger.entries()),
        "head": site.ledger.head,
    }


def _with_ledger(file: Path) -> LocalSite:
    site = LocalSite(file)
    if not (site.state / "ledger.sqlite").exists():
        raise LedgerCorrupt(
            f"{site.state / 'ledger.sqlite'} does not exist; the site has not trained yet"
        )
    return site
