"""A hospital's store: the releases that it verified, and which of them is served.

Layout::

    STORE/trusted.pem                   the publisher's public key, pinned at the first install
    STORE/releases/MODEL/VERSION/       a release, as verified, with its bundle
    STORE/serving.json                  model -> version served, version before, highest ever
    STORE/refused.jsonl                 what was refused, when and why
    STORE/waiting.json                  what waits for a person's approval; see `approval`
    STORE/rollout.json                  what comes into service in stages; see `staging`

A release is served only through `serving.json`, which is replaced in one step. A crash at any
point leaves the old version or the new one serving, never none and never half of one.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedward.core.errors import FedwardError, ReleaseRejected, SignatureInvalid
from fedward.core.files import sync_folder, write_atomic
from fedward.core.identity import PublicIdentity
from fedward.core.release import Release, read_release, write_verified
from fedward.serving.approval import (
    Waiting,
    needs_approval,
    record_decision,
    rollout_limits,
    waiting,
    write_waiting,
)
from fedward.serving.engine import Engine, start_engine
from fedward.serving.staging import Candidate, Limits, Stage, candidates, write_candidates


@dataclass(frozen=True, slots=True)
class Served:
    """What `serving.json` says of one model.

    Attributes:
        version: The version served.
        previous: The version served before it, to go back to; None at first.
        highest: The highest version ever installed: nothing at or below it is installed again.
    """

    version: int
    previous: int | None
    highest: int


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of verified releases.

    Args:
        folder: Made at the first install.
        limits: By which stages a release comes into service; by default as `policy.json` says.
    """

    folder: Path
    limits: Limits | None = None

    def install(self, release_folder: Path, trusted: PublicIdentity) -> Release:
        """Verify a release, keep a copy of what was verified, and serve it from now on.

        Where the hospital's policy asks for an approver, it waits for `decide` instead; where it
        asks for stages, it becomes a candidate. To install what is served, waits or is a candidate
        already changes nothing.

        Args:
            release_folder: Where the release is; it is only read.
            trusted: The publisher's public key. The first install pins it.

        Raises:
            SignatureInvalid: The signature or a digest does not verify, or the store trusts
                another publisher. Kept in `refused.jsonl`; nothing else changed.
            ReleaseRejected: The release is not what was signed, cannot be served, or is not newer
                than what was installed before. Kept in `refused.jsonl`; nothing else changed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            try:
                self._check_pin(trusted)
                release = read_release(release_folder, trusted)
                if self._serves(release) or self._waits(release) or self._staged(release):
                    return release
                self._check_newer(release)
                held, _ = needs_approval(self.folder), self._limits()
                start_engine(release)
            except FedwardError as error:
                self._refuse(release_folder, error)
                raise
            if not self._pin.exists():
                write_atomic(self._pin, trusted.pem())
            self._keep(release)
            if held:
                signature = release.signature
                entry = Waiting(signature.version, release.digest)
                write_waiting(self.folder, {**waiting(self.folder), signature.model: entry})
            else:
                self._begin(release)
        return release

    def decide(self, model: str, version: int, *, by: str, approve: bool) -> None:
        """Approve or decline the release that waits; approved, it is served from now on.

        Args:
            model: Which model.
            version: Which version; it must be the one that waits.
            by: Who decides, by name; kept in `approvals.jsonl`.
            approve: False declines it for good: it is not installed again.

        Raises:
            ReleaseRejected: No such version waits, or it no longer verifies.
            ValueError: Nobody is named.
        """
        if not by.strip():
            raise ValueError("an approval needs a name")
        with self._locked():
            entries = waiting(self.folder)
            entry = entries.get(model)
            if entry is None or entry.version != version or entry.declined:
                raise ReleaseRejected(
                    release=f"{model}/{version}", reason="it does not wait for approval"
                )
            if approve:
                release = self.load(model, version).release
                if release.digest != entry.digest:
                    raise ReleaseRejected(release=release.label, reason="it is another than waited")
            record_decision(self.folder, model=model, entry=entry, by=by, approved=approve)
            if approve:
                self._begin(release)
                del entries[model]
            else:
                entries[model] = replace(entry, declined=True)
            write_waiting(self.folder, entries)

    def candidates(self) -> dict[str, Candidate]:
        """What comes into service in stages, and what was sent back, by model.

        Raises:
            ReleaseRejected: `rollout.json` is malformed.
        """
        served = self.served()
        found = candidates(self.folder)
        # A crash between the promotion and the end of the candidate leaves one that serves.
        return {
            name: one
            for name, one in found.items()
            if name in served and one.version > served[name].highest
        }

    def advance(self, model: str, version: int, *, by: str = "") -> Stage | None:
        """Take a candidate to its next stage, or into service; with `by`, at once into service.

        Args:
            model: Which model.
            version: Which version; it must be the candidate.
            by: Who decides, by name, where a person does; kept in `approvals.jsonl`.

        Returns:
            The new stage; None if it serves now.

        Raises:
            ReleaseRejected: No such version is a candidate, or it no longer verifies.
        """
        with self._locked():
            entry = self._candidate(model, version)
            stage = None if by else entry.limits.after(entry.stage)
            if stage is not None:
                self._write_candidate(model, entry.at(stage))
                return stage
            release = self.load(model, version).release
            if release.digest != entry.digest:
                raise ReleaseRejected(release=release.label, reason="it is another than was tried")
            if by:
                decided = Waiting(version, entry.digest)
                record_decision(self.folder, model=model, entry=decided, by=by, approved=True)
            # In this order: after a crash in between, the candidate is the version that serves.
            self._promote(release)
            self._write_candidate(model, None)
        return None

    def fall_back(self, model: str, version: int, *, reason: str) -> None:
        """Send a candidate back for good; kept with the reason, and in `refused.jsonl`.

        Raises:
            ReleaseRejected: No such version is a candidate.
        """
        with self._locked():
            entry = self._candidate(model, version)
            self._write_candidate(model, entry.at("failed", reason=reason))
            self._refuse(
                self.path(model, version),
                ReleaseRejected(release=f"{model}/{version}", reason=reason),
            )

    def newest(self, model: str | None = None) -> Engine:
        """The release to serve, verified again and running.

        Args:
            model: Its name; None if the store has one model only.

        Raises:
            ReleaseRejected: The store is empty, or the release in it fails verification.
            SignatureInvalid: A stored file changed since it was installed.
        """
        served = self.served()
        if model is None and len(served) > 1:
            raise ReleaseRejected(
                release=str(self.folder), reason=f"name one of {', '.join(sorted(served))}"
            )
        name = model or next(iter(served), None)
        if name is None or name not in served:
            raise ReleaseRejected(
                release=str(self.folder), reason="the store has no such model; install a release"
            )
        return self.load(name, served[name].version)

    def load(self, model: str, version: int) -> Engine:
        """One installed release, verified again and running. Raises as `newest`."""
        release = read_release(self.path(model, version), self.trusted())
        if (release.signature.model, release.signature.version) != (model, version):
            # A folder moved to another version's place: signed, but not what it stands for.
            raise ReleaseRejected(
                release=str(self.path(model, version)), reason=f"it holds {release.label}"
            )
        return start_engine(release)

    def roll_back(self, model: str) -> Served:
        """Serve the version before, by an operator's decision.

        Raises:
            ReleaseRejected: There is none, or it no longer verifies.
        """
        with self._locked():
            served = self.served()
            if model not in served or served[model].previous is None:
                raise ReleaseRejected(release=model, reason="there is no version to go back to")
            now = served[model]
            self.load(model, now.previous or 0)
            back = Served(version=now.previous or 0, previous=now.version, highest=now.highest)
            self._write_served({**served, model: back})
        return back

    def served(self) -> dict[str, Served]:
        """What is served, by model. Raises `ReleaseRejected` if `serving.json` is malformed."""
        try:
            text = (self.folder / "serving.json").read_bytes()
        except FileNotFoundError:
            return {}
        try:
            return {name: _served(value) for name, value in json.loads(text).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ReleaseRejected(
                release=str(self.folder / "serving.json"), reason="malformed; install again"
            ) from error

    def trusted(self) -> PublicIdentity:
        """The pinned publisher. Raises `SignatureInvalid` if none is pinned."""
        try:
            return PublicIdentity.from_pem(self._pin.read_bytes())
        except OSError as error:
            raise SignatureInvalid(f"{self._pin} cannot be read; install a release") from error

    def path(self, model: str, version: int) -> Path:
        """Where an installed release is."""
        return self.folder / "releases" / model / str(version)

    @property
    def _pin(self) -> Path:
        return self.folder / "trusted.pem"

    def _check_pin(self, trusted: PublicIdentity) -> None:
        if self._pin.exists() and self.trusted().fingerprint != trusted.fingerprint:
            raise SignatureInvalid(
                f"the store trusts publisher {self.trusted().fingerprint[:16]} and not "
                f"{trusted.fingerprint[:16]}; if the publisher has a new key, make a new store"
            )

    def _serves(self, release: Release) -> bool:
        model, version = release.signature.model, release.signature.version
        served = self.served().get(model)
        if served is None or served.version != version:
            return False
        return read_release(self.path(model, version), self.trusted()).digest == release.digest

    def _waits(self, release: Release) -> bool:
        entry = waiting(self.folder).get(release.signature.model)
        if entry is None or release.signature.version > entry.version:
            return False
        if entry.declined or release.digest != entry.digest:
            raise ReleaseRejected(
                release=release.label, reason=f"version {entry.version} was declined or waits"
            )
        return True

    def _staged(self, release: Release) -> bool:
        entry = self.candidates().get(release.signature.model)
        if entry is None or release.signature.version > entry.version:
            return False
        if entry.stage == "failed" or release.digest != entry.digest:
            raise ReleaseRejected(
                release=release.label,
                reason=f"version {entry.version} is on trial, or failed it: {entry.reason}",
            )
        return True

    def _candidate(self, model: str, version: int) -> Candidate:
        entry = self.candidates().get(model)
        if entry is None or entry.version != version or entry.stage == "failed":
            raise ReleaseRejected(release=f"{model}/{version}", reason="it is no candidate")
        return entry

    def _write_candidate(self, model: str, entry: Candidate | None) -> None:
        entries = {name: one for name, one in self.candidates().items() if name != model}
        write_candidates(self.folder, entries if entry is None else {**entries, model: entry})

    def _limits(self) -> Limits | None:
        policy = rollout_limits(self.folder)
        return self.limits or policy

    def _check_newer(self, release: Release) -> None:
        model, version = release.signature.model, release.signature.version
        served = self.served().get(model)
        if served is not None and version <= served.highest:
            raise ReleaseRejected(
                release=release.label,
                reason=f"version {served.highest} was installed before; an older one is not "
                "installed again (an operator can roll back to the version before)",
            )

    def _keep(self, release: Release) -> None:
        target = self.path(release.signature.model, release.signature.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (*target.parent.glob(".*.tmp"), target):
            # Of a crash before the promotion: nothing serves it.
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        write_verified(temporary, release.files, release.bundle)
        temporary.rename(target)
        sync_folder(target.parent)

    def _begin(self, release: Release) -> None:
        """Serve a release, or put it on trial beside the one that serves.

        A newer candidate takes the place of an older one.
        """
        limits, model = self._limits(), release.signature.model
        stage = None if limits is None or model not in self.served() else limits.first
        if limits is None or stage is None:
            self._promote(release)
            return
        entry = Candidate(release.signature.version, release.digest, stage, limits)
        self._write_candidate(model, entry)

    def _promote(self, release: Release) -> None:
        model, version = release.signature.model, release.signature.version
        served = self.served()
        before = served.get(model)
        now = Served(
            version=version, previous=None if before is None else before.version, highest=version
        )
        self._write_served({**served, model: now})

    def _write_served(self, served: Mapping[str, Served]) -> None:
        value = {name: asdict(entry) for name, entry in sorted(served.items())}
        write_atomic(self.folder / "serving.json", json.dumps(value, indent=2))

    def _refuse(self, folder: Path, error: FedwardError) -> None:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "folder": str(folder),
            "error": type(error).__name__,
            "reason": str(error),
        }
        with (self.folder / "refused.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _served(value: Mapping[str, int | None]) -> Served:
    version, previous, highest = (value.get(key) for key in ("version", "previous", "highest"))
    if version is None or highest is None:
        raise ValueError("version or highest is missing")
    return Served(version=version, previous=previous, highest=highest)
