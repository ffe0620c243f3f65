"""A bar a site, written as SVG by hand: drawing it takes less time than importing a library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_INK, _MUTED, _GRID = "#1f2a37", "#6b7280", "#e5e7eb"
_COLOURS = ("#9ca3af", "#0f766e", "#b45309", "#7c3aed")
_WIDTH, _HEIGHT = 660, 270
_LEFT, _RIGHT, _TOP, _FLOOR = 52, 8, 34, 205  # of the plot, in pixels from the top left
_NAMED, _LEVEL = 30, 8  # sites whose names fit below their bars, and fit without turning
_MARKS = 5


def sites_by_class(counts: Mapping[str, Mapping[str, int]], *, label: str) -> str:
    """An SVG picture: a bar's height is the site's number of patients, its parts the classes.

    Args:
        counts: By site, patients by class; the same classes at every site.
        label: What the classes are of.
    """
    classes = list(next(iter(counts.values()), {}))
    most = max((sum(site.values()) for site in counts.values()), default=0)
    marks = _marks(most)
    parts = [*_scale(marks), *_bars(counts, classes, top=marks[-1]), *_legend(classes, label)]
    return (
        f'<svg role="img" aria-label="patients of each site by class" '
        f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" font-family="sans-serif" font-size="12">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _marks(most: int) -> list[int]:
    """Round numbers from 0 to the first that is not below `most`."""
    rough = max(1.0, most / _MARKS)
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [step * n for n in range(max(1, math.ceil(most / step)) + 1)]


def _scale(marks: Sequence[int]) -> list[str]:
    lines = []
    for mark in marks:
        y = _FLOOR - (_FLOOR - _TOP) * mark / marks[-1]
        lines.append(
            f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{_INK}">{mark}</text>'
        )
    middle = (_TOP + _FLOOR) / 2
    lines.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle" '
        f'fill="{_MUTED}">patients</text>'
    )
    return lines


def _bars(
    counts: Mapping[str, Mapping[str, int]], classes: Sequence[str], *, top: int
) -> list[str]:
    lines = []
    room = (_WIDTH - _LEFT - _RIGHT) / max(1, len(counts))
    for number, (site, by_class) in enumerate(counts.items()):
        x, floor = _LEFT + room * (number + 0.1), float(_FLOOR)
        for place, name in enumerate(classes):
            height = (_FLOOR - _TOP) * by_class[name] / top
            floor -= height
            colour = _COLOURS[place % len(_COLOURS)]
            lines.append(
                f'<rect x="{x:.1f}" y="{floor:.1f}" width="{room * 0.8:.1f}" '
                f'height="{height:.1f}" fill="{colour}"><title>{escape(site)}: '
                f"{by_class[name]}</title></rect>"
            )
        if len(counts) <= _NAMED:
            level = len(counts) <= _LEVEL
            turn = "" if level else " rotate(-45)"
            lines.append(
                f'<text transform="translate({x + room * 0.4:.1f} {_FLOOR + 16}){turn}" '
                f'text-anchor="{"middle" if level else "end"}" fill="{_MUTED}">'
                f"{escape(site)}</text>"
            )
    if len(counts) > _NAMED:
        lines.append(
            f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_FLOOR + 20}" text-anchor="middle" '
            f'fill="{_MUTED}">sites</text>'
        )
    return lines


def _legend(classes: Sequence[str], label: str) -> list[str]:
    lines, x = [], float(_LEFT)
    for place, name in enumerate(classes):
        said = f"{label} {name}"
        lines.append(
            f'<rect x="{x:.0f}" y="8" width="12" height="12" '
            f'fill="{_COLOURS[place % len(_COLOURS)]}"/>'
            f'<text x="{x + 18:.0f}" y="18" fill="{_INK}">{escape(said)}</text>'
        )
        x += 40 + 7 * len(said)
    return lines
