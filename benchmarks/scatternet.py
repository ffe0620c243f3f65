"""A private linear model on ScatterNet features of MNIST (Tramèr and Boneh, ICLR 2021).

    FEDWARD_DATA=... python benchmarks/scatternet.py [--quick] [--json] [--seeds N] [--epsilon 3]
                                                     [--cache FOLDER]

The features are those of Kymatio's `Scattering2D(J=2, shape=(28, 28))`, which a fixed bank of
wavelets computes of each digit by itself: they cost no privacy. As in the paper they are normalised
in groups within each digit; their mean, released with noise at a small part of epsilon, is taken
off, and one linear layer is trained on them with DP-SGD. Their table has
98.7 percent at (2.93, 1e-5); epsilon is 3 here, by PLD, add-or-remove one digit. Steps,
sample rate, clip norm, learning rate, schedule and average were chosen on the last 10,000 training
digits (`--validate`), not on the test digits.

Needs the four IDX files in `$FEDWARD_DATA/mnist`; 2 GB of memory. One thread.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from mnist import DELTA, SIZE, digits, loss_of
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedward.client.training import Private, TrainingPlan, train
from fedward.privacy.accounting import (
    calibrate,
    calibrate_gaussian,
    compose,
    dp_sgd_event,
    gaussian_event,
    privacy_spent,
)
from fedward.privacy.mechanisms import add_noise, simulated_source
from fedward.tasks.task import Examples

EPSILON, BAR = 3.0, 98.7
MEAN_EPSILON = 0.2  # of the mean by itself; in all it is part of epsilon
SCALES, ANGLES = 2, 8
CHANNELS = 1 + SCALES * ANGLES + ANGLES**2 * SCALES * (SCALES - 1) // 2
GROUPS = 27
SAMPLE_RATE, STEPS, LEARNING_RATE, MOMENTUM, CLIP_NORM = 0.1, 600, 10.0, 0.9, 0.1


def wavelet(size: int, *, scale: int, angle: int | None) -> NDArray[np.float64]:
    """The spectrum of one filter; of the low-pass filter if `angle` is None.

    Morlet wavelets as in Kymatio 0.3 (Bruna and Mallat, PAMI 2013), periodic on `size` x `size`.
    """
    if angle is None:
        return np.fft.fft2(_gabor(size, 0.8 * 2 ** (scale - 1), 0.0, 0.0, 1.0)).real
    sigma, frequency = 0.8 * 2**scale, 0.75 * math.pi / 2**scale
    theta = (int(ANGLES - ANGLES / 2 - 1) - angle) * math.pi / ANGLES
    wave = _gabor(size, sigma, theta, frequency, 4 / ANGLES)
    bump = _gabor(size, sigma, theta, 0.0, 4 / ANGLES)
    return np.fft.fft2(wave - wave.sum() / bump.sum() * bump).real


def _gabor(
    size: int, sigma: float, theta: float, frequency: float, slant: float
) -> NDArray[np.complex128]:
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    curve = turn @ np.diag([1.0, slant**2]) @ turn.T / (2 * sigma**2)
    total = np.zeros((size, size), dtype=np.complex128)
    for row in range(-2, 3):
        for column in range(-2, 3):
            y, x = np.mgrid[:size, :size] + np.array([row, column])[:, None, None] * size
            decay = curve[0, 0] * y**2 + 2 * curve[0, 1] * y * x + curve[1, 1] * x**2
            wave = frequency * (y * math.cos(theta) + x * math.sin(theta))
            total += np.exp(-decay + 1j * wave)
    return total / (2 * math.pi * sigma**2 / slant)


class Scattering:
    """Two orders of wavelet coefficients of 28 x 28 pictures, 81 channels of 7 x 7."""

    def __init__(self, size: int = 28) -> None:
        step = 2**SCALES
        self.size = ((size + step) // step + 1) * step
        self._edge = (self.size - size) // 2
        self._low = self._periodised(wavelet(self.size, scale=SCALES, angle=None))
        self._waves = [
            [
                self._periodised(wavelet(self.size, scale=scale, angle=angle))
                for angle in range(ANGLES)
            ]
            for scale in range(SCALES)
        ]

    def _periodised(self, spectrum: NDArray[np.float64]) -> list[Tensor]:
        """The filter at each resolution: full, half and so on."""
        levels = []
        for level in range(SCALES + 1):
            kept = spectrum.copy()
            # What the lower resolution cannot hold is left out first.
            start, gone = self.size // 2 ** (level + 1), int(self.size * (1 - 2.0**-level))
            kept[start : start + gone, :] = 0
            kept[:, start : start + gone] = 0
            levels.append(_fold(torch.from_numpy(kept), 2**level).float() * 4**level)
        return levels

    def __call__(self, pictures: Tensor) -> Tensor:
        """Of shape `(rows, 28, 28)`, features of shape `(rows, 81, 7, 7)`."""
        edges = (self._edge,) * 4
        padded = functional.pad(pictures[:, None], edges, mode="reflect")[:, 0]
        spectrum = torch.fft.fft2(padded)
        order0, order1, order2 = [self._averaged(spectrum, 0)], [], []
        for scale in range(SCALES):
            for wave in self._waves[scale]:
                first = _modulus(spectrum * wave[0], 2**scale)
                order1.append(self._averaged(first, scale))
                for later in range(scale + 1, SCALES):
                    for inner in self._waves[later]:
                        second = _modulus(first * inner[scale], 2 ** (later - scale))
                        order2.append(self._averaged(second, later))
        return torch.stack(order0 + order1 + order2, 1)

    def _averaged(self, spectrum: Tensor, level: int) -> Tensor:
        smooth = _fold(spectrum * self._low[level], 2 ** (SCALES - level))
        averaged: Tensor = torch.fft.ifft2(smooth).real[:, 1:-1, 1:-1]
        return averaged


def _fold(spectrum: Tensor, by: int) -> Tensor:
    """The spectrum of every `by`-th sample."""
    if by == 1:
        return spectrum
    size = spectrum.shape[-1] // by
    folded: Tensor = spectrum.reshape(*spectrum.shape[:-2], by, size, by, size).mean((-4, -2))
    return folded


def _modulus(spectrum: Tensor, by: int) -> Tensor:
    moduli: Tensor = torch.fft.fft2(torch.fft.ifft2(_fold(spectrum, by)).abs())
    return moduli


def scattered(folder: Path, part: str, *, cache: Path | None) -> Examples:
    """Digits with their wavelet coefficients, in half precision, normalised in groups.

    Group norm makes a digit's features no longer than the square root of their number.
    """
    given = digits(folder, part)
    file = cache and cache / f"{part}.npy"
    if file and file.exists():
        raw = np.load(file)
    else:
        scattering = Scattering()
        pictures = torch.from_numpy(np.asarray(given.features, dtype=np.float32))[:, 0]
        rows = [scattering(some).half().numpy() for some in torch.split(pictures, 256)]
        raw = np.concatenate(rows)
        if file:
            np.save(file, raw)
    normal = [
        functional.group_norm(some.float(), GROUPS).flatten(1)
        for some in torch.split(torch.from_numpy(raw), 256)
    ]
    return Examples(torch.cat(normal).numpy(), given.labels, given.units)


def release_mean(training: Examples, *, noise: float, seed: int) -> NDArray[np.float32]:
    """The mean of the features, with Gaussian noise of `noise` times a digit's greatest length."""
    total = training.features.sum(0, dtype=np.float64)
    share = len(training.labels) / SIZE  # validation: see `main`
    longest = math.sqrt(len(total))
    noisy = add_noise(
        total,
        std=share * noise * longest,
        sensitivity=share * longest,
        source=simulated_source("scatternet-mean", seed),
    )
    return (noisy / (share * SIZE)).astype(np.float32)


