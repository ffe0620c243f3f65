"""Sessions of secure aggregation side by side: one of all sites, or one for each group of them."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from fedward.core.errors import AggregationAborted, UpdateRejected
from fedward.privacy.secagg import CoordinatorSession

Names = tuple[str, ...]
Log = Callable[..., None]
Result = TypeVar("Result")


class Groups:
    """The sessions of one round by their sites, no site in two of them.

    A group that is void is left out and logged; with the last one the round is void.

    Args:
        sessions: By the names of their sites.
        round_number: The round of the run.
        first: The round's number in each session.
        log: Takes an event.
    """

    def __init__(
        self,
        sessions: Mapping[Names, CoordinatorSession],
        *,
        round_number: int,
        first: int,
        log: Log,
    ) -> None:
        self._sessions = dict(sessions)
        self._of = {name: session for names, session in sessions.items() for name in names}
        self._round_number, self.number, self._log = round_number, first, log
        self._missing: set[str] = set()

    def of(self, site: str) -> CoordinatorSession:
        """The session of a site's group. Raises `UpdateRejected` for a site of none."""
        if site not in self._of:
            raise UpdateRejected(site=site, reason="it is not on the coordinator's roster")
        return self._of[site]

    def each(self, step: Callable[[CoordinatorSession], Result]) -> dict[Names, Result]:
        """Take a step in every session that is not void.

        Raises:
            AggregationAborted: All are void.
        """
        results: dict[Names, Result] = {}
        for names, session in list(self._sessions.items()):
            try:
                results[names] = step(session)
            except AggregationAborted as error:
                del self._sessions[names]
                self._leave_out(names, error)
        return results

    def requests(self, step: Callable[[CoordinatorSession], dict[str, bytes]]) -> dict[str, bytes]:
        """As `each`, of a step that gives each site of a group a request."""
        return {site: data for part in self.each(step).values() for site, data in part.items()}

    def _leave_out(self, names: Names, error: AggregationAborted) -> None:
        self._missing.update(error.missing)
        if not self._sessions:
            raise AggregationAborted(
                round_number=self._round_number,
                missing=sorted(self._missing),
                threshold=error.threshold,
            ) from error
        self._log(
            "void group",
            round=self._round_number,
            site=", ".join(names),
            reason=f"{', '.join(error.missing)} did not answer; {error.threshold} sites are needed",
        )
