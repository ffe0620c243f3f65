"""What a hospital can see of its own site: data, ledger, budget."""

from pathlib import Path
from typing import Any

from fedward.client.local_site import LocalSite
from fedward.client.sources import read_source
from fedward.core.errors import LedgerCorrupt
from fedward.tasks.registry import get_task


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
        "site": site.site.name,
        "tasks": read,
        "public_size": site.site.data.public_size,
        "max_epsilon": site.site.policy.max_epsilon,
        "key": site.identity.public.fingerprint,
    }


def ledger_summary(file: Path) -> dict[str, Any]:
    """What the site's patients have spent, in total and by study."""
    site = _with_ledger(file)
    policy, ledger = site.site.policy, site.ledger
    return {
        "site": site.site.name,
        "simulated": site.site.site.simulated,
        "limit": policy.max_epsilon,
        "delta": policy.delta,
        "spent": ledger.spent(policy.delta).to_json(),
        "studies": ledger.by_study(policy.delta),
        "head": ledger.head,
    }


def verify_ledger(file: Path) -> dict[str, Any]:
    """Check the whole ledger.

    Raises:
        LedgerCorrupt: Something was changed; says where.
    """
    site = _with_ledger(file)
    site.ledger.verify()
    return {
        "site": site.site.name,
        "verified": True,
        "entries": len(list(site.ledger.entries())),
        "head": site.ledger.head,
    }


def _with_ledger(file: Path) -> LocalSite:
    site = LocalSite(file)
    if not (site.state / "ledger.sqlite").exists():
        raise LedgerCorrupt(
            f"{site.state / 'ledger.sqlite'} does not exist; the site has not trained yet"
        )
    return site
