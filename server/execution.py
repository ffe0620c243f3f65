"""One execution of a study: what the round loop and its end share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedward.core.run import RunDirectory
from fedward.core.study import Study
from fedward.server.channel import Channel, Reply
from fedward.server.members import Member
from fedward.tasks.task import Task
from fedward.transport.payload import Payload


@dataclass(frozen=True, slots=True)
class Execution:
    """A study under way with the sites that admitted it.

    Attributes:
        deadline: Seconds that a site has for one answer.
        roster_size: Sites in the consortium; 0 where the study needs no roster.
        durable: As in `Settings`.
    """

    channel: Channel
    study: Study
    run: RunDirectory
    task: Task
    members: tuple[Member, ...]
    deadline: float
    roster_size: int = 0
    durable: bool = True

    def ask_all(
        self, kind: str, payload: Payload, *, round_number: int
    ) -> Iterator[tuple[Member, Reply]]:
        """Send every member the same payload; yield member and reply, sorted by site."""
        payloads = {member.site: payload for member in self.members}
        return self.ask_each(kind, payloads, round_number=round_number)

    def ask_each(
        self, kind: str, payloads: Mapping[str, Payload], *, round_number: int
    ) -> Iterator[tuple[Member, Reply]]:
        """Send the named sites a payload each; yield member and reply, sorted by site."""
        asked = [member for member in self.members if member.site in payloads]
        replies = self.channel.ask(
            kind,
            {member.node_id: payloads[member.site] for member in asked},
            round_number=round_number,
            deadline=self.deadline,
        )
        return zip(asked, replies, strict=True)
