"""Which engine trains a simulation's sites, and why."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fedward.core.errors import ConfigError
from fedward.core.study import Study
from fedward.simulations.stacked import fits
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model

Engine = Literal["per-site", "vectorised"]

# Measured against site by site: below this many sites there is nothing to batch; above this many
# parameters a site alone fills the processor. See benchmarks/simulation.py.
_FEWEST_SITES = 8
_MOST_PARAMETERS = 250_000
_SLOW = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine and the reason, for the log."""

    engine: Engine
    why: str


def choose_engine(study: Study, model: nn.Module, *, sites: int) -> Choice:
    """What the study asks for or, with "auto", what is faster for this model.

    Raises:
        ConfigError: The study asks for "vectorised" and the model cannot be stacked.
    """
    asked = study.simulation.engine
    if asked == "per-site":
        return Choice("per-site", "the study asks for it")
    unfit = _unfit(study, model)
    if unfit is not None and asked == "vectorised":
        raise ConfigError(
            f'= "vectorised" does not do: {unfit}; use engine = "auto" or "per-site"',
            file="study",
            key="[simulation] engine",
        )
    if unfit is not None:
        return Choice("per-site", unfit)
    if asked == "vectorised":
        return Choice("vectorised", "the study asks for it")
    against = _against(model, sites=sites, device=study.simulation.device)
    if against is not None:
        return Choice("per-site", against)
    return Choice("vectorised", f"{sites} sites as one batch are faster")


def refuse_engine(study: Study, *, runtime: str) -> None:
    """Check, before anything begins, that an engine that is asked for can be had.

    Raises:
        ConfigError: The study asks for "vectorised", and sites cannot be trained as one batch.
    """
    if study.simulation.engine != "vectorised":
        return
    if runtime != "in-process":
        raise ConfigError(
            f'= "vectorised" is one computation in this process, and runtime {runtime} trains site '
            'by site; use engine = "auto"',
            file="study",
            key="[simulation] engine",
        )
    choose_engine(study, study_model(study, get_task(study.study.task)), sites=1)


def _unfit(study: Study, model: nn.Module) -> str | None:
    """Why sites cannot be trained as one batch; None if they can."""
    if study.privacy.mode == "distributed":
        return "each site puts its share of the noise into a sum of its own"
    if study.training.schedule != "constant" or study.training.averaging != "last":
        return "[training] schedule and averaging are kept site by site"
    if study.privacy.clipping != "fixed":
        return '[privacy] clipping = "adaptive" is kept site by site'
    if not fits(model):
        return "the model has layers that book-keeping does not know"
    return None


def _against(model: nn.Module, *, sites: int, device: str) -> str | None:
    """Why site by site is faster; None if it is not."""
    if sites < _FEWEST_SITES:
        return f"{sites} sites are too few to batch"
    slow = sorted({type(m).__name__ for m in model.modules() if isinstance(m, _SLOW)})
    if slow:
        return f"{', '.join(slow)} is faster site by site"
    size = sum(p.numel() for p in model.parameters())
    if size > _MOST_PARAMETERS and torch.device(device).type != "cuda":
        return f"sites of {size} parameters are faster one by one"
    return None
