"""Simulation at speed: one job on Fedward, a plain torch loop, pfl, Flower on Ray, NVFlare.

    benchmarks/peers/setup.sh FOLDER                 # once: the peers' virtual environments
    python benchmarks/simulation.py [--peers FOLDER] [--quick] [--json] [--show 1|2|3|4|5]

Breast cancer data, an MLP 30-64-2, FedAvg, one local epoch, batch 32, 10 rounds, the same rows at
each site for everybody. Every contender is a process of its own; they take turns, and a ratio is
the median of each turn's. Time of a round is processor time (median over rounds, first one left
out) where the contender is one process, so that a busy machine does not blur ratios, and wall time
where it is many; memory is the peak over all its processes.
Fedward's processes do everything that a run does: study, admission, ledgers, evaluation, a signed
release. Show 2 adds privacy; show 3 grows the number of sites; show 4 is a study with dropouts,
stragglers and attackers, whose report is read; show 5 needs a GPU.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROWS_A_SITE = 28
_DATA_KIB = ROWS_A_SITE * 31 * 4 / 1024  # 30 features and a label
_MOST_BEYOND_DATA = 5 * _DATA_KIB  # site file, key, ledger, plan and message: a small multiple
_PAIRS = {ROWS_A_SITE: 5, 320: 3}  # turns of private training, by rows a site
_LOOK_EVERY = 0.1
_PATIENCE = 900.0


@dataclass(frozen=True, slots=True)
class Contender:
    """Who does the job: a name, a script of `peers/`, its arguments, and whose Python.

    It takes part in at most `turns` turns: some take minutes.
    """

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    peer: str | None = None
    turns: int = 99


PLAIN = Contender("plain loop", "plain.py")
PER_SITE = Contender("fedward in-process", "fedward_job.py", ("per-site",))
VECTORISED = Contender("fedward vectorised", "fedward_job.py", ("vectorised",))
PFL = Contender("pfl-research", "pfl_job.py", peer="pfl", turns=2)
RAY = Contender("flower on ray", "flower_ray.py", turns=3)
NVFLARE = Contender("nvflare", "nvflare_job.py", peer="nvflare", turns=1)
OPACUS = Contender("opacus loop", "opacus_loop.py")
PFL_PRIVATE = Contender("pfl-research private", "pfl_job.py", ("private",), peer="pfl", turns=1)
PER_SITE_PRIVATE = Contender(
    "fedward in-process private", "fedward_job.py", ("per-site", "private"), turns=2
)
VECTORISED_PRIVATE = Contender(
    "fedward vectorised private", "fedward_job.py", ("vectorised", "private")
)


def write_job(folder: Path, *, sites: int, model: str, rounds: int, size: int) -> None:
    """Write what `peers/job.py` reads: the same rows for everybody."""
    import breast_cancer

    from fedward.simulations.partitions import make_partition
    from fedward.tasks import datasets

    partition = make_partition(
        datasets.pooled("breast_cancer:DATASET"),
        label="malignant",
        kind="temporal",
        args={"num_sites": sites, "strength": 1.0, "size": size},
        seed=0,
    )
    rows = list(partition.rows.values())
    folder.mkdir(parents=True)
    np.savez(
        folder / "data.npz",
        **breast_cancer.arrays(),
        rows=np.concatenate(rows),
        starts=np.cumsum([0] + [len(r) for r in rows]),
    )
    settings = {"model": model, "rounds": rounds, "batch": 32, "learning_rate": 0.1}
    settings |= {"clip_norm": 1.0, "noise_multiplier": 1.0}
    (folder / "job.json").write_text(json.dumps(settings))
    (folder / "partition.json").write_text(json.dumps({"size": size}))


def run(contender: Contender, job: Path, *, peers: Path | None, device: str) -> dict[str, Any]:
    """Run one contender to its end; says `missing` or `failed` where there is no figure."""
    python = sys.executable
    if contender.peer is not None:
        python = str((peers or Path()) / contender.peer / "bin" / "python")
        if peers is None or not Path(python).exists():
            return {"contender": contender.name, "missing": "not installed; see peers/setup.sh"}
    command = [python, str(HERE / "peers" / contender.script), str(job), *contender.arguments]
    if device != "cpu" and contender.script == "fedward_job.py":
        command.append(device)
    paths = [str(HERE / "peers"), str(HERE)]
    if contender.peer is None:
        paths += [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # What pip installs is compiled, the peers as well; a checkout is after its first run, unless:
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=job
        )
        watch = _Memory(process.pid)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        seconds = time.perf_counter() - begun
        peak = watch.stop()
        output.seek(0)
        text = output.read().decode(errors="replace")
    results = [line for line in text.splitlines() if line.startswith("RESULT ")]
    if not results:
        return {"contender": contender.name, "failed": text.strip()[-300:]}
    value = json.loads(results[-1].removeprefix("RESULT "))
    kind = "round_wall" if math.isnan(value["round_cpu"][0]) else "round_cpu"
    rounds = value[kind][1:] or value[kind]
    return {
        "contender": contender.name,
        "accuracy": round(value["accuracy"], 4),
        "round_ms": statistics.median(rounds) * 1e3,
        "round_is": "wall" if kind == "round_wall" else "processor",
        "process_s": seconds,
        "peak_mb": max(peak, value["max_rss_mb"]),
    }


class _Memory:
    """Peak over time of the resident memory of a process and all below it, in MiB."""

    def __init__(self, root: int) -> None:
        self._root, self._peak, self._stop = root, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_EVERY):
            self._peak = max(self._peak, self._now())

    def _now(self) -> float:
        parents, resident = {}, {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGESIZE")
        total = 0
        for pid, held in resident.items():
            above = pid
            while above > 1 and above != self._root:
                above = parents.get(above, 0)
            total += held if above == self._root else 0
        return total / 2**20

    def stop(self) -> float:
        """The peak."""
        self._stop.set()
        self._thread.join()
        return self._peak


class Bench:
    """Runs contenders and keeps what came out, with the bars."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._known: dict[tuple[object, ...], dict[str, Any]] = {}

    def measure(
        self,
        contenders: list[Contender],
        *,
        sites: int,
        model: str = "mlp",
        size: int = ROWS_A_SITE,
        turns: int = 1,
    ) -> dict[str, dict[str, Any]]:
        """One job for each contender that has not done it before, in turns.

        Neighbours of the machine come and go: contenders that take turns, each turn beginning with
        another of them, all meet them. A contender's figures are medians over its turns.
        """
        rounds = 3 if self.arguments.quick else 10
        turns = 1 if self.arguments.quick else turns

        def key(contender: Contender) -> tuple[object, ...]:
            return contender.name, sites, model, size, self.arguments.device

        todo = [contender for contender in contenders if key(contender) not in self._known]
        done: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in todo}
        with tempfile.TemporaryDirectory(prefix="fedward-bench-") as folder:
            job = Path(folder) / "job"
            # 16 sites share the 455 rows out; more sites draw theirs from them.
            own = 0 if sites * size <= 455 and sites == 16 else size
            if todo:
                write_job(job, sites=sites, model=model, rounds=rounds, size=own)
            for turn in range(turns):
                first = turn % max(1, len(todo))
                for contender in todo[first:] + todo[:first]:
                    if turn < contender.turns and not _hopeless(done[contender.name]):
                        peers, device = self.arguments.peers, self.arguments.device
                        done[contender.name].append(run(contender, job, peers=peers, device=device))
        for contender in todo:
            row = middle(done[contender.name])
            row |= {"sites": sites, "model": model, "rows_a_site": size}
            self.rows.append(row)
            self._known[key(contender)] = row
            self._show(row)
        return {contender.name: self._known[key(contender)] for contender in contenders}

    def bar(self, name: str, value: float | None, bar: float, *, at_least: bool) -> None:
        """Hold a figure against a bar; one that could not be measured is not held."""
        holds = value is not None and (value >= bar if at_least else value <= bar)
        self.bars.append({"name": name, "value": value, "bar": bar, "holds": holds})
        if not self.arguments.json:
            said = "not measured" if value is None else f"{value:.3g}"
            sign = "at least" if at_least else "at most"
            word = "holds " if holds else "no figure" if value is None else "MISSED"
            print(f"  {word} {name}: {said} ({sign} {bar:g})")

    def _show(self, row: dict[str, Any]) -> None:
        if self.arguments.json:
            return
        what = row.get("missing") or row.get("failed")
        if what:
            print(f"{row['sites']:>6} sites  {row['contender']:<28} {what}")
            return
        print(
            f"{row['sites']:>6} sites  {row['contender']:<28} {row['round_ms']:9.2f} ms a round "
            f"({row['round_is']})  {row['process_s']:7.1f} s  {row['peak_mb']:7.0f} MB  "
            f"accuracy {row['accuracy']:.3f}",
            flush=True,
        )


