"""What DP training costs: Fedward against plain torch, Opacus and `vmap(grad)`, in one process.

    python benchmarks/dp_training.py [--quick] [--json] [--family mlp,cnn] [--batch 64]

The whole takes ten minutes and more; by families and batches it takes its parts one by one.

CPU time of a step on a given batch, of an epoch end to end, and peak memory. An epoch goes from a
plain model to a trained one over 1,024 records or four batches, each with its own loader; what
makes a trainer private is set up in it, as a site does in every round. All take turns, in an order
that rotates, and a ratio is the median over the turns of each turn's ratio, so that a neighbour of
the machine meets both sides. All run on one thread. "fedward" draws its noise from the
cryptographic source, on which the bars are; "fedward-simulated" from the seeded one, and
"fedward-randn" from `torch.randn`, which protects nothing but is what Opacus does. Models are in
`dp_models.py`.
"""

import argparse
import importlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dp_models import FAMILIES, Family
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fedward.client.training import Private, TrainingPlan, train
from fedward.client.training.prefetch import drawing_ahead
from fedward.client.training.session import session
from fedward.privacy.mechanisms import NoiseSource, add_noise, secure_source, simulated_source
from fedward.tasks.losses import cross_entropy

CLIP_NORM, NOISE_MULTIPLIER, LEARNING_RATE, MOMENTUM = 1.0, 1.0, 0.05, 0.9
EPOCH_RECORDS, EPOCH_STEPS = 1024, 4  # an epoch is at least this long, in expected batches
Step = Callable[[], object]

# Over plain torch, CPU time of a step, by family and batch.
STEP_BARS = {
    ("logistic", 64): 0.7,
    ("logistic", 512): 0.7,
    ("mlp", 64): 1.6,
    ("mlp", 512): 1.6,
    ("cnn", 64): 1.6,
    ("cnn", 512): 1.3,
    ("embedding", 64): 2.3,
    ("embedding", 512): 2.3,
    ("transformer", 64): 1.5,
    ("transformer", 512): 1.5,
}
# How many times faster than Opacus' best mode, an epoch end to end.
EPOCH_BARS = {"logistic": 6.0, "mlp": 3.0, "cnn": 1.8, "embedding": 4.0}


def plan_of(batch: int, *, steps: int, sample_rate: float) -> TrainingPlan:
    """The plan that all private trainers follow."""
    return TrainingPlan(
        learning_rate=LEARNING_RATE,
        momentum=MOMENTUM,
        steps=steps,
        sample_rate=sample_rate,
        expected_batch_size=float(batch),
        guarantee=Private(clip_norm=CLIP_NORM, noise_multiplier=NOISE_MULTIPLIER),
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every reference."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)


def tensors(family: Family, rows: int) -> tuple[Tensor, Tensor]:
    """Records and labels."""
    examples = family.examples(rows)
    return torch.from_numpy(examples.features), torch.from_numpy(examples.labels)


# ---- one step on a given batch


def plain_step(family: Family, batch: int, _stack: ExitStack) -> Step:
    """Torch without privacy."""
    model = family.build().train()
    optimizer, (x, y) = sgd(model), tensors(family, batch)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def fedward_step(source: NoiseSource) -> Callable[[Family, int, ExitStack], Step]:
    """Ours, with the mode that it chooses by itself."""

    def make(family: Family, batch: int, stack: ExitStack) -> Step:
        plan = plan_of(batch, steps=1, sample_rate=1.0)
        work = stack.enter_context(
            session(family.build(), cross_entropy, family.examples(batch), plan)
        )
        ahead = drawing_ahead(source, steps=1000)  # as `train` does
        drawn = work.draw(ahead)
        return lambda: work.take(drawn, ahead)

    return make


def opacus_private(
    model: nn.Module, mode: str, loader: DataLoader[tuple[Tensor, ...]], *, poisson: bool
) -> tuple[Any, torch.optim.Optimizer, Callable[..., Tensor], DataLoader[tuple[Tensor, ...]]]:
    """Opacus as its tutorial has it."""
    from opacus import PrivacyEngine

    criterion = nn.CrossEntropyLoss()
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=sgd(model),
        criterion=criterion,
        data_loader=loader,
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=poisson,
        grad_sample_mode=mode,
    )
    if mode == "ghost":
        return made[0], made[1], made[2], made[3]
    return made[0], made[1], criterion, made[2]


