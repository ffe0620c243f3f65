"""A Flower grid inside this process: the same apps, no Ray, nothing serialised.

What crosses no process border is not copied either: an Array's buffer is immutable bytes, and
each site gets containers of its own around it.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedward.transport.payload import InMemory

NodeConfig = Mapping[str, str | int | float | bool]

_TASK_ID = 1
_AT_ONCE = 64
_TRAIN = "train"


class InProcessGrid(Grid):
    """Runs a ClientApp here, one message at a time, in the order in which they were pushed.

    Node ids are 2, 3, … in the order of `node_configs`, so that runs repeat.

    Args:
        client_app: The app that every node runs.
        node_configs: One configuration a node, as `--node-config` gives a SuperNode.
        run_config: What `--run-config` gives.
        threads: How many nodes train at a time. It pays where most of the work is in large
            operations, which let other threads run; replies and their order stay the same. The
            client app must be safe for it: each node's messages are still one after the other.
    """

    def __init__(
        self,
        client_app: ClientApp,
        node_configs: Sequence[NodeConfig],
        *,
        run_config: NodeConfig | None = None,
        threads: int = 1,
    ) -> None:
        self._client_app = client_app
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._run = Run.create_empty(1)
        self._run.override_config = dict(run_config or {})
        # `Message(...)` reads these globals of the process (flwr 1.41).
        TaskIdentity.run_id = self._run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID
        TaskIdentity.task_id = _TASK_ID
        self._contexts = {
            SUPERLINK_NODE_ID + 1 + number: Context(
                self._run.run_id,
                SUPERLINK_NODE_ID + 1 + number,
                dict(config),
                RecordDict(),
                dict(run_config or {}),
            )
            for number, config in enumerate(node_configs)
        }
        self._ids = itertools.count(1)
        self._waiting: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Take another run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as older Flower code does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes: they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages in; each is answered when its reply is pulled."""
        identities = []
        for message in messages:
            identity = str(next(self._ids))
            # Flower's own in-memory grid sets this private field in the same way.
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = message
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer the first of these messages that wait, and reply in the order asked for.

        A few at a time, so that memory does not hold a reply of every site at once.
        """
        found = (self._waiting.pop(identity, None) for identity in list(message_ids))
        waiting = itertools.islice((message for message in found if message is not None), _AT_ONCE)
        replies = []
        for reply in self._answers(list(waiting)):
            if not reply.has_error():
                reply.metadata.__dict__["_message_id"] = str(next(self._ids))
            replies.append(reply)
        return replies

    def _answers(self, messages: Sequence[Message]) -> Iterable[Message]:
        nodes = {message.metadata.dst_node_id for message in messages}
        training = all(m.metadata.message_type.startswith(_TRAIN) for m in messages)
        if self._pool is None or not training or len(nodes) < len(messages):
            return map(self._answer, messages)
        return self._pool.map(self._answer, messages)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull all; `timeout` is not needed where every answer is immediate."""
        del timeout
        waiting = list(self.push_messages(messages))
        replies: list[Message] = []
        while len(replies) < len(waiting):
            replies.extend(self.pull_messages(waiting))
        return replies

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        context = self._contexts.get(node_id)
        if context is None:
            reason = f"there is no node {node_id}"
            return _error(message, ErrorCode.NODE_UNAVAILABLE, reason)
        if not isinstance(message.content, InMemory):
            message.content = RecordDict(
                {
                    name: record if isinstance(record, ConfigRecord) else record.copy()
                    for name, record in message.content.items()
                }
            )
        try:
            reply = self._client_app(message, context)
        except Exception as error:  # noqa: BLE001 (what any app raises becomes its node's error)
            reason = f"{type(error).__name__}: {error}"
            return _error(message, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        return reply


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=message)
