"""The vectorised cohort: many small sites train as one batched computation.

The same sampler, the same draws in the same order from each site's own source, the same clipping
and the same optimizer as `client.training.train`, with one more axis: the site. Ragged data are
padded, and rows that pad are masked. The two paths agree up to the rounding of float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedward.client.training.clippers import Clipper, Plain
from fedward.client.training.modes import choose_mode, make_clipper
from fedward.client.training.optimizers import FlatOptimizer
from fedward.client.training.parts import Loss
from fedward.client.training.plan import Private, TrainingPlan
from fedward.client.training.prefetch import drawing_ahead
from fedward.client.training.sampler import Batch, PoissonSampler
from fedward.privacy.mechanisms.noise import NoiseSource
from fedward.privacy.mechanisms.rows import add_noise_to_rows, draw_uniform_rows
from fedward.simulations.stacked import StackedBatch, StackedSum, make_stacked_sum
from fedward.strategies.strategy import Vector
from fedward.tasks.task import Examples

_STACK_BYTES = 4 * 2**20  # of parameters and batches of a stack: what a processor's cache holds
_SMALL_REST = 4  # what part of a stack is too few for one of its own


@dataclass(frozen=True, slots=True)
class CohortSite:
    """A site in a cohort.

    Attributes:
        examples: Its training records.
        plan: What it does in a round.
    """

    examples: Examples
    plan: TrainingPlan


class Turn(NamedTuple):
    """One site's part of a round.

    Attributes:
        site: Its number in the cohort.
        noise: Makes its one source of sampling and noise; called at most once.
    """

    site: int
    noise: Callable[[], NoiseSource]


class Cohort:
    """Sites that train one model.

    Args:
        model: The model; its parameters do not matter, and are left alone.
        loss: One value an example.
        sites: At least one. Their plans differ in sample rate, steps, batch size and noise only.
        device: Where the arithmetic is done.

    Raises:
        ValueError: The plans differ in more, or the model cannot be stacked.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sites: Sequence[CohortSite],
        *,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._model, self._loss = model.to(self._device), loss
        self._plans: list[TrainingPlan] = []
        self._samplers: list[PoissonSampler] = []
        self._one_row, ends = True, [0]
        alike: dict[tuple[TrainingPlan, int], tuple[TrainingPlan, PoissonSampler]] = {}
        for site in sites:  # which may be made as they are asked for: none is kept
            units = site.examples.units
            one_row = np.array_equal(units, np.arange(len(units)))
            which = site.plan, len(units)
            known = alike.get(which) if one_row else None
            plan, sampler = known or (site.plan, _sampler(site))
            if one_row:
                alike[which] = plan, sampler
            self._plans.append(plan)
            self._samplers.append(sampler)
            self._one_row = self._one_row and one_row
            ends.append(ends[-1] + len(units))
        self._plan = _common(self._plans)
        self._parameters = list(model.parameters())
        self._size = sum(p.numel() for p in self._parameters if p.requires_grad)
        self._patients = np.array([sampler.num_units for sampler in self._samplers])
        self._rates = np.array([plan.sample_rate for plan in self._plans])
        self._expected = (self._rates * self._patients).tolist()
        self._records = max(sampler.records for sampler in self._samplers)
        self._starts = np.array(ends)
        self._padding = ends[-1]  # one row of zeros after all others
        self._features, self._labels = self._piles(sites)
        self._sum = self._make_sum()

    def _piles(self, sites: Sequence[CohortSite]) -> tuple[Tensor, Tensor]:
        """All sites' features and labels, one below the other."""
        first = sites[0].examples
        features = np.zeros_like(
            first.features, shape=(self._padding + 1, *first.features.shape[1:])
        )
        labels = np.zeros_like(first.labels, shape=(self._padding + 1, *first.labels.shape[1:]))
        for site, begin in zip(sites, self._starts.tolist(), strict=False):
            examples = site.examples
            end = begin + len(examples.labels)
            features[begin:end], labels[begin:end] = examples.features, examples.labels
        device = self._device
        return torch.from_numpy(features).to(device), torch.from_numpy(labels).to(device)

    def _make_sum(self) -> StackedSum:
        guarantee = self._plan.guarantee
        return make_stacked_sum(
            self._model,
            self._loss,
            self._features[-1:].expand(self._records, *self._features.shape[1:]),
            clip_norm=guarantee.clip_norm if isinstance(guarantee, Private) else None,
            records=self._records,
        )

    def train(self, parameters: Vector, turns: Sequence[Turn]) -> Iterator[Vector]:
        """Train from `parameters`; updates come in the order of `turns`."""
        flat = torch.from_numpy(parameters.copy()).to(self._device)
        updates: dict[int, Vector] = {}
        # Sites that are alike go together: less padding, and they end at the same step.
        order = sorted(range(len(turns)), key=lambda number: self._order_of(turns[number]))
        for stack in self._stacks(order, turns):
            done = self._train_stack(flat, [turns[number] for number in stack])
            updates.update(zip(stack, done, strict=True))
        for number in range(len(turns)):
            yield updates.pop(number)

    def _order_of(self, turn: Turn) -> tuple[int, float]:
        plan = self._plans[turn.site]
        return -plan.steps, -self._rows_of(turn)

    def _rows_of(self, turn: Turn) -> float:
        """Rows that are expected in a step."""
        rows: float = self._expected[turn.site] * self._records
        return rows

    def _stacks(self, order: Sequence[int], turns: Sequence[Turn]) -> list[list[int]]:
        """Cut `order` so that a stack fits its share of memory; a small rest goes with the last."""
        row = math.prod(self._features.shape[1:]) * 4
        stacks: list[list[int]] = []
        stack: list[int] = []
        largest = 0.0
        for number in order:
            rows = self._rows_of(turns[number])
            largest = max(largest, rows)
            # Parameters, gradients, noise; a batch and what the layers make of it.
            each = 16 * self._size + 4 * row * largest
            if stack and (len(stack) + 1) * each > _STACK_BYTES:
                stacks.append(stack)
                stack, largest = [], rows
            stack.append(number)
        if stacks and len(stack) * _SMALL_REST < len(stacks[-1]):
            stacks[-1] += stack  # few sites take nearly as long as many
        elif stack:
            stacks.append(stack)
        return stacks

    def _train_stack(self, flat: Tensor, turns: Sequence[Turn]) -> list[Vector]:
        plan, plans = self._plan, [self._plans[turn.site] for turn in turns]
        private = isinstance(plan.guarantee, Private)
        everyone = all(self._samplers[turn.site].certain for turn in turns)
        # Where everybody always takes part and nothing is added, there is nothing to draw.
        sources = (
            None
            if everyone and not private
            else [
                drawing_ahead(turn.noise(), steps=p.steps)
                for turn, p in zip(turns, plans, strict=True)
            ]
        )
        stacked = flat.expand(len(turns), -1).clone(memory_format=torch.contiguous_format)
        optimizer = FlatOptimizer(
            stacked,
            optimizer=plan.optimizer,
            momentum=plan.momentum,
            weight_decay=plan.weight_decay,
        )
        divisors = torch.tensor([p.expected_batch_size for p in plans]).to(self._device)
        active = len(turns)
        for step in range(plans[0].steps):
            while plans[active - 1].steps <= step:
                active -= 1
            optimizer.keep(active)
            total = self._sums(stacked[:active], turns[:active], sources)
            if private and sources is not None:
                total = self._noised(total, plans[:active], sources)
            total /= divisors[:active, None]
            if plan.proximal and step:
                total.add_(stacked[:active] - flat, alpha=plan.proximal)
            optimizer.step(total, learning_rate=plan.learning_rate_at(step))
        updates = (stacked - flat).float().cpu().numpy()
        return list(updates)

    def _sums(
        self,
        stacked: Tensor,
        turns: Sequence[Turn],
        sources: Sequence[NoiseSource] | None,
    ) -> Tensor:
        rows, mask = self._choose(turns, sources)
        if not rows.size:
            return torch.zeros_like(stacked)
        index = torch.from_numpy(rows).to(self._device)
        batch = StackedBatch(
            _taken(self._features, index),
            _taken(self._labels, index),
            torch.from_numpy(mask).to(self._device),
            self._records,
        )
        with torch.no_grad():
            total, finite = self._sum(stacked, batch)
            if not bool(finite.all()):
                for number in torch.nonzero(~finite).flatten().tolist():
                    total[number] = self._alone(stacked[number], batch, number)
        return total

    def _choose(
        self, turns: Sequence[Turn], sources: Sequence[NoiseSource] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Rows of the pile, shape `(sites, rows)`, and which of them count."""
        if sources is not None and self._one_row:
            return self._choose_patients(turns, sources)
        chosen: list[tuple[NDArray[np.int64], NDArray[np.bool_] | None]]
        if sources is None:
            chosen = [(self._samplers[turn.site].everyone(), None) for turn in turns]
        else:
            chosen = [
                self._samplers[turn.site].choose(source)
                for turn, source in zip(turns, sources, strict=False)
            ]
        widest = max(
            len(rows) // self._samplers[turn.site].records
            for turn, (rows, _) in zip(turns, chosen, strict=True)
        )
        shape = (len(turns), widest, self._records)
        index = np.full(shape, self._padding, np.int64)
        mask = np.zeros(shape, np.float32)
        for number, (turn, (rows, present)) in enumerate(zip(turns, chosen, strict=True)):
            records = self._samplers[turn.site].records
            patients = len(rows) // records
            begin = self._starts[turn.site]
            index[number, :patients, :records] = (rows + begin).reshape(patients, records)
            counted = np.ones(1, np.bool_) if present is None else present
            mask[number, :patients, :records] = counted.reshape(-1, records)
        return index.reshape(len(turns), -1), mask.reshape(len(turns), -1)

    def _choose_patients(
        self, turns: Sequence[Turn], sources: Sequence[NoiseSource]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """As `_choose` where each patient is one row: in a few operations for all sites."""
        places = [turn.site for turn in turns]
        patients = self._patients[places]
        noised = isinstance(self._plan.guarantee, Private)
        drawn = draw_uniform_rows(sources[: len(turns)], patients, with_noise=noised)
        chosen = drawn < self._rates[places, None]  # beyond a site's patients there are ones
        counts = chosen.sum(1)
        index = np.full((len(turns), counts.max()), self._padding, np.int64)
        present = np.arange(index.shape[1]) < counts[:, None]
        rows = np.arange(drawn.shape[1]) + self._starts[places, None]
        index[present] = rows[chosen]
        return index, present.astype(np.float32)

    def _noised(
        self, total: Tensor, plans: Sequence[TrainingPlan], sources: Sequence[NoiseSource]
    ) -> Tensor:
        """Every site's sum with that site's noise; afterwards nothing looks at a patient."""
        guarantees = [plan.guarantee for plan in plans if isinstance(plan.guarantee, Private)]
        released = add_noise_to_rows(
            total.cpu().numpy(),
            stds=[g.noise_multiplier * g.clip_norm for g in guarantees],
            sensitivities=[g.clip_norm for g in guarantees],
            sources=sources[: len(plans)],
        )
        return torch.from_numpy(released).to(self._device)

    def _alone(self, flat: Tensor, batch: StackedBatch, number: int) -> Tensor:
        """One site's step by the code of a single site, which leaves out what is not finite."""
        start = 0
        for p in self._parameters:
            if p.requires_grad:
                p.data.copy_(flat[start : start + p.numel()].view_as(p))
                start += p.numel()
        mask = batch.mask[number]
        whole = mask.view(-1, batch.records).amax(1) > 0
        alone = Batch(batch.features[number], batch.labels[number], mask, batch.records)
        guarantee = self._plan.guarantee
        trained = [p for p in self._parameters if p.requires_grad]
        clipper: Clipper = Plain(self._model, self._loss, trained)
        clip_norm = math.inf
        if isinstance(guarantee, Private):
            mode = choose_mode(self._model, batch_size=1.0, records=batch.records)
            clipper = make_clipper(self._model, self._loss, trained, mode=mode)
            clip_norm = guarantee.clip_norm
        try:
            return clipper(alone.only(whole), clip_norm=clip_norm).total.clone()
        finally:
            clipper.close()


def _taken(pile: Tensor, rows: Tensor) -> Tensor:
    """`pile[rows]`, in a fifth of the time."""
    return pile.index_select(0, rows.flatten()).view(*rows.shape, *pile.shape[1:])


def _sampler(site: CohortSite) -> PoissonSampler:
    """Chooses rows of a site; the rows themselves are in the pile, and nowhere else."""
    units = site.examples.units
    nothing = np.empty((len(units), 0), np.float32)
    return PoissonSampler(
        nothing,
        nothing,
        units,
        sample_rate=site.plan.sample_rate,
        max_records=site.plan.max_records,
        device=torch.device("cpu"),
    )


def _common(plans: Sequence[TrainingPlan]) -> TrainingPlan:
    """The first plan, which stands for what all have in common."""

    def shared(plan: TrainingPlan) -> TrainingPlan:
        guarantee = plan.guarantee
        if isinstance(guarantee, Private):
            guarantee = replace(guarantee, noise_multiplier=1.0)
        plan = replace(plan, guarantee=guarantee, sample_rate=1.0, steps=1, expected_batch_size=1.0)
        if plan.schedule == "constant":
            # Where in its schedule a site stands is of its own number of steps, and means nothing.
            plan = replace(plan, schedule_steps=0, first_step=0)
        return plan

    first = plans[0]
    if any(shared(plan) != shared(first) for plan in plans):
        raise ValueError("sites of one cohort differ in more than sample rate, steps and noise")
    adaptive = isinstance(first.guarantee, Private) and first.guarantee.adaptive is not None
    if adaptive or first.averaging != "last":
        raise ValueError("adaptive clipping and averaging are done site by site")
    return first
