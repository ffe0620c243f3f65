"""Logistic regression with privacy on breast_cancer, by Fedward and by Opacus."""

import functools
import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training import NotPrivate, Private, TrainingPlan, train
from fedward.privacy.accounting import calibrate
from fedward.privacy.mechanisms import simulated_source
from fedward.tasks.task import Examples

DELTA = 1e-5
CANCER_RATE, CANCER_STEPS, CANCER_ROWS = 0.141, 200, 455
OPACUS_BATCH, OPACUS_RATE, OPACUS_EPOCHS = 64, 0.05, 20
Sites = Sequence[Examples]
Division = tuple[list[Examples], list[Examples]]


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss, one value an example."""
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], labels, reduction="none")


def logistic(num_features: int) -> nn.Linear:
    """A linear model that starts at zero."""
    model = nn.Linear(num_features, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def stacked(sites: Sites) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features and labels of all sites together."""
    return (
        np.concatenate([e.features for e in sites]),
        np.concatenate([e.labels for e in sites]).astype(np.float32),
    )


def guarantee(clip_norm: float, noise: float | None) -> Private | NotPrivate:
    """Noise, or by name none."""
    if noise is None:
        return NotPrivate()
    return Private(clip_norm=clip_norm, noise_multiplier=noise)


def cancer(seed: int) -> Division:
    """Training and test rows; each feature within [-1, 1], by the published ranges.

    The square root evens out what is skewed, whatever the rows are.
    """
    bunch = load_breast_cancer()
    row = r"^\w[\w ]* \((?:mean|standard error|worst)\): +([\d.]+) +([\d.]+) *$"
    ranges = np.array(re.findall(row, bunch.DESCR, re.MULTILINE), dtype=float)
    share = np.clip((bunch.data - ranges[:, 0]) / (ranges[:, 1] - ranges[:, 0]), 0, 1)
    features = (2 * np.sqrt(share) - 1).astype(np.float32)
    parts = train_test_split(
        features, bunch.target.astype(np.float32), train_size=CANCER_ROWS, random_state=seed
    )
    training, test, y, y_test = parts
    return (
        [Examples(training, y, np.arange(len(y)))],
        [Examples(test, y_test, np.arange(len(y_test)))],
    )


def cancer_noise(epsilon: float | None) -> float | None:
    """What 200 steps at `epsilon` need."""
    if epsilon is None:
        return None
    return calibrate(epsilon=epsilon, delta=DELTA, sample_rate=CANCER_RATE, steps=CANCER_STEPS)


def train_cancer(
    training: Examples, *, rate: float, noise: float | None, seed: int, share: float = 1.0
) -> nn.Module:
    """One run; `share` of the rows and of the noise, in cross-validation."""
    plan = TrainingPlan(
        learning_rate=rate,
        steps=CANCER_STEPS,
        sample_rate=CANCER_RATE,
        expected_batch_size=CANCER_RATE * CANCER_ROWS * share,
        guarantee=guarantee(1.0, None if noise is None else share * noise),
        averaging="tail",
    )
    model = logistic(training.features.shape[1])
    train(model, loss_of, training, plan=plan, noise=simulated_source("cancer", seed))
    return model


@functools.cache
def _opacus_noise(epsilon: float, sample_rate: float) -> float:
    """As `make_private_with_epsilon` finds it, once and not for every seed."""
    from opacus.accountants.utils import get_noise_multiplier

    return float(
        get_noise_multiplier(
            target_epsilon=epsilon,
            target_delta=DELTA,
            sample_rate=sample_rate,
            epochs=OPACUS_EPOCHS,
            accountant="prv",
        )
    )


def opacus_cancer(training: Examples, *, epsilon: float, seed: int) -> nn.Module:
    """Opacus as its README has it, with its own loader and accountant."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(seed)
    model = logistic(training.features.shape[1])
    rows = TensorDataset(torch.from_numpy(training.features), torch.from_numpy(training.labels))
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=OPACUS_RATE),
        data_loader=DataLoader(rows, batch_size=OPACUS_BATCH),
        noise_multiplier=_opacus_noise(epsilon, 1 / -(-len(rows) // OPACUS_BATCH)),
        max_grad_norm=1.0,
    )
    for _ in range(OPACUS_EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            loss_of(private(x), y).mean().backward()
            optimizer.step()
    return model


def scores(model: nn.Module, sites: Sites) -> tuple[float, float]:
    """Accuracy and exact AUC on all rows together."""
    features, labels = stacked(sites)
    with torch.no_grad():
        outputs = model(torch.from_numpy(features)).numpy()[:, 0]
    return float(np.mean((outputs > 0) == labels)), float(roc_auc_score(labels, outputs))
