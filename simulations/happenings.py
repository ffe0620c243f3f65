"""What happened to whom in a run: its log, as a table, a picture and a few lines."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

KINDS = ("dropped", "late", "crashed", "attacked")
_SAID = {"dropped": "away", "late": "too late", "crashed": "crashed", "attacked": "attacked"}
_COLOURS = {
    "answered": "#99d5cd",
    "dropped": "#d1d5db",
    "late": "#f59e0b",
    "crashed": "#b91c1c",
    "attacked": "#7c3aed",
}
_ROUNDS_SHOWN = 8
_MOST_ROWS, _MOST_COLUMNS = 60, 200  # of the picture: sites and rounds
_LEFT, _TOP, _ROW, _WIDTH = 110, 46, 17, 660

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Happened:
    """A run's troubles.

    Attributes:
        sites: Everybody who took part, in order.
        rounds: By site and kind, the rounds in which it happened to the site.
        at_last: By site and round, what happened when the round was tried for the last time.
        away: By site, rounds in none of whose tries it was there.
        malicious: By site, its attack.
        void: Events of rounds that were void.
        lost: Rounds of secure aggregation that were open when the run stopped, and are void.
        crashes: Events of the coordinator's crashes.
        not_taken: By site, why it did not take the release.
        waited: Virtual seconds that all rounds took.
        last: The last round that ended.
    """

    sites: tuple[str, ...]
    rounds: Mapping[str, Mapping[str, Sequence[int]]]
    at_last: Mapping[tuple[str, int], str]
    away: Mapping[str, Sequence[int]]
    malicious: Mapping[str, str]
    void: tuple[Event, ...]
    lost: tuple[int, ...]
    crashes: tuple[Event, ...]
    not_taken: Mapping[str, str]
    waited: float
    last: int

    @classmethod
    def of(cls, events: Sequence[Event]) -> "Happened":
        """What a log says."""
        malicious = {
            site: str(event["attack"])
            for event in events
            if event["event"] == "malicious"
            for site in event["sites"]
        }
        ended = {event["round"] for event in events if event["event"] == "round"}
        tries = Counter(e["round"] for e in events if e["event"] == "void") + Counter(ended)
        rounds: dict[str, dict[str, list[int]]] = {site: {} for site in malicious}
        at_last: dict[tuple[str, int], str] = {}
        missed = Counter[tuple[str, int]]()
        for event in events:
            kind, number = event["event"], event.get("round")
            if kind == "void" and number in ended:
                at_last = {place: was for place, was in at_last.items() if place[1] != number}
            if kind not in KINDS:
                continue
            site = str(event["site"])
            found = rounds.setdefault(site, {}).setdefault(kind, [])
            if event["round"] not in found:
                found.append(event["round"])
            at_last[site, event["round"]] = kind
            missed[site, event["round"]] += kind == "dropped"
        away: dict[str, list[int]] = {}
        for (site, number), times in missed.items():
            if times >= max(1, tries[number]):
                away.setdefault(site, []).append(number)
        return cls(
            sites=tuple(sorted({e["site"] for e in events if e["event"] == "admitted"})),
            rounds=rounds,
            at_last=at_last,
            away=away,
            malicious=malicious,
            void=tuple(e for e in events if e["event"] == "void"),
            lost=_lost(events),
            crashes=tuple(e for e in events if e["event"] == "coordinator crashed"),
            not_taken={
                str(e["site"]): str(e["reason"])
                for e in events
                if e["event"] == "release not accepted"
            },
            waited=sum(e["virtual_seconds"] for e in events if e["event"] == "waited"),
            last=max((e["round"] for e in events if e["event"] == "round"), default=0),
        )

    def explains(self, event: Event) -> bool:
        """Whether a failure in the log is what was to happen."""
        if event["event"] == "aborted":
            return any(void["time"] >= event["time"] for void in self.void)
        found = self.rounds.get(str(event.get("site")), {})
        return any(event.get("round") in found.get(kind, ()) for kind in KINDS)

    @property
    def anything(self) -> bool:
        """Whether anything happened."""
        return bool(self.rounds or self.void or self.lost or self.crashes or self.waited)


def _lost(events: Sequence[Event]) -> tuple[int, ...]:
    opened = [event["round"] for event in events if event["event"] == "opened"]
    told = {event["round"] for event in events if event["event"] in {"round", "void"}}
    # The last one may still be going on.
    return tuple(number for number in opened[:-1] if number not in told)


def who(event: Event) -> str:
    """Whom an event is about: a site or, before it has said its name, a node; or nobody."""
    if event.get("site"):
        return str(event["site"])
    return f"node {event['node']}" if "node" in event else ""


def in_lines(happened: Happened) -> list[str]:
    """A line for each kind of thing that happened, for a terminal."""
    lines = []
    for kind in KINDS:
        sites = {site: len(found[kind]) for site, found in happened.rounds.items() if kind in found}
        if not sites:
            continue
        times, most = sum(sites.values()), max(sites, key=lambda site: sites[site])
        whose = f"{len(sites)} sites, {most} most often ({sites[most]} rounds)"
        if kind == "attacked" or len(sites) == 1:
            whose = ", ".join(sorted(sites)[:_ROUNDS_SHOWN])
        attacks = ", ".join(sorted(set(happened.malicious.values()))) if kind == "attacked" else ""
        said = f"{attacks} attack" if attacks else _SAID[kind]
        lines.append(f"{said}: {times} times, {whose}")
    if happened.void:
        counts = Counter(event["round"] for event in happened.void)
        lines.append(
            f"void: {len(happened.void)} times, for lack of sites, in rounds "
            + _shortened(sorted(counts))
        )
    lines += [line.lower() for line in _lost_in_words(happened)]
    lines += [f"coordinator: {event['reason']}" for event in happened.crashes]
    if happened.not_taken:
        site, why = next(iter(happened.not_taken.items()))
        lines.append(
            f"release not taken by {len(happened.not_taken)} of {len(happened.sites)} sites; "
            f"{site}: {why}"
        )
    if happened.waited:
        lines.append(f"waited: {happened.waited:.0f} virtual seconds, of which nobody waited")
    return lines


def _lost_in_words(happened: Happened) -> list[str]:
    if not happened.lost:
        return []
    which = _shortened(happened.lost)
    why = "a secure sum is not asked for twice, and who had reserved a round has paid for it"
    return [f"Lost: rounds {which}, open when the run stopped; {why}"]


def in_html(happened: Happened) -> str:
    """Picture, table and notes for a report; empty where nothing happened."""
    if not happened.anything:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("site", *KINDS, "role"))
    rows = "".join(
        f"<tr><td>{escape(site)}</td>"
        + "".join(f"<td>{_which(found.get(kind, ()))}</td>" for kind in KINDS)
        + f"<td>{escape(happened.malicious.get(site, 'honest'))}</td></tr>"
        for site, found in sorted(happened.rounds.items())
    )
    notes = [f"The coordinator: {event['reason']}." for event in happened.crashes]
    notes += [f"Round {e['round']} was void: {e['reason']}." for e in happened.void]
    notes += [f"{line}." for line in _lost_in_words(happened)]
    if happened.waited:
        notes.append(
            f"Rounds took {happened.waited:.0f} virtual seconds in all, of which nobody waited."
        )
    table = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
    if len(happened.rounds) > _MOST_ROWS:
        table = f"<details><summary>{len(happened.rounds)} sites</summary>{table}</details>"
    return (
        f'<h2>What happened to whom, in which rounds</h2><div class="panel">{_picture(happened)}'
        f'{table}</div><p class="small">{escape(chr(10).join(notes))}</p>'
    )


def _which(rounds: Sequence[int]) -> str:
    return f"{len(rounds)}: {_shortened(rounds)}" if rounds else "–"


def _shortened(rounds: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in rounds[:_ROUNDS_SHOWN])
    return f"{shown}{', …' if len(rounds) > _ROUNDS_SHOWN else ''}"


def _picture(happened: Happened) -> str:
    """A row a site and a column a round, as SVG; the first of each where there are many."""
    sites, last = happened.sites[:_MOST_ROWS], min(happened.last, _MOST_COLUMNS)
    if not sites or not happened.rounds or not last:
        return ""
    wide = min(16.0, (_WIDTH - _LEFT - 8) / last)
    gap = 1.0 if wide > 4 else 0.0  # noqa: PLR2004 (pixels)
    cells = []
    for row, site in enumerate(sites):
        y = _TOP + _ROW * row
        cells.append(
            f'<text x="{_LEFT - 8}" y="{y + 12}" text-anchor="end" fill="#1f2a37">'
            f"{escape(site)}</text>"
        )
        for number in range(1, last + 1):
            kind = happened.at_last.get((site, number), "answered")
            cells.append(
                f'<rect x="{_LEFT + wide * (number - 1):.1f}" y="{y + 1}" '
                f'width="{wide - gap:.1f}" height="{_ROW - 2}" fill="{_COLOURS[kind]}">'
                f"<title>{escape(site)}, round {number}: {kind}</title></rect>"
            )
    void = {event["round"] for event in happened.void}
    step = next(n for n in (1, 2, 5, 10, 20, 50) if n * wide >= 22)  # noqa: PLR2004 (pixels)
    for number in range(1, last + 1):
        x = _LEFT + wide * (number - 0.5)
        if number % step == 0:
            cells.append(
                f'<text x="{x:.1f}" y="{_TOP - 6}" text-anchor="middle" fill="#6b7280">'
                f"{number}</text>"
            )
        if number in void:
            cells.append(
                f'<circle cx="{x:.1f}" cy="{_TOP - 2}" r="1.8" fill="#b91c1c">'
                f"<title>round {number} was void</title></circle>"
            )
    height = _TOP + _ROW * len(sites) + 8
    return (
        f'<svg role="img" aria-label="what happened to each site in each round" '
        f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        f'font-family="sans-serif" font-size="11">'
        + "".join([*_legend(happened.at_last), *cells])
        + "</svg>"
    )


def _legend(states: Mapping[tuple[str, int], str]) -> list[str]:
    parts, x = [], _LEFT
    for kind in ("answered", *(kind for kind in KINDS if kind in states.values())):
        parts.append(
            f'<rect x="{x}" y="6" width="12" height="12" fill="{_COLOURS[kind]}"/>'
            f'<text x="{x + 17}" y="16" fill="#1f2a37">{kind}</text>'
        )
        x += 36 + 7 * len(kind)
    return parts