def opacus_model(family: Family) -> nn.Module:
    """The model, with the layers of Opacus where it has its own."""
    return (family.opacus or family.build)().train()


def opacus_step(mode: str) -> Callable[[Family, int, ExitStack], Step]:
    """One of Opacus' modes."""

    def make(family: Family, batch: int, _stack: ExitStack) -> Step:
        x, y = tensors(family, batch)
        loader = DataLoader(TensorDataset(x, y), batch_size=batch)
        private = opacus_private(opacus_model(family), mode, loader, poisson=False)
        model, optimizer, criterion, _ = private

        def step() -> None:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()

        return step

    return make


def vmap_step(family: Family, batch: int, _stack: ExitStack) -> Step:
    """Every record's gradient by `torch.func`; a fused recurrent layer cannot be mapped."""
    model = family.build().train()
    optimizer, (x, y) = sgd(model), tensors(family, batch)
    parameters = dict(model.named_parameters())

    def one(values: Mapping[str, Tensor], record: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(
            functional_call(model, dict(values), (record[None],)), label[None]
        )

    per_record = vmap(grad(one), in_dims=(None, 0, 0))

    def step() -> None:
        gradients = per_record({n: p.detach() for n, p in parameters.items()}, x, y)
        squared = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        factors = (CLIP_NORM / (squared.sqrt() + 1e-6)).clamp(max=1.0)
        for name, p in parameters.items():
            total = (factors @ gradients[name].flatten(1)).view_as(p)
            total += torch.randn_like(p) * (NOISE_MULTIPLIER * CLIP_NORM)
            p.grad = total / batch
        optimizer.step()

    return step


class RandnSource:
    """torch.randn: protects nothing; what a step costs with noise as cheap as Opacus' own."""

    private = False

    def gaussian(self, size: int, *, std: float) -> NDArray[np.float32]:
        """See `NoiseSource`."""
        return torch.randn(size).mul_(std).numpy()

    def uniform(self, size: int) -> NDArray[np.float64]:
        """See `NoiseSource`."""
        return torch.rand(size, dtype=torch.float64).numpy()


STEPS: dict[str, Callable[[Family, int, ExitStack], Step]] = {
    "plain": plain_step,
    "fedward": fedward_step(secure_source()),
    "fedward-simulated": fedward_step(simulated_source(1)),
    "fedward-randn": fedward_step(RandnSource()),
    "opacus-hooks": opacus_step("hooks"),
    "opacus-ghost": opacus_step("ghost"),
    "opacus-functorch": opacus_step("functorch"),
    "vmap-grad": vmap_step,
}

# ---- an epoch end to end


def epoch_steps(batch: int) -> int:
    """How many batches an epoch is expected to have."""
    return max(EPOCH_STEPS, EPOCH_RECORDS // batch)


def plain_epoch(family: Family, batch: int) -> Step:
    """Torch without privacy, with a shuffling loader."""
    model = family.build().train()
    optimizer = sgd(model)
    data = TensorDataset(*tensors(family, batch * epoch_steps(batch)))
    loader = DataLoader(data, batch_size=batch, shuffle=True)

    def epoch() -> None:
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    return epoch


def fedward_epoch(source: NoiseSource) -> Callable[[Family, int], Step]:
    """Ours, from the model that came in to the update that goes out."""

    def make(family: Family, batch: int) -> Step:
        steps = epoch_steps(batch)
        examples, model = family.examples(batch * steps), family.build()
        plan = plan_of(batch, steps=steps, sample_rate=1 / steps)
        return lambda: train(model, cross_entropy, examples, plan=plan, noise=source)

    return make


def opacus_epoch(mode: str) -> Callable[[Family, int], Step]:
    """Opacus with its own Poisson loader, and its engine made in it, as in Flower's example."""

    def make(family: Family, batch: int) -> Step:
        data = TensorDataset(*tensors(family, batch * epoch_steps(batch)))
        loader, plain = DataLoader(data, batch_size=batch), opacus_model(family)

        def epoch() -> None:
            model, optimizer, criterion, private = opacus_private(plain, mode, loader, poisson=True)
            for x, y in private:
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
            model.to_standard_module()

        return epoch

    return make


EPOCHS: dict[str, Callable[[Family, int], Step]] = {
    "plain": plain_epoch,
    "fedward": fedward_epoch(secure_source()),
    "fedward-simulated": fedward_epoch(simulated_source(2)),
    "opacus-hooks": opacus_epoch("hooks"),
    "opacus-ghost": opacus_epoch("ghost"),
    "opacus-functorch": opacus_epoch("functorch"),
}

# ---- measuring


_LONG_MS = 100.0  # steps for which it does not matter what ran before
_MUCH, _EVERY = 20, 3  # what takes so many times plain's time is measured in every third turn
_BLOCK_MS = 8.0  # a turn of something quick is as many steps as fill this


class Turns:
    """CPU milliseconds of a step, of each contender in each turn."""

    def __init__(self, made: Mapping[str, Step]) -> None:
        self.times: dict[str, list[float]] = {name: [] for name in made}
        self._made = dict(made)
        self._steps = dict.fromkeys(made, 1)

    def take(self, *, seconds: float, at_least: int, at_most: int = 101) -> "Turns":
        """Take turns until `seconds` of CPU time are over; or, of long ones, three times that."""
        names, begun = list(self._made), time.process_time()
        for turn in range(at_most):
            over = (time.process_time() - begun) / seconds
            if over > (1 if turn >= at_least else 3):
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                times = self.times[name]
                sits_out = turn % _EVERY and times[-1] > _MUCH * self.times["plain"][-1]
                times.append(times[-1] if sits_out else self._turn(name))
        return self

    def _turn(self, name: str) -> float:
        """One step, so that caches and heap are as one of its own kind leaves them, and a block."""
        step, times = self._made[name], self.times[name]
        if not times or times[-1] < _LONG_MS:
            step()
        steps = max(1, round(_BLOCK_MS / times[-1])) if times else 1
        start = time.process_time_ns()
        for _ in range(steps):
            step()
        return (time.process_time_ns() - start) / 1e6 / steps

    def medians(self) -> dict[str, float]:
        """Milliseconds of each."""
        return {name: statistics.median(values) for name, values in self.times.items()}

    def ratio(self, name: str, to: str) -> float:
        """The median over turns of each turn's ratio."""
        pairs = zip(self.times[name], self.times[to], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def ratios(self, to: str) -> dict[str, float]:
        """Of all to one."""
        return {name: self.ratio(name, to) for name in self.times}

    def best(self, prefix: str) -> str:
        """The quickest of those whose name begins so."""
        medians = self.medians()
        return min((n for n in medians if n.startswith(prefix)), key=lambda n: medians[n])


def build_all(
    makers: Mapping[str, Callable[..., Step]], *args: object
) -> tuple[dict[str, Step], dict[str, str]]:
    """Those that run at all, and why the others do not."""
    made: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            step = make(*args)
            step()
            made[name] = step
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return made, failed


def peak_mb(make: Callable[[Family, int, ExitStack], Step], family: Family, batch: int) -> float:
    """Peak memory of three steps above what was there before, in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        grown = math.nan
        try:
            with ExitStack() as stack:
                step = make(family, batch, stack)
                Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
                before = _status("VmRSS")
                for _ in range(3):
                    step()
                grown = (_status("VmHWM") - before) / 1024
        except (RuntimeError, NotImplementedError, ValueError, TypeError, OSError):
            grown = math.nan  # reported as not measured
        os.write(writer, repr(grown).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        value = float(answer.read() or "nan")
    os.waitpid(child, 0)
    return value


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise OSError(f"no {key} in /proc/self/status")


def measure(name: str, batch: int, *, seconds: float, quick: bool) -> dict[str, object]:
    """All figures of one family at one batch size."""
    family, turns = FAMILIES[name], 5 if quick else 7
    torch.manual_seed(0)
    makers = {k: v for k, v in STEPS.items() if not quick or k not in _SLOW}
    memory = {} if quick else {k: peak_mb(make, family, batch) for k, make in makers.items()}
    parameters = sum(p.numel() for p in family.build().parameters())
    with ExitStack() as stack:
        made, failed = build_all(makers, family, batch, stack)
        steps = Turns({**made, "noise": noise_of(parameters)}).take(seconds=seconds, at_least=turns)
    best = steps.best("opacus")
    row: dict[str, object] = {
        "family": name,
        "batch": batch,
        "parameters": parameters,
        "turns": len(steps.times["plain"]),
        "step_ms": _rounded(steps.medians()),
        "step_over_plain": _rounded(steps.ratios("plain")),
        "step_over_default": steps.ratio("fedward", "opacus-hooks"),
        "peak_mb": {k: None if math.isnan(v) else round(v, 1) for k, v in memory.items()},
        "does_not_run": failed,
        "epoch_over_plain": {},
    }
    if quick and name not in EPOCH_BARS:
        return row
    chosen = {
        k: v
        for k, v in EPOCHS.items()
        if k == best or not (k.startswith("opacus") or k in _SLOW if quick else k in failed)
    }
    epochs = Turns(build_all(chosen, family, batch)[0])
    epochs.take(seconds=seconds, at_least=turns)
    return row | {
        "epoch_ms": _rounded(epochs.medians()),
        "epoch_over_plain": _rounded(epochs.ratios("plain")),
        "epoch_of_best_over_fedward": epochs.ratio(epochs.best("opacus"), "fedward"),
    }


_SLOW = ("opacus-functorch", "fedward-simulated", "fedward-randn", "vmap-grad")


def noise_of(parameters: int) -> Step:
    """The cryptographic noise of a step by itself."""
    source, total = secure_source(), np.zeros(parameters, dtype=np.float32)
    return lambda: add_noise(total, std=1.0, sensitivity=1.0, source=source)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def bars_of(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Every bar, held or missed."""
    bars: list[dict[str, object]] = []

    def bar(name: str, value: float, limit: float, *, at_most: bool) -> None:
        holds = value <= limit if at_most else value >= limit
        bars.append({"name": name, "value": round(value, 3), "bar": limit, "holds": holds})

    for row in rows:
        family, batch = str(row["family"]), int(str(row["batch"]))
        label = f"{family} at {batch}"
        if (family, batch) in STEP_BARS:
            ratio = dict(_items(row["step_over_plain"]))["fedward"]
            bar(f"{label}: step over plain", ratio, STEP_BARS[family, batch], at_most=True)
        if family in EPOCH_BARS:
            bar(
                f"{label}: epoch, times faster than Opacus' best mode",
                float(str(row["epoch_of_best_over_fedward"])),
                EPOCH_BARS[family],
                at_most=False,
            )
        bar(
            f"{label}: step over Opacus' default",
            float(str(row["step_over_default"])),
            1.0,
            at_most=True,
        )
    return bars


def load_libraries() -> None:
    """What is loaded or compiled once a process is in nobody's peak memory."""
    importlib.import_module("opacus")
    noise_of(1)()


def main() -> None:
    """Measure, print, and say which bars hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute, noisier")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--family", type=_families, help="some of them, with commas between")
    parser.add_argument("--batch", type=int, action="append")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # Opacus warns of what is measured here
    load_libraries()
    rows = []
    for family in args.family or FAMILIES:
        for batch in args.batch or (64, 512):
            row = measure(family, batch, seconds=0.4 if args.quick else 8.0, quick=args.quick)
            rows.append(row)
            print(
                f"{family:12} {batch:4}  "
                + "  ".join(f"{name} {value}" for name, value in _items(row["step_over_plain"]))
                + "  | epoch  "
                + "  ".join(f"{name} {value}" for name, value in _items(row["epoch_over_plain"])),
                file=sys.stderr,
                flush=True,
            )
    bars = bars_of(rows)
    if args.json:
        print(json.dumps({"rows": rows, "bars": bars}))
        return
    for bar in bars:
        print(
            f"{'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: {bar['value']} ({bar['bar']})"
        )


def _families(names: str) -> list[str]:
    chosen = names.split(",")
    for name in chosen:
        if name not in FAMILIES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FAMILIES)}")
    return chosen


def _items(values: object) -> list[tuple[str, float]]:
    return list(values.items()) if isinstance(values, dict) else []


if __name__ == "__main__":
    main()
