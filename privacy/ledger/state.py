"""What a ledger's entries add up to: a state machine without any input or output."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedward.core.errors import LedgerCorrupt
from fedward.privacy.accounting import Unit
from fedward.privacy.accounting.events import Leaves, inside_a_site, leaves_from_json
from fedward.privacy.ledger.records import POPULATIONS, Population

_UNITS: tuple[Unit, ...] = ("record", "patient", "site")


@dataclass(slots=True)
class StudyState:
    """One study's account, from its first allotment until it is closed, and again after that.

    Attributes:
        delta: Of the last allotment.
        rest: What is allotted and not yet reserved.
        reserved: All that was ever reserved.
        asked: What the first of the open allotments was for: the study's whole run.
        allotted: What all of them were for; more than that where a round was repeated.
    """

    population: Population
    unit: Unit
    delta: float
    allotments: list[int] = field(default_factory=list)
    asked: Leaves = field(default_factory=Counter)
    allotted: Leaves = field(default_factory=Counter)
    rest: Leaves = field(default_factory=Counter)
    reserved: Leaves = field(default_factory=Counter)
    open: bool = True


@dataclass(slots=True)
class ReservedRound:
    """One reservation; `update_digest` is empty until it is settled."""

    study: str
    round_number: int
    update_digest: str = ""


def borne(counted: Leaves, unit: Unit) -> Leaves:
    """What a patient bears of mechanisms that protect a unit: a ledger's totals are a patient's.

    Raises:
        ValueError: A mechanism samples whole sites, which has no price for a patient.
    """
    return inside_a_site(counted) if unit == "site" else counted


def holds(rest: Leaves, asked: Leaves) -> bool:
    """Whether what is asked is part of the rest."""
    for leaf, count in asked.items():  # noqa: SIM110 (a generator takes four times as long)
        if rest.get(leaf, 0) < count:
            return False
    return True


class State:
    """The accounts of a site, as of the last entry that was applied."""

    __slots__ = ("_of_round", "_spent", "_units", "genesis", "reservations", "studies")

    def __init__(self) -> None:
        self.genesis: dict[str, Any] = {}
        self.studies: dict[str, StudyState] = {}
        self.reservations: dict[int, ReservedRound] = {}
        self._of_round: dict[tuple[str, int], list[int]] = {}
        self._spent: defaultdict[Population, Leaves] = defaultdict(Counter)
        self._units: defaultdict[Population, set[Unit]] = defaultdict(set)

    def apply(self, body: dict[str, Any]) -> None:
        """Take one entry into account.

        Raises:
            LedgerCorrupt: The entries before it do not permit it. A ledger never writes such an
                entry, so the file was tampered with.
        """
        if (body["kind"] == "genesis") != (body["seq"] == 0):
            raise LedgerCorrupt(f"entry {body['seq']} is a {body['kind']}: not what stands there")
        try:
            self._RULES[body["kind"]](self, body)
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerCorrupt(f"entry {body['seq']} does not make sense: {error}") from error

    def newest_first(self, study: str, round_number: int) -> list[tuple[int, ReservedRound]]:
        """A round's reservations, by entry."""
        of_round = self._of_round.get((study, round_number))
        if of_round is None:
            return []
        return [(seq, self.reservations[seq]) for seq in reversed(of_round)]

    def spent(self, population: Population) -> Leaves:
        """All that was reserved on a population: its own, and what is charged to everybody.

        As a patient bears it, also where what was reserved protects more.

        Args:
            population: "training" or "held-out"; a patient is in one of them.
        """
        return self._spent[population] + self._spent["all"]

    def committed(self, population: Population) -> Leaves:
        """What was reserved, and what open allotments may still reserve; as a patient bears it."""
        rests = (
            borne(study.rest, study.unit)
            for study in self.studies.values()
            if study.open and study.population in (population, "all")
        )
        return sum(rests, self.spent(population))

    def unit(self, population: Population) -> Unit:
        """The unit that a population's total holds for: the smallest that was charged to it.

        What protects whole sites is counted as a patient of one bears it.
        """
        return "record" if "record" in self._units[population] | self._units["all"] else "patient"

    def _genesis(self, body: dict[str, Any]) -> None:
        self.genesis = body

    def _allot(self, body: dict[str, Any]) -> None:
        name, population, unit = body["study"], body["population"], body["unit"]
        if population not in POPULATIONS or unit not in _UNITS:
            raise ValueError(f"unknown population {population!r} or unit {unit!r}")
        study = self.studies.setdefault(name, StudyState(population, unit, body["delta"]))
        study.delta = body["delta"]
        if not study.open:
            study.open, study.population, study.unit = True, population, unit
        elif (study.population, study.unit) != (population, unit):
            raise ValueError(f"study {name} is open for another population or unit")
        event = leaves_from_json(body["event"])
        borne(event, unit)
        if study.allotments:
            study.allotted = study.allotted + event
        else:
            study.asked = study.allotted = event
        study.allotments.append(body["seq"])
        study.rest = study.rest + event

    def _reserve(self, body: dict[str, Any]) -> None:
        study = self._open(body["study"])
        event = leaves_from_json(body["event"])
        if not holds(study.rest, event):
            raise ValueError(f"study {body['study']} reserves more than it was allotted")
        rest, reserved, spent = study.rest, study.reserved, self._spent[study.population]
        for leaf, count in event.items():
            left = rest[leaf] - count
            if left:
                rest[leaf] = left
            else:
                del rest[leaf]
            reserved[leaf] = reserved.get(leaf, 0) + count
        for leaf, count in borne(event, study.unit).items():
            spent[leaf] = spent.get(leaf, 0) + count
        self._units[study.population].add(study.unit)
        number, seq = int(body["round"]), body["seq"]
        self.reservations[seq] = ReservedRound(body["study"], number)
        self._of_round.setdefault((body["study"], number), []).append(seq)

    def _settle(self, body: dict[str, Any]) -> None:
        reservation = self.reservations[body["reservation"]]
        if reservation.update_digest:
            raise ValueError(f"reservation {body['reservation']} is settled twice")
        if not body["update_digest"]:
            raise ValueError("an update has a digest")
        reservation.update_digest = body["update_digest"]

    def _close(self, body: dict[str, Any]) -> None:
        study = self._open(body["study"])
        study.open = False
        study.allotments.clear()
        study.asked, study.allotted, study.rest = Counter(), Counter(), Counter()

    def _open(self, name: str) -> StudyState:
        study = self.studies.get(name)
        if study is None or not study.open:
            raise ValueError(f"study {name} has no open allotment")
        return study

    # Of the class and not of each ledger, of which a simulation has thousands.
    _RULES: ClassVar[dict[str, Callable[["State", dict[str, Any]], None]]] = {
        "genesis": _genesis,
        "allot": _allot,
        "reserve": _reserve,
        "settle": _settle,
        "close": _close,
    }
