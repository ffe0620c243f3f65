"""What is wrong with a request, as the status and the JSON that answer it."""

from collections.abc import Mapping
from typing import Any


class Problem(Exception):
    """A request that cannot be answered; the caller's doing, never a crash.

    Args:
        status: HTTP status, 4xx.
        error: What is wrong and what to do, in a sentence, without the value that was sent.
        field: The field that is wrong, where it is one.
        allowed: What that field may be.
        row: The row of a batch, from 0, where it is one.
        headers: HTTP headers that belong to the status.
    """

    def __init__(
        self,
        status: int,
        error: str,
        *,
        field: str | None = None,
        allowed: str | None = None,
        row: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.error = status, error
        self.field, self.allowed, self.row = field, allowed, row
        self.headers = dict(headers or {})
        super().__init__(error)

    def to_json(self) -> dict[str, Any]:
        """The answer's body; what is not known is left out."""
        facts = {
            "error": self.error,
            "field": self.field,
            "allowed": self.allowed,
            "row": self.row,
        }
        return {key: value for key, value in facts.items() if value is not None}
