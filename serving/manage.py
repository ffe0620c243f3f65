"""What an operator decides: going back, taking a release or not, erasing a patient's values."""

import asyncio
from typing import Any

from fedward.core.errors import FedwardError
from fedward.serving.problems import Problem
from fedward.serving.roles import ANYONE, Caller
from fedward.serving.service import Service


async def roll_back(service: Service, model: str, *, caller: Caller) -> dict[str, Any]:
    """Go back to the version before; the watcher swaps it in. Raises `Problem` 403 or 409."""
    if caller is ANYONE or service.store is None:
        raise Problem(403, "roll-back needs API keys: make one with the role operator")
    try:
        served = await asyncio.to_thread(service.store.roll_back, model)
    except FedwardError as error:
        raise Problem(409, str(error)) from error
    if service.audit is not None:
        service.audit.append("roll-back", model=model, version=served.version, caller=caller.name)
        await asyncio.to_thread(service.audit.flush)
    return {"model": model, "version": served.version}


async def decide(
    service: Service, model: str, version: object, *, caller: Caller, approve: bool
) -> dict[str, Any]:
    """Approve or decline what waits, in the caller's name. Raises `Problem`."""
    if caller is ANYONE or service.store is None:
        raise Problem(403, "approval needs API keys: make one with the role operator")
    if not isinstance(version, int) or isinstance(version, bool):
        raise Problem(422, "version must be a whole number", field="version", allowed="from 1")
    try:
        await asyncio.to_thread(
            service.store.decide, model, version, by=caller.name, approve=approve
        )
    except FedwardError as error:
        raise Problem(409, str(error)) from error
    action = "approved" if approve else "declined"
    if service.audit is not None:
        service.audit.append(action, model=model, version=version, caller=caller.name)
        await asyncio.to_thread(service.audit.flush)
    return {"model": model, "version": version, action: True}


async def erase(service: Service, patient: str, *, caller: Caller) -> dict[str, Any]:
    """Destroy the key of a patient's values in the audit log. Raises `Problem` 403 or 404."""
    if caller is ANYONE:
        raise Problem(403, "erasure needs API keys: make one with the role operator")
    if service.vault is None:
        raise Problem(404, "this adapter keeps no patient's values")
    if service.audit is not None:
        await asyncio.to_thread(service.audit.flush)  # what waits is of today's key
    erased = await asyncio.to_thread(service.vault.erase, patient)
    if service.audit is not None:
        service.audit.append("erased", caller=caller.name, found=str(erased).lower())
        await asyncio.to_thread(service.audit.flush)
    return {"erased": erased}
