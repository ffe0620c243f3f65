"""The contract of a grid, held by the in-process one."""

from collections.abc import Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward.server.channel import FlowerChannel
from fedward.simulations.grid import InProcessGrid
from fedward.transport.payload import Payload, pack, unpack


def _echo_app() -> ClientApp:
    app = ClientApp()

    @app.train("double")
    def double(message: Message, context: Context) -> Message:
        payload = unpack(message.content, sender="coordinator")
        if context.node_config["broken"]:
            raise RuntimeError("out of memory")
        seen = context.state.setdefault("seen", ConfigRecord({"count": 0}))
        assert isinstance(seen, ConfigRecord)
        seen["count"] = int(str(seen["count"])) + 1
        record = {"partition": context.node_config["partition-id"], "count": seen["count"]}
        return Message(pack(Payload(record, {"x": payload.arrays["x"] * 2})), reply_to=message)

    return app


def _grid(broken: Iterable[int] = (), nodes: int = 4) -> InProcessGrid:
    broken = set(broken)
    configs = [{"partition-id": i, "broken": i in broken} for i in range(nodes)]
    return InProcessGrid(_echo_app(), configs)


def _ask(grid: InProcessGrid, nodes: Iterable[int]) -> list[Payload | str | None]:
    payload = Payload({}, {"x": np.arange(3, dtype=np.float32)})
    replies = FlowerChannel(grid).ask(
        "train.double", dict.fromkeys(nodes, payload), round_number=1, deadline=5
    )
    return [reply.payload or reply.problem for reply in replies]


def test_each_node_answers_with_its_own_configuration_and_in_order() -> None:
    grid = _grid()
    nodes = list(grid.get_node_ids())

    answers = _ask(grid, reversed(nodes))

    partitions = [a.record["partition"] for a in answers if isinstance(a, Payload)]
    assert partitions == [3, 2, 1, 0]
    assert all(isinstance(a, Payload) and a.arrays["x"].tolist() == [0, 2, 4] for a in answers)


def test_a_nodes_state_is_kept_between_messages_and_is_its_own() -> None:
    grid = _grid(nodes=2)
    first, second = grid.get_node_ids()
    _ask(grid, [first])

    answers = _ask(grid, [first, second])

    assert [a.record["count"] for a in answers if isinstance(a, Payload)] == [2, 1]


def test_a_node_that_raises_is_an_error_for_that_node_alone() -> None:
    grid = _grid(broken=[1])

    answers = _ask(grid, grid.get_node_ids())

    assert answers[1] == "RuntimeError: out of memory"
    assert [isinstance(a, Payload) for a in answers] == [True, False, True, True]


def test_a_node_that_is_not_there_is_an_error() -> None:
    assert "no node 99" in str(_ask(_grid(), [99])[0])


def test_what_one_node_does_to_its_message_does_not_reach_another() -> None:
    app = ClientApp()

    @app.query("spoil")
    def spoil(message: Message, context: Context) -> Message:
        del context
        count = len(message.content)
        message.content["extra"] = ConfigRecord({})
        return Message(pack(Payload({"count": count})), reply_to=message)

    grid = InProcessGrid(app, [{}, {}])
    shared = RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(2))})})
    messages = [Message(shared, node, "query.spoil") for node in grid.get_node_ids()]

    replies = list(grid.send_and_receive(messages))

    assert [unpack(r.content, sender="node").record["count"] for r in replies] == [1, 1]


def test_a_reply_is_given_once() -> None:
    grid = _grid()
    message = Message(pack(Payload({}, {"x": np.ones(1, np.float32)})), 2, "train.double")

    (identity,) = grid.push_messages([message])

    assert len(list(grid.pull_messages([identity]))) == 1
    assert list(grid.pull_messages([identity])) == []


def test_the_wire_is_at_fault_only_for_itself() -> None:
    with pytest.raises(ValueError, match="do not travel"):
        pack(Payload({}, {"x": np.array(["text"])}))