def _hopeless(turns: list[dict[str, Any]]) -> bool:
    return bool(turns) and "round_ms" not in turns[0]


def middle(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A contender's figures: of times the medians over its turns, of memory the most."""
    ended = [turn for turn in turns if "round_ms" in turn]
    if not ended:
        return turns[0]
    times = {key: [turn[key] for turn in ended] for key in ("round_ms", "process_s")}
    return {
        **ended[0],
        **{key: statistics.median(values) for key, values in times.items()},
        "peak_mb": max(turn["peak_mb"] for turn in ended),
        "turns": times,
    }


def ratio(
    found: dict[str, dict[str, Any]], over: Contender, under: Contender, key: str = "round_ms"
) -> float | None:
    """One contender's figure over another's: the median of each turn's; None if either has none."""
    values = [found.get(c.name, {}).get("turns", {}).get(key) for c in (over, under)]
    if None in values:
        return None
    return statistics.median(a / b for a, b in zip(*values, strict=False))


def show_1(bench: Bench) -> None:
    """Everybody on one job, at 16, 100 and 1,000 sites."""
    from simulation_checks import milliseconds_a_message

    quick = bench.arguments.quick
    bench.bar("grid, ms a message", milliseconds_a_message(), 0.2, at_least=False)
    few = [PLAIN, PER_SITE, VECTORISED]
    found = bench.measure(few if quick else [*few, PFL, RAY, NVFLARE], sites=16, turns=5)
    bench.bar("in-process over plain, 16 sites", ratio(found, PER_SITE, PLAIN), 1.3, at_least=False)
    bench.bar("plain over vectorised, 16 sites", ratio(found, PLAIN, VECTORISED), 1, at_least=True)
    _memory_bar(bench, found, 16)
    for peer in (RAY, NVFLARE):
        name = f"{peer.name} over in-process, whole process, 16 sites"
        bench.bar(name, ratio(found, peer, PER_SITE, "process_s"), 10, at_least=True)
    said = [row["accuracy"] for row in found.values() if "accuracy" in row]
    bench.notes.append(f"final accuracies at 16 sites: {min(said)} to {max(said)}")
    found = bench.measure(few if quick else [*few, PFL], sites=100, turns=5)
    name = "in-process over plain, 100 sites"
    bench.bar(name, ratio(found, PER_SITE, PLAIN), 1.3, at_least=False)
    _memory_bar(bench, found, 100)
    many = [PLAIN, VECTORISED] if quick else [PLAIN, VECTORISED, PFL]
    found = bench.measure(many, sites=1000, turns=3)
    name = "plain over vectorised, 1,000 sites"
    bench.bar(name, ratio(found, PLAIN, VECTORISED), 5, at_least=True)


def _memory_bar(bench: Bench, found: dict[str, dict[str, Any]], sites: int) -> None:
    memory = [found[c.name].get("peak_mb", math.inf) for c in (PER_SITE, VECTORISED)]
    bench.bar(f"whole process, MB, {sites} sites", max(memory), 500, at_least=False)


def show_2(bench: Bench) -> None:
    """With privacy, at 100 sites: one batch a round, and an epoch of ten."""
    quick = bench.arguments.quick
    private = [OPACUS, PLAIN, VECTORISED_PRIVATE]
    if not quick:
        private += [PER_SITE_PRIVATE, PFL_PRIVATE]
    for model, size in (("logistic", 28), ("logistic", 320), ("mlp", 28), ("mlp", 320)):
        left_out = quick and (model, size) != ("mlp", 28)  # a minute is not enough for all
        found = (
            {}
            if left_out
            else bench.measure(private, sites=100, model=model, size=size, turns=_PAIRS[size])
        )
        label = f"{model}, 100 sites, {size} rows"
        value = ratio(found, OPACUS, VECTORISED_PRIVATE)
        bench.bar(f"opacus over vectorised private, {label}", value, 15, at_least=True)
        value = ratio(found, PLAIN, VECTORISED_PRIVATE)
        bench.bar(f"plain, not private, over vectorised private, {label}", value, 1, at_least=True)


def show_3(bench: Bench) -> None:
    """Time and memory over the number of sites, and the slope of their logarithms."""
    counts = [16, 1000] if bench.arguments.quick else [10, 100, 1000, 10_000]
    rows = [bench.measure([VECTORISED], sites=count)[VECTORISED.name] for count in counts]
    known = [(count, row) for count, row in zip(counts, rows, strict=True) if "round_ms" in row]
    logs = np.log([count for count, _ in known])
    for key, name in (
        ("round_ms", "time of a round"),
        ("process_s", "time of the whole process"),
        ("peak_mb", "memory"),
    ):
        slope = float(np.polyfit(logs, np.log([row[key] for _, row in known]), 1)[0])
        bench.bar(f"slope of log {name} over log sites", slope, 1.0, at_least=False)
    small, large = known[0][1]["peak_mb"], known[-1][1]["peak_mb"]
    each = (large - small) * 1024 / (known[-1][0] - known[0][0])
    bench.notes.append(f"memory grows by {each:.1f} KiB a site, of which data are 3.4 KiB")
    bench.bar("KiB a site beyond its data", each - _DATA_KIB, _MOST_BEYOND_DATA, at_least=False)
    _draw(known, bench)


def show_4(bench: Bench) -> None:
    """A study full of trouble ends, and its report says what happened to whom."""
    from simulation_checks import share_of_happenings_in_the_report

    share, counts = share_of_happenings_in_the_report()
    said = ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
    bench.notes.append(f"ten sites, twelve rounds: {said}")
    bench.bar("share of happenings that the report names", share, 1.0, at_least=True)


def _draw(known: list[tuple[int, dict[str, Any]]], bench: Bench) -> None:
    """Log-log, over three decades each; the dashed line is linear growth from the first point."""
    if bench.arguments.figure is None:
        return
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kinds = (
        ("round_ms", "milliseconds a round", 1),
        ("process_s", "seconds, whole process", 1),
        ("peak_mb", "MB, whole process", 100),
    )
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedward", "font.size": 9}):
        figure = Figure(figsize=(8.4, 2.9), layout="constrained")
        for number, (key, label, low) in enumerate(kinds):
            axes = figure.add_subplot(1, 3, number + 1)
            sites, values = [c for c, _ in known], [row[key] for _, row in known]
            linear = [values[0] * count / sites[0] for count in sites]
            axes.loglog(sites, linear, color="#9ca3af", linestyle="--", linewidth=1)
            axes.loglog(sites, values, color="#0f766e", marker="o")
            axes.set_ylim(low, low * 1000)
            axes.set_xlabel("sites")
            axes.set_title(label, fontsize=9)
            axes.grid(visible=True, which="major", color="#e5e7eb")
        figure.savefig(bench.arguments.figure, metadata={"Date": None})


def show_5(bench: Bench) -> None:
    """The same on a GPU."""
    import torch

    if not torch.cuda.is_available():
        bench.notes.append(
            "show 5: no GPU here; run with --show 5 --device cuda where there is one"
        )
        return
    bench.arguments.device = "cuda"
    for sites in (100, 1000, 10_000):
        bench.measure([VECTORISED, VECTORISED_PRIVATE, PFL], sites=sites)


SHOWS = {1: show_1, 2: show_2, 3: show_3, 4: show_4, 5: show_5}


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder that peers/setup.sh filled")
    parser.add_argument("--show", type=int, choices=sorted(SHOWS), action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="where show 3 draws, .svg or .png")
    bench = Bench(parser.parse_args())
    sys.path.insert(0, str(HERE))
    from fedward.simulations import startup

    startup.start()  # a second less
    for number in bench.arguments.show or (
        [1, 2, 3, 4] if bench.arguments.quick else sorted(SHOWS)
    ):
        SHOWS[number](bench)
    if bench.arguments.json:
        value = {"rows": bench.rows, "notes": bench.notes, "bars": bench.bars}
        print(json.dumps(value))
    else:
        print("\n".join(bench.notes))


if __name__ == "__main__":
    main()
