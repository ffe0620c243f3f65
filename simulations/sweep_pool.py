"""The processes of a sweep: a run each, and none that outlives the sweep."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path

Progress = Callable[[int, int, float | None], None]

_LOOK_EVERY = 1.0
_TAIL = 4096  # bytes of a log in which its newest round is looked for


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is to be done.

    Attributes:
        folder: Its run directory.
        text: Its study.
    """

    folder: Path
    text: str


def has_ended(folder: Path) -> bool:
    """Whether a run has all its results."""
    try:
        return "reported" in json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def run_jobs(
    study_file: Path,
    jobs: Sequence[Job],
    *,
    workers: int,
    progress: Progress | None,
    of: int,
) -> dict[str, str]:
    """Run all jobs, `workers` at a time.

    Args:
        study_file: Its folder is where paths in the study begin.
        jobs: What is to be done of the sweep's `of` runs.
        workers: Processes at a time.
        progress: As of `run_sweep`.
        of: Runs of the whole sweep.

    Returns:
        Why the runs that failed did, by folder name.
    """
    failed: dict[str, str] = {}
    if not jobs:
        return failed
    # Fresh interpreters: torch's threads and a ledger's connections do not survive a fork.
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_end_with_the_sweep,
    )
    with pool:
        futures = {pool.submit(run_job, study_file, job): job for job in jobs}
        clock = _Clock(jobs, before=of - len(jobs), of=of)
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=_LOOK_EVERY)
                for future in ended:
                    problem = _problem_of(future)
                    if problem is not None:
                        failed[futures[future].folder.name] = problem
                if progress is not None:
                    progress(*clock.look({futures[future] for future in waiting}))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()  # what it did is in its run's checkpoint
            raise
    return failed


def _problem_of(future: "Future[str | None]") -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return "a process of the sweep was killed; start it again to go on"


def _end_with_the_sweep() -> None:
    """Leave Ctrl-C to the sweep, and end when its process does, even if that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def run_job(study_file: Path, job: Job) -> str | None:
    """One run of a sweep, begun or gone on with. Returns why it failed, or None."""
    from fedward.simulations import startup

    startup.start()
    import torch

    from fedward.core.errors import FedwardError
    from fedward.core.run import RunDirectory
    from fedward.simulations.simulate import simulate

    torch.set_num_threads(1)
    try:
        if (job.folder / "study.toml").exists():
            run = RunDirectory.open(job.folder)
        else:
            run = RunDirectory.create(job.folder, study_text=job.text)
        simulate(study_file, run)
    except FedwardError as error:
        return f"{type(error).__name__}: {error}"
    return None


class _Clock:
    """How far a sweep is and how long it will take, at the rate so far."""

    def __init__(self, jobs: Sequence[Job], *, before: int, of: int) -> None:
        self._before, self._of = before, of
        # What an earlier try did says nothing of the rate.
        self._at_first = {job: share_done(job.folder) for job in jobs}
        self._first: tuple[float, float] | None = None

    def look(self, waiting: set[Job]) -> tuple[int, int, float | None]:
        """Runs done, of how many, and seconds left; None before anything was done.

        Runs under way count as far as they are, so that there is a rate before the first ends,
        and it knows how many cores there really are.
        """
        shares = {job: share_done(job.folder) if job in waiting else 1.0 for job in self._at_first}
        to_do = sum(1 - share for share in shares.values())
        done = sum(share - self._at_first[job] for job, share in shares.items())
        ended, now = self._before + len(shares) - len(waiting), time.monotonic()
        if self._first is None:
            # Starting processes, which is done once, is no part of the rate.
            self._first = (now, done) if done > 0 else None
            return ended, self._of, None if waiting else 0.0
        then, so_far = self._first
        left = (now - then) * to_do / (done - so_far) if done > so_far else None
        return ended, self._of, left if waiting else 0.0


def share_done(folder: Path) -> float:
    """How much of a run is done, in [0, 1), from its log; 0 before its first round."""
    try:
        with (folder / "events.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return 0.0
    for line in reversed(lines):
        try:
            event: Mapping[str, float | str] = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "round":
            return float(event["round"]) / (float(event["of"]) + 1)
    return 0.0
