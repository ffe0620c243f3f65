"""How the round loop talks to sites, with Flower's grid behind it.

The loop knows nodes, payloads and replies; whether a site is an object in this process, a Ray
actor or a hospital is the grid's affair.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedward.core.errors import UpdateRejected
from fedward.transport.payload import Payload, pack, unpack

_FIRST_WAIT, _LONGEST_WAIT = 0.001, 0.25


class Reply(NamedTuple):
    """What one node answered: a payload, or why there is none.

    Attributes:
        node_id: The node.
        payload: Its answer.
        problem: Why there is none.
        lost: There is none because a process or the network failed, not because the site refused.
    """

    node_id: int
    payload: Payload | None
    problem: str | None = None
    lost: bool = False


class Channel(Protocol):
    """Asks nodes and yields their replies."""

    def node_ids(self) -> list[int]:
        """The nodes that are connected now, in a fixed order."""
        ...

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """Send each node its payload; yield one reply for each, in the payloads' order."""
        ...


class FlowerChannel:
    """A `Channel` over a Flower grid.

    It polls the grid itself: `send_and_receive` waits three seconds between looks.

    Args:
        grid: The grid.
        pack: How payloads become Flower's records.
        ended: Whether nobody answers any more, so that there is nothing to wait for.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        pack: Callable[[Payload], RecordDict] = pack,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid, self._pack, self._ended = grid, pack, ended

    def node_ids(self) -> list[int]:
        """The nodes that are connected now, sorted."""
        return sorted(self._grid.get_node_ids())

    def ask(
        self, kind: str, payloads: Mapping[int, Payload], *, round_number: int, deadline: float
    ) -> Iterator[Reply]:
        """Send and wait, `deadline` seconds at the most; a node that is late has a problem.

        Replies are yielded in the payloads' order, so that arithmetic on them is the same on
        every runtime; one that is early waits for its turn.
        """
        nodes = list(payloads)
        packed: dict[int, RecordDict] = {}
        for payload in payloads.values():
            if id(payload) not in packed:  # most often, all nodes are sent the same
                packed[id(payload)] = self._pack(payload)
        messages = [
            Message(
                content=packed[id(payloads[node])],
                dst_node_id=node,
                message_type=kind,
                group_id=str(round_number),
                ttl=deadline,
            )
            for node in nodes
        ]
        waiting = dict(zip(self._grid.push_messages(messages), nodes, strict=True))
        early: dict[int, Reply] = {}
        turn = 0
        for reply in self._arrivals(waiting, until=time.monotonic() + deadline):
            early[reply.node_id] = reply
            while turn < len(nodes) and nodes[turn] in early:
                yield early.pop(nodes[turn])
                turn += 1
        for node in nodes[turn:]:
            late = Reply(node, None, f"no answer within {deadline:g} s", lost=True)
            yield early.pop(node, late)

    def _arrivals(self, waiting: dict[str, int], *, until: float) -> Iterator[Reply]:
        wait = _FIRST_WAIT
        while waiting:
            arrived: Iterable[Message] = self._grid.pull_messages(list(waiting))
            count = 0
            for message in arrived:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    count += 1
                    yield _read(message, node)
            if count:
                wait = _FIRST_WAIT
            elif time.monotonic() >= until or self._ended():
                return
            else:
                time.sleep(wait)
                wait = min(wait * 1.5, _LONGEST_WAIT)


def _read(message: Message, node: int) -> Reply:
    if message.has_error():
        reason = message.error.reason or f"error {message.error.code}"
        return Reply(node, None, reason.strip().splitlines()[-1][:500], lost=True)
    try:
        payload = unpack(message.content, sender=f"node {node}")
    except UpdateRejected as error:
        return Reply(node, None, error.reason)
    refused = payload.record.get("refused")
    if refused is not None:
        return Reply(node, None, str(refused)[:1000])
    return Reply(node, payload)
