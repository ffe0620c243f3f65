"""Notices that the store serves another version, and swaps it in while requests go on."""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from fedward.core.errors import FedwardError, ReleaseRejected
from fedward.serving.catalogue import Catalogue
from fedward.serving.inbox import install_inbox
from fedward.serving.staging import Candidate
from fedward.serving.store import Store
from fedward.serving.trial import Trial, why_not_comparable


class Told(Protocol):
    """Is told of every swap, and of what could not be swapped."""

    def __call__(self, action: str, *, model: str, version: int, reason: str = "") -> None:
        """`action` is `shadow`, `canary`, `promoted` or `refused`."""


class Watcher:
    """Keeps a catalogue in step with a store.

    The store's `serving.json` changes in one step; what it names is verified and started in full
    before the catalogue changes, also in one step. Until then, and if it does not verify, the
    version that serves goes on serving.

    Args:
        store: The store.
        catalogue: What is served.
        told: Is told of every swap.
        also: What else is to be done at each look; from the same thread.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        told: Told,
        *,
        also: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._catalogue, self._told = store, catalogue, told
        self._also = also
        self._seen: tuple[int, int] | None = None
        self._seen_rollout: tuple[int, int] | None = None
        self._failed: dict[str, int] = {}
        self._one_at_a_time = threading.Lock()

    def look(self) -> None:
        """Install what waits in the inbox, and swap in what the store serves now. Blocks."""
        with self._one_at_a_time:
            self._also()
            install_inbox(self._store)
            stamp = self._stamp("serving.json")
            if stamp != self._seen:
                for name, served in self._store.served().items():
                    if self._version(name) != served.version:
                        self._swap(name, served.version)
                self._seen = stamp
                self._seen_rollout = None
            self._look_at_candidates()

    def _look_at_candidates(self) -> None:
        """Put candidates on trial, and act on what the trials say."""
        stamp = self._stamp("rollout.json")
        if stamp != self._seen_rollout:
            found = self._store.candidates() if stamp is not None else {}
            for name in self._catalogue.names():
                self._follow(name, found.get(name))
            self._seen_rollout = stamp
        for name in self._catalogue.names():
            trial = self._catalogue.trial(name)
            verdict = None if trial is None else trial.verdict()
            if trial is not None and verdict is not None:
                self._act(name, trial, verdict)

    def _follow(self, name: str, candidate: Candidate | None) -> None:
        trial = self._catalogue.trial(name)
        if candidate is None or candidate.stage == "failed":
            self._catalogue.end_trial(name)
        elif trial is None or trial.candidate.version != candidate.version:
            self._begin(name, candidate)
        elif trial.stage != candidate.stage:
            trial.next_stage(candidate)

    def _begin(self, name: str, candidate: Candidate) -> None:
        old = self._catalogue.get(name).engine
        try:
            new = self._store.load(name, candidate.version)
            reason = why_not_comparable(old.signature, new.signature)
        except FedwardError as error:
            reason = str(error)
        if reason is not None:
            self._fall_back(name, candidate.version, reason)
            return
        self._catalogue.begin_trial(Trial(candidate, old=old, new=new))
        self._told(candidate.stage, model=name, version=candidate.version)

    def _act(self, name: str, trial: Trial, reason: str) -> None:
        version = trial.candidate.version
        if reason:
            # First let go, then write: callers get the old version again at once.
            self._catalogue.end_trial(name)
            self._fall_back(name, version, reason)
            return
        try:
            stage = self._store.advance(name, version)
        except FedwardError as error:
            self._catalogue.end_trial(name)
            self._fall_back(name, version, str(error))
            return
        if stage is None:
            self._swap(name, version)
        else:
            trial.next_stage(trial.candidate.at(stage))
            self._told(stage, model=name, version=version)

    def _fall_back(self, name: str, version: int, reason: str) -> None:
        with contextlib.suppress(ReleaseRejected):  # a newer candidate has taken its place
            self._store.fall_back(name, version, reason=reason)
        self._told("refused", model=name, version=version, reason=reason)

    async def run(self, *, every: float) -> None:
        """Look again and again, off the event loop, until cancelled."""
        while True:
            await asyncio.sleep(every)
            try:
                await asyncio.to_thread(self.look)
            except (FedwardError, OSError) as error:
                print(f"the store cannot be read: {error}", file=sys.stderr, flush=True)

    def _swap(self, name: str, version: int) -> None:
        if self._failed.get(name) == version:
            return
        try:
            engine = self._store.load(name, version)
        except FedwardError as error:
            self._failed[name] = version
            self._told("refused", model=name, version=version, reason=str(error))
            return
        self._failed.pop(name, None)
        self._catalogue.promote(engine)
        self._told("promoted", model=name, version=version)

    def _version(self, name: str) -> int | None:
        if name not in self._catalogue.names():
            return None
        return self._catalogue.get(name).signature.version

    def _stamp(self, name: str) -> tuple[int, int] | None:
        try:
            status = (self._store.folder / name).stat()
        except FileNotFoundError:
            return None
        # A replaced file has another inode even within the clock's resolution.
        return status.st_ino, status.st_mtime_ns
