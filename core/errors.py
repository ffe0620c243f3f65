"""What can go wrong in the world, as one tree.

`ValueError` is for a caller's mistake; these are for what the world did::

    FedwardError
    ├── ConfigError            a study or a site file is wrong: file, line, key, what is allowed
    ├── DataError              a data source is wrong: source, row or column, never a value
    ├── PrivacyError
    │   ├── BudgetExceeded     spent, asked, limit
    │   └── LedgerCorrupt      the ledger does not add up: where, and why
    ├── AdmissionRefused       which line of the site's policy says no
    ├── UpdateRejected         site and reason
    ├── AggregationAborted     round, who is missing, threshold
    ├── RunError               a run directory or its checkpoint cannot be used
    ├── SignatureInvalid       what does not verify
    ├── ReleaseRejected        which release, and why
    └── RegistryUnreachable    which registry, and what it answered

Messages say what was wrong, where, and what to do. They never hold a patient's data.
"""

from collections.abc import Collection, Sequence

_NAMED = 12


class FedwardError(Exception):
    """Anything that Fedward explains instead of printing a traceback."""


class ConfigError(FedwardError):
    """A study or a site file is wrong.

    Args:
        file: The file's path.
        problem: What was found and what is allowed.
        line: Line in the file, from 1, where known.
        key: The key as the user would write it, such as `[privacy] epsilon`.
    """

    def __init__(
        self, problem: str, *, file: str, line: int | None = None, key: str | None = None
    ) -> None:
        self.file, self.line, self.key, self.problem = file, line, key, problem
        where = file if line is None else f"{file}:{line}"
        super().__init__(f"{where}: {key} {problem}" if key else f"{where}: {problem}")


class DataError(FedwardError):
    """A data source cannot be used as it is.

    Args:
        problem: What was found and what is allowed, without any patient's value.
        source: The file or table.
        row: Row number as the user counts it (a CSV's header is row 1).
        column: The column's name.
    """

    def __init__(
        self, problem: str, *, source: str, row: int | None = None, column: str | None = None
    ) -> None:
        self.source, self.row, self.column, self.problem = source, row, column, problem
        where = source
        if row is not None:
            where += f", row {row}"
        if column is not None:
            where += f', column "{column}"'
        super().__init__(f"{where}: {problem}")


class PrivacyError(FedwardError):
    """A privacy guarantee cannot be given, so nothing was released."""


class BudgetExceeded(PrivacyError):
    """A release would take a site past its privacy budget. Nothing was recorded."""

    def __init__(self, *, spent: float, asked: float, limit: float) -> None:
        self.spent, self.asked, self.limit = spent, asked, limit
        super().__init__(
            f"this run would bring a patient's total to epsilon={asked:.3f}; {spent:.3f} of the "
            f"limit {limit:.3f} is spent; lower [privacy] epsilon in the study, or raise "
            "[policy] max_epsilon at the site"
        )


class LedgerCorrupt(PrivacyError):
    """A ledger does not verify: a row was changed, removed, reordered or rolled back."""


class AdmissionRefused(FedwardError):
    """A site's policy does not permit a study.

    Args:
        site: The site's name.
        policy: The line of the policy that says no, such as `[policy] min_sites = 3`.
        reason: What the study asks, and what to do.
    """

    def __init__(self, *, site: str, policy: str, reason: str) -> None:
        self.site, self.policy, self.reason = site, policy, reason
        super().__init__(f"site {site} refuses by {policy}: {reason}")


class UpdateRejected(FedwardError):
    """A site's message cannot be used."""

    def __init__(self, *, site: str, reason: str) -> None:
        self.site, self.reason = site, reason
        sender = "the coordinator" if site == "coordinator" else f"site {site}"
        super().__init__(f"message of {sender} rejected: {reason}")


class AggregationAborted(FedwardError):
    """A round is void: too few sites are left. The budget counts as spent."""

    def __init__(
        self, *, round_number: int, missing: Sequence[str], threshold: int, reason: str = ""
    ) -> None:
        self.round_number, self.missing, self.threshold = round_number, tuple(missing), threshold
        why = f" ({reason})" if reason else ""
        super().__init__(
            f"round {round_number} is void: {some_of(missing) or 'nobody'} did not answer{why} "
            f"and at least {threshold} sites are needed; see the run's events.jsonl, then "
            "continue with --resume"
        )


class RunError(FedwardError):
    """A run directory or its checkpoint cannot be used."""


class SignatureInvalid(FedwardError):
    """A signature or a digest does not verify."""


class ReleaseRejected(FedwardError):
    """A release may not be served.

    Args:
        release: The release's folder or name.
        reason: What was found, and what to do.
    """

    def __init__(self, *, release: str, reason: str) -> None:
        self.release, self.reason = release, reason
        super().__init__(f"release {release} rejected: {reason}")


class RegistryUnreachable(FedwardError):
    """A registry does not answer, or answers what it may not.

    Args:
        registry: Its address.
        reason: What was found, and what to do.
    """

    def __init__(self, *, registry: str, reason: str) -> None:
        self.registry, self.reason = registry, reason
        super().__init__(f"registry {registry}: {reason}")


def some_of(names: Collection[str]) -> str:
    """Names for an error, of which a thousand help nobody."""
    more = len(names) - _NAMED
    return ", ".join(list(names)[:_NAMED]) + (f" and {more} more" if more > 0 else "")
