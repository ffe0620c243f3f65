"""One model that is trained for many sites, one after the other."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedward.client.training.bookkeeping import leaves_of
from fedward.client.training.layout import Layout
from fedward.client.training.loop import LocalResult, run_session
from fedward.client.training.parts import Loss
from fedward.client.training.plan import NotPrivate, TrainingPlan
from fedward.client.training.sampler import PoissonSampler
from fedward.client.training.session import Examples, Session, make_sampler
from fedward.privacy.mechanisms.noise import NoiseSource


class Trainer:
    """Does what `train` does, for site after site, and lays the model out once.

    Args:
        model: Belongs to the trainer from here on: nobody else may use it.
        loss: Of outputs and labels, one value an example.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self._model, self._loss = model, loss
        self._device = next(model.parameters()).device
        # Where book-keeping fits, the size of a batch decides nothing.
        self._any_batch = leaves_of(model) is not None
        self._layout: Layout | None = None
        self._of: tuple[object, ...] = ()

    def sampler(self, examples: Examples, plan: TrainingPlan) -> PoissonSampler:
        """A site's sampler, which holds no state and may be kept from round to round."""
        return make_sampler(examples, plan, device=self._device)

    def train(
        self,
        parameters: NDArray[np.float32],
        sampler: PoissonSampler,
        plan: TrainingPlan,
        *,
        noise: Callable[[], NoiseSource],
    ) -> LocalResult:
        """Train from `parameters`; see `train` of `client.training.loop`.

        Args:
            parameters: All that are trained, in the model's order.
            sampler: The site's; of the same plan.
            plan: What to do.
            noise: Makes the site's one source; not called where nothing is drawn.
        """
        layout = self._laid_out(sampler, plan)
        layout.put(parameters)
        idle = sampler.certain and isinstance(plan.guarantee, NotPrivate)
        source = _Idle() if idle else noise()
        return run_session(Session(layout, sampler, plan), plan, noise=source)

    def _laid_out(self, sampler: PoissonSampler, plan: TrainingPlan) -> Layout:
        # All that `Layout` looks at.
        of = (
            (plan.mode, plan.memory_limit_mb, type(plan.guarantee)),
            (sampler.records, sampler.num_units > 0),
            None if self._any_batch else plan.expected_batch_size,
        )
        if self._layout is None or of != self._of:
            if self._layout is not None:
                self._layout.close()
            self._layout = Layout(self._model, self._loss, plan, sampler)
            self._of = of
        return self._layout


class _Idle:
    """A source for a plan whose draws decide nothing: everybody takes part, nothing is added."""

    private = False

    def uniform(self, size: int) -> NDArray[np.float64]:
        """Everybody is in."""
        return np.zeros(size)

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float64]:
        """Nobody asks."""
        raise ValueError(f"training without privacy adds no noise, not {size} of {std}")