def plan_of(*, size: int, noise_multiplier: float) -> TrainingPlan:
    """The whole run as one round at one site."""
    return TrainingPlan(
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        steps=STEPS,
        sample_rate=SAMPLE_RATE,
        expected_batch_size=SAMPLE_RATE * size,
        guarantee=Private(clip_norm=CLIP_NORM, noise_multiplier=noise_multiplier),
        averaging="ema",
        ema_decay=0.95,
    )


def run(training: Examples, test: Examples, plan: TrainingPlan, *, seed: int) -> float:
    """Accuracy in percent; sampling and noise are drawn from the seed."""
    model = nn.Linear(training.features.shape[1], 10)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    train(model, loss_of, training, plan=plan, noise=simulated_source("scatternet", seed))
    with torch.no_grad():
        found = model(torch.from_numpy(np.asarray(test.features))).argmax(1).numpy()
    return 100 * float(np.mean(found == test.labels))


def part(whole: Examples, rows: slice) -> Examples:
    """Some of the digits."""
    labels = whole.labels[rows]
    return Examples(whole.features[rows], labels, np.arange(len(labels)))


def main() -> None:
    """Run, print, and say whether the bar holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=EPSILON)
    parser.add_argument("--cache", type=Path, help="a folder that keeps the coefficients")
    parser.add_argument(
        "--validate", action="store_true", help="on the last 10,000 training digits"
    )
    arguments = parser.parse_args()
    folder = Path(os.environ.get("FEDWARD_DATA", "")) / "mnist"
    if "FEDWARD_DATA" not in os.environ or not folder.is_dir():
        sys.exit("set FEDWARD_DATA to a folder with mnist/*.gz, the digits as IDX files")
    torch.set_num_threads(1)
    started = time.process_time()
    training = scattered(folder, "train", cache=arguments.cache)
    if arguments.validate:
        training, test = part(training, slice(50_000)), part(training, slice(50_000, None))
    else:
        test = scattered(folder, "t10k", cache=arguments.cache)
    computed = time.process_time()
    noise = calibrate(
        epsilon=arguments.epsilon,
        delta=DELTA,
        sample_rate=SAMPLE_RATE,
        steps=STEPS,
        beside_epsilon=MEAN_EPSILON,
    )
    mean_noise = calibrate_gaussian(epsilon=MEAN_EPSILON, delta=DELTA)
    sgd = dp_sgd_event(noise_multiplier=noise, sample_rate=SAMPLE_RATE, steps=STEPS)
    event = compose([gaussian_event(mean_noise), sgd])
    spent = privacy_spent(event, delta=DELTA, unit="record")
    # In validation settings are compared at the signal-to-noise ratio of the whole.
    share = len(training.labels) / SIZE
    plan = plan_of(size=len(training.labels), noise_multiplier=share * noise)
    seeds = 1 if arguments.quick else arguments.seeds
    results = []
    for seed in range(seeds):
        mean = release_mean(training, noise=mean_noise, seed=seed)
        for part_of in (training, test):
            part_of.features[:] -= mean
        results.append(run(training, test, plan, seed=seed))
        for part_of in (training, test):
            part_of.features[:] += mean
        print(f"seed {seed}: {results[-1]:.2f}", file=sys.stderr, flush=True)
    accuracy = round(statistics.mean(results), 2)
    row = {
        "test": "last 10,000 training digits" if arguments.validate else "test digits",
        "accuracy": accuracy,
        "runs": results,
        "deviation": statistics.stdev(results) if seeds > 1 else None,
        "privacy": spent.to_json(),
        "seconds_features": round(computed - started, 1),
        "seconds_training": round((time.process_time() - computed) / seeds, 1),
    }
    bar = {
        "name": f"linear model on ScatterNet features, epsilon {arguments.epsilon:g}",
        "value": accuracy,
        "bar": BAR,
        "holds": accuracy >= BAR,
    }
    print(row, file=sys.stderr)
    if arguments.json:
        print(json.dumps({"benchmark": "scatternet", "rows": [row], "bars": [bar]}))
    else:
        print(f"{'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: {accuracy:.2f} ({BAR})")


if __name__ == "__main__":
    main()
