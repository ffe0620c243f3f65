"""The job on Fedward, whole: study, admission, ledgers, rounds, evaluation, signed release."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedward.simulations import startup

startup.start()  # as the command line does

import job  # noqa: E402 (after the line above, which imports torch in its way)
import torch  # noqa: E402

STUDY = """\
[study]
name = "job"
task = "breast_cancer:TASK"
rounds = {rounds}
[model]
name = "{model}"
[training]
local_steps = {steps}
sample_rate = {rate}
learning_rate = {learning_rate}
[privacy]
{privacy}
[aggregation]
secure = false
min_sites = 2
[simulation]
dataset = "breast_cancer:DATASET"
partition = "temporal"
held_out = 0.0
args = {args}
engine = "{engine}"
device = "{device}"
"""


def main() -> None:
    """Run the job with the engine that is named; "private" adds DP-SGD at epsilon 8."""
    from fedward.core.run import RunDirectory
    from fedward.core.study import load_study
    from fedward.server import rounds
    from fedward.simulations.simulate import prepare_run, released_parameters, simulate
    from fedward.tasks.parameters import from_vector

    torch.set_num_threads(1)
    os.environ["FEDWARD_BENCHMARK_DATA"] = str(Path(sys.argv[1]) / "data.npz")
    settings = json.loads((Path(sys.argv[1]) / "job.json").read_text())
    engine, private = sys.argv[2], "private" in sys.argv[3:]
    device = "cuda" if "cuda" in sys.argv[3:] else "cpu"
    work = job.load(sys.argv[1])
    number, rows = len(work.sites), len(work.sites[0][1])
    work.sites.clear()  # Fedward reads the rows itself: what it holds of them is what is measured
    clock = job.Clock()
    one_round = rounds.save_checkpoint

    def lap(*arguments: Any, **options: Any) -> None:
        one_round(*arguments, **options)
        clock.lap()

    rounds.save_checkpoint = lap
    rate = min(1.0, work.batch / rows)
    size = settings_of(Path(sys.argv[1]))["size"]
    text = STUDY.format(
        rounds=settings["rounds"],
        model=settings["model"],
        steps=max(1, round(1 / rate)),
        rate=rate,
        learning_rate=settings["learning_rate"],
        privacy='mode = "local"\nunit = "patient"\nepsilon = 8.0'
        if private
        else 'mode = "none"\nacknowledge = "no privacy"',
        args=f"{{ num_sites = {number}, size = {size}, strength = 1.0 }}",
        engine=engine,
        device=device,
    )
    # Below the job's folder, which the benchmark removes: `fedward simulate` keeps a run, too.
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=sys.argv[1]))
    file = folder / "study.toml"
    file.write_text(text)
    run: RunDirectory = prepare_run(file, folder / "run")
    clock.lap()
    simulate(file, run)
    model = job.make_model(work)
    from_vector(model, released_parameters(run, load_study(file)))
    clock.wall, clock.cpu = clock.wall[1:], clock.cpu[1:]
    job.report(work, model, clock)


def settings_of(folder: Path) -> dict[str, int]:
    """How the benchmark partitioned the rows."""
    value: dict[str, int] = json.loads((folder / "partition.json").read_text())
    return value


if __name__ == "__main__":
    startup.run(main)  # as the command line does
