"""What the adapter counts, as Prometheus text: base units, and never a patient in a label."""

import bisect
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping

_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """Counters of one adapter. Used from the event loop only."""

    def __init__(self) -> None:
        self.started = time.time()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._seconds: dict[str, list[int]] = {}
        self._total_seconds: dict[str, float] = defaultdict(float)
        self._rows: dict[tuple[str, int], int] = defaultdict(int)
        self._refused: dict[tuple[str, str], int] = defaultdict(int)
        self._swaps: dict[tuple[str, str], int] = defaultdict(int)
        self._feedback: dict[tuple[str, str], int] = defaultdict(int)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request was answered. `route` is one of the adapter's own, never a path as sent."""
        self._requests[route, status] += 1
        counts = self._seconds.get(route)
        if counts is None:
            counts = self._seconds[route] = [0] * (len(_BUCKETS) + 1)
        counts[bisect.bisect_left(_BUCKETS, seconds)] += 1
        self._total_seconds[route] += seconds

    def predicted(self, model: str, version: int, rows: int) -> None:
        """Rows were predicted."""
        self._rows[model, version] += rows

    def refused(self, model: str, field: str) -> None:
        """A field's value was not allowed. `field` is one of the model's own."""
        self._refused[model, field] += 1

    def swapped(self, model: str, action: str) -> None:
        """A version was promoted or refused."""
        self._swaps[model, action] += 1

    def told(self, model: str, outcome: str) -> None:
        """A clinician accepted or overrode a card."""
        self._feedback[model, outcome] += 1

    def requests(self) -> int:
        """All requests that were answered."""
        return sum(self._requests.values())

    def text(self, gauges: Iterable[tuple[str, Mapping[str, str], float]] = ()) -> str:
        """The exposition format.

        Args:
            gauges: Name (without prefix), labels and value of what others measure.
        """
        lines = [
            "# TYPE fedward_requests_total counter",
            *(
                _sample("requests_total", {"route": route, "status": str(status)}, count)
                for (route, status), count in sorted(self._requests.items())
            ),
            "# TYPE fedward_request_seconds histogram",
        ]
        for route, counts in sorted(self._seconds.items()):
            running = 0
            for bound, count in zip((*map(str, _BUCKETS), "+Inf"), counts, strict=True):
                running += count
                labels = {"route": route, "le": bound}
                lines.append(_sample("request_seconds_bucket", labels, running))
            lines.append(_sample("request_seconds_count", {"route": route}, running))
            total = self._total_seconds[route]
            lines.append(_sample("request_seconds_sum", {"route": route}, total))
        lines.append("# TYPE fedward_predicted_rows_total counter")
        for (model, version), rows in sorted(self._rows.items()):
            which = {"model": model, "version": str(version)}
            lines.append(_sample("predicted_rows_total", which, rows))
        lines.append("# TYPE fedward_refused_values_total counter")
        for (model, field), count in sorted(self._refused.items()):
            lines.append(_sample("refused_values_total", {"model": model, "field": field}, count))
        lines.append("# TYPE fedward_swaps_total counter")
        for (model, action), count in sorted(self._swaps.items()):
            lines.append(_sample("swaps_total", {"model": model, "action": action}, count))
        lines.append("# TYPE fedward_cds_feedback_total counter")
        for (model, outcome), count in sorted(self._feedback.items()):
            labels = {"model": model, "outcome": outcome}
            lines.append(_sample("cds_feedback_total", labels, count))
        lines.append("# TYPE fedward_start_time_seconds gauge")
        lines.append(_sample("start_time_seconds", {}, self.started))
        named = ""
        for name, inside, value in sorted(gauges, key=lambda gauge: gauge[0]):
            if name != named:
                lines.append(f"# TYPE fedward_{name} gauge")
                named = name
            lines.append(_sample(name, inside, value))
        return "\n".join(lines) + "\n"


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
    return f"fedward_{name}{{{inside}}} {value:.10g}" if inside else f"fedward_{name} {value:.10g}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
