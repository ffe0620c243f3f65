"""The ledger of a site: what its patients' privacy has been spent on, and what may yet be."""

import math
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedward.core.errors import BudgetExceeded, ConfigError
from fedward.core.identity import Identity, PublicIdentity
from fedward.privacy.accounting import (
    DpEvent,
    PrivacySpent,
    Unit,
    event_to_json,
)
from fedward.privacy.accounting.events import Leaves, leaves, shared_json, shared_leaves
from fedward.privacy.accounting.pricing import best_epsilon, price
from fedward.privacy.ledger.journal import Journal
from fedward.privacy.ledger.records import (
    Allotment,
    Entry,
    Population,
    Reservation,
)
from fedward.privacy.ledger.state import StudyState, borne, holds
from fedward.privacy.ledger.verification import check_head, replay
from fedward.privacy.ledger.views import Point, entries, export, history


class Ledger:
    """A site's append-only, hash-chained and signed record of its privacy budget.

    A study is *allotted* what its whole run may spend, if the joint total of everything spent,
    everything that other open studies may still spend, and this, stays within the limit. Before
    each round it *reserves* the round's part, durably; after the update has left it *settles*.
    A reservation counts as spent whether it is settled or not, so a crash overstates the loss and
    never understates it. *Closing* a study gives back what it did not reserve.

    Safe between threads and between processes: every change is one exclusive transaction, which
    first takes in what others have written. Not to be carried over a fork.
    """

    def __init__(self, journal: Journal) -> None:
        """Use `Ledger.open` or `Ledger.read`."""
        self._journal = journal

    @classmethod
    def open(cls, path: Path | None, *, identity: Identity, site: str, simulated: bool) -> Self:
        """Open a site's ledger, or begin it.

        Args:
            path: The file, or None for a ledger in memory, which only a simulated site may have.
            identity: The site's Ed25519 identity; it signs every entry.
            site: The site's name.
            simulated: The site draws its noise from a seed. The ledger says so for good, and one
                kind of site cannot continue the ledger of the other.

        Raises:
            ConfigError: The ledger belongs to another site or key, or to a site of the other kind.
            LedgerCorrupt: The entries do not follow from one another.
            ValueError: A real site asked for a ledger in memory.
        """
        if path is None and not simulated:
            raise ValueError("the ledger of a real site needs a file; in memory it would be lost")
        journal = Journal(path, public=identity.public, identity=identity, durable=not simulated)
        try:
            journal.begin(site, simulated=simulated)
        except BaseException:
            journal.shut()
            raise
        return cls(journal)

    @classmethod
    def read(cls, path: Path, *, public: PublicIdentity) -> Self:
        """Open a ledger to look at it, without the site's private key.

        Raises:
            ConfigError: There is no such file.
            LedgerCorrupt: The entries do not follow from one another.
        """
        if not path.is_file():
            raise ConfigError("is no ledger; a site makes its own when it starts", file=str(path))
        journal = Journal(path, public=public, identity=None)
        with journal.current():
            return cls(journal)

    def __enter__(self) -> Self:
        """The ledger itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Shut the file."""
        self.shut()

    def shut(self) -> None:
        """Close the file; `close` closes a study."""
        self._journal.shut()

    @property
    def site(self) -> str:
        """The site whose ledger this is."""
        return str(self._journal.state.genesis["site"])

    @property
    def simulated(self) -> bool:
        """Whether noise was drawn from a seed, so that nothing here protected anybody."""
        return bool(self._journal.state.genesis["simulated"])

    @property
    def head(self) -> str:
        """Number and digest of the last entry, such as `12:9f...`.

        Give it to others (the coordinator keeps it, a release carries it): against it a ledger
        that was rolled back is found out.
        """
        with self._journal.current():
            return self._journal.head

    def allot(
        self,
        *,
        study: str,
        event: DpEvent,
        max_epsilon: float,
        delta: float,
        unit: Unit,
        population: Population = "training",
    ) -> Allotment:
        """Grant a study what its whole run may spend, or refuse and record nothing.

        Asking again for the same event while the study is open, extended or not, holds the total
        against the limit once more and returns the allotment that there is: nothing is granted
        twice. To grant a study more than before (a round has to be repeated), use `extend`.

        Args:
            study: The study's hash, or any name that is used for it throughout.
            event: All rounds of the run together.
            max_epsilon: The site's limit for one of its patients, over all studies, at `delta`.
            delta: As in the site's policy.
            unit: The unit of `event`. Where it is the site, the limit is held against what a
                patient of the site bears of it.
            population: Whose budget it draws on; see docs/privacy.md.

        Raises:
            BudgetExceeded: The joint total would be above the limit.
            ValueError: The study is open with another event, population or unit, or it samples
                whole sites.
        """
        asked = leaves(event)
        with self._journal.change():
            account = self._journal.state.studies.get(study)
            if account is None or not account.open:
                return self._grant(
                    study=study,
                    event=event,
                    max_epsilon=max_epsilon,
                    delta=delta,
                    unit=unit,
                    population=population,
                )
            if (account.asked, account.population, account.unit) != (asked, population, unit):
                raise ValueError(
                    f"study {study} has an open allotment for another event, population or unit; "
                    "close it first, or use extend"
                )
            total = self._within(population, Counter(), max_epsilon=max_epsilon, delta=delta)
            return Allotment(
                study=study,
                population=population,
                unit=unit,
                epsilon=total,
                max_epsilon=max_epsilon,
                delta=delta,
                seq=account.allotments[-1],
            )

    def extend(self, *, study: str, event: DpEvent, max_epsilon: float, delta: float) -> Allotment:
        """Grant an open study `event` on top of what it has. Raises as `allot`."""
        with self._journal.change():
            account = self._journal.state.studies.get(study)
            if account is None or not account.open:
                raise ValueError(f"study {study} has no open allotment to extend; allot first")
            return self._grant(
                study=study,
                event=event,
                max_epsilon=max_epsilon,
                delta=delta,
                unit=account.unit,
                population=account.population,
            )

    def reserve(self, *, study: str, round_number: int, event: DpEvent) -> Reservation:
        """Record that a round is about to be trained, before any patient is looked at.

        On disk when this returns. Each reservation permits one training: a round that is trained
        again, after a crash or a retry, needs another, which spends again. (A round whose update
        was settled and kept may be sent again without one: see `settled_digest`.)

        Args:
            study: A study with an open allotment.
            round_number: From 1.
            event: What the round spends: a part of the rest of the allotment.

        Raises:
            BudgetExceeded: The rest of the allotment is not enough. Nothing was recorded.
            ValueError: The study has no open allotment, or `event` is of a mechanism that was not
                allotted.
        """
        if round_number < 1:
            raise ValueError(f"round_number counts from 1, got {round_number}")
        asked = shared_leaves(event)
        with self._journal.change():
            account = self._journal.state.studies.get(study)
            if account is None or not account.open:
                raise ValueError(f"study {study} has no open allotment; allot first")
            if not holds(account.rest, asked):
                if not asked.keys() <= account.allotted.keys():
                    raise ValueError(
                        f"round {round_number} of study {study} runs a mechanism that its "
                        "allotment does not hold: the noise or the sample rate differs"
                    )
                raise self._exhausted(study, asked)
            seq = self._journal.append(
                "reserve",
                {"study": study, "round": round_number, "event": shared_json(event)},
            )
        return Reservation(study, round_number, seq)

    def settle(self, reservation: Reservation, *, update_digest: str) -> None:
        """Record which update left under a reservation. On disk when this returns.

        Settling again with the same digest changes nothing.

        Args:
            reservation: As `reserve` returned it.
            update_digest: SHA-256 of the update as it was sent, 64 hexadecimal digits.

        Raises:
            ValueError: There is no such reservation, or another update was settled under it: two
                trainings on one reservation.
        """
        if not update_digest:
            raise ValueError("an update has a digest")
        with self._journal.change():
            found = self._journal.state.reservations.get(reservation.seq)
            if found is None or (found.study, found.round_number) != (
                reservation.study,
                reservation.round_number,
            ):
                raise ValueError(f"no reservation {reservation.seq} of study {reservation.study}")
            if found.update_digest == update_digest:
                return
            if found.update_digest:
                raise ValueError(
                    f"round {found.round_number} of study {found.study} was settled with another "
                    "update: reserve again before training again"
                )
            self._journal.append(
                "settle", {"reservation": reservation.seq, "update_digest": update_digest}
            )

    def settled_digest(self, *, study: str, round_number: int) -> str | None:
        """The digest of the last update that a round was settled with, or None.

        A site that kept this update may send it again: it is the same release, and spends nothing.
        """
        with self._journal.current():
            for _, found in self._journal.state.newest_first(study, round_number):
                if found.update_digest:
                    return found.update_digest
        return None

    def unsettled(self, *, study: str, round_number: int) -> Reservation | None:
        """The newest reservation of a round that no update was settled with, or None."""
        with self._journal.current():
            for seq, found in self._journal.state.newest_first(study, round_number):
                if not found.update_digest:
                    return Reservation(study=study, round_number=round_number, seq=seq)
        return None

    def close(self, study: str, *, delta: float = 1e-5) -> PrivacySpent:
        """End a study: the rest of its allotment is free again.

        Returns:
            What the study's population has spent by now, at `delta`.

        Raises:
            ValueError: The study has no open allotment.
        """
        with self._journal.change():
            account = self._journal.state.studies.get(study)
            if account is None or not account.open:
                raise ValueError(f"study {study} has no open allotment to close")
            spent = self._price(account.population, delta)
            self._journal.append(
                "close", {"study": study, "delta": delta, "epsilon": _finite(spent.epsilon)}
            )
        return spent

    def spent(self, delta: float, *, population: Population = "training") -> PrivacySpent:
        """What one patient of a population has lost, over everything reserved, jointly."""
        with self._journal.current():
            return self._price(population, delta)

    def spent_by(self, study: str, delta: float) -> PrivacySpent:
        """What one study alone has cost its unit, over everything that it reserved.

        Raises:
            ValueError: The study was never allotted anything.
        """
        with self._journal.current():
            account = self._account(study)
            return price(account.reserved, delta=delta, unit=account.unit)

    def reserved(self, study: str) -> Leaves:
        """All that a study ever reserved, each mechanism as often as it may have run.

        Raises:
            ValueError: The study was never allotted anything.
        """
        with self._journal.current():
            return self._account(study).reserved.copy()

    def is_open(self, study: str) -> bool:
        """Whether a study may still spend."""
        with self._journal.current():
            account = self._journal.state.studies.get(study)
            return account is not None and account.open

    def entries(self) -> tuple[Entry, ...]:
        """All entries, oldest first, with the state that allotments and reservations are in."""
        with self._journal.current():
            return entries(self._journal.rows(), self._journal.state)

    def history(
        self, delta: float, *, population: Population = "training", points: int = 60
    ) -> tuple[Point, ...]:
        """The joint total over time, for a picture: about `points` of the reservations."""
        return history(self.entries(), delta=delta, population=population, points=points)

    def export(self) -> dict[str, Any]:
        """Everything, as a JSON value that `verify_export` checks without this file."""
        with self._journal.current():
            return export(self._journal.rows(), self._journal.state, self._journal.public)

    def verify(self, *, against_head: str | None = None) -> None:
        """Read everything again and check it: chain, signatures, rules and every epsilon.

        Args:
            against_head: A head that was seen before; a ledger that does not contain it was
                rolled back to an older copy, or replaced.

        Raises:
            LedgerCorrupt: Says which entry, and what is wrong with it.
        """
        known, rows = self._journal.head, self._journal.rows()
        replay(rows, self._journal.public)
        if not known.startswith("-1:"):
            check_head(rows, known)
        if against_head is not None:
            check_head(rows, against_head)

    def _account(self, study: str) -> StudyState:
        account = self._journal.state.studies.get(study)
        if account is None:
            raise ValueError(f"study {study} is not in this ledger")
        return account

    def _grant(
        self,
        *,
        study: str,
        event: DpEvent,
        max_epsilon: float,
        delta: float,
        unit: Unit,
        population: Population,
    ) -> Allotment:
        asked = borne(leaves(event), unit)
        total = self._within(population, asked, max_epsilon=max_epsilon, delta=delta)
        seq = self._journal.append(
            "allot",
            {
                "study": study,
                "population": population,
                "unit": unit,
                "event": event_to_json(event),
                "delta": delta,
                "max_epsilon": max_epsilon,
                "spent": _finite(self._worst(population, Counter(), delta, committed=False)),
                "epsilon": total,
            },
        )
        return Allotment(
            study=study,
            population=population,
            unit=unit,
            epsilon=total,
            max_epsilon=max_epsilon,
            delta=delta,
            seq=seq,
        )

    def _within(
        self, population: Population, asked: Leaves, *, max_epsilon: float, delta: float
    ) -> float:
        """The joint total with `asked`; raises `BudgetExceeded` if it is above the limit."""
        total = self._worst(population, asked, delta, committed=True)
        if not total <= max_epsilon:
            spent = self._worst(population, Counter(), delta, committed=False)
            raise BudgetExceeded(spent=spent, asked=total, limit=max_epsilon)
        return total

    def _worst(
        self, population: Population, asked: Leaves, delta: float, *, committed: bool
    ) -> float:
        """Joint epsilon with `asked`, of the population that bears most."""
        view = self._journal.state.committed if committed else self._journal.state.spent
        return max(best_epsilon(view(side) + asked, delta=delta) for side in sides(population))

    def _price(self, population: Population, delta: float) -> PrivacySpent:
        prices = [
            price(self._journal.state.spent(side), delta=delta, unit=self._journal.state.unit(side))
            for side in sides(population)
        ]
        return max(prices, key=lambda spent: spent.epsilon)

    def _exhausted(self, study: str, asked: Leaves) -> BudgetExceeded:
        """Why a reservation does not fit: the study's own figures, at the allotment's delta."""
        account = self._journal.state.studies[study]
        used = account.allotted - account.rest

        def epsilon(counted: Leaves) -> float:
            return best_epsilon(borne(counted, account.unit), delta=account.delta)

        return BudgetExceeded(
            spent=epsilon(used), asked=epsilon(used + asked), limit=epsilon(account.allotted)
        )


def sides(population: Population) -> tuple[Population, ...]:
    """The populations whose patients bear what is charged to `population`."""
    return ("training", "held-out") if population == "all" else (population,)


def _finite(epsilon: float) -> float | None:
    """An epsilon as JSON: null where there is no bound."""
    return epsilon if math.isfinite(epsilon) else None
