"""The contract of a grid, held by the in-process one."""

import threading
import time
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from studies import EPSILON_4, NO_PRIVACY, write_study
from test_simulate import model_of

from fedward.server.channel import FlowerChannel
from fedward.simulations.grid import InProcessGrid
from fedward.simulations.simulate import prepare_run, simulate
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


def test_nodes_that_train_at_the_same_time_answer_in_order_each_once() -> None:
    app, together = ClientApp(), threading.Barrier(4, timeout=30)

    @app.train("meet")
    def meet(message: Message, context: Context) -> Message:
        together.wait()  # passes only if four are here at once
        return Message(pack(Payload({"partition": context.node_config["id"]})), reply_to=message)

    with closing(InProcessGrid(app, [{"id": i} for i in range(8)], threads=4)) as grid:
        nodes = list(grid.get_node_ids())
        replies = FlowerChannel(grid).ask(
            "train.meet", dict.fromkeys(nodes, Payload({})), round_number=1, deadline=30
        )
        said = [reply.payload and reply.payload.record["partition"] for reply in replies]

    assert said == list(range(8))


def test_what_is_not_training_is_one_node_after_the_other() -> None:
    app, inside = ClientApp(), threading.Semaphore(1)

    @app.query("alone")
    def alone(message: Message, context: Context) -> Message:  # noqa: ARG001 (Flower's names)
        assert inside.acquire(blocking=False)
        time.sleep(0.01)
        inside.release()
        return Message(pack(Payload({"site": "a"})), reply_to=message)

    with closing(InProcessGrid(app, [{}] * 6, threads=3)) as grid:
        asked = dict.fromkeys(grid.get_node_ids(), Payload({}))
        replies = FlowerChannel(grid).ask("query.alone", asked, round_number=1, deadline=30)
        assert [reply.problem for reply in replies] == [None] * 6


@pytest.mark.parametrize("privacy", [NO_PRIVACY, EPSILON_4], ids=["plain", "private"])
def test_a_study_gives_the_same_bits_on_any_number_of_threads(tmp_path: Path, privacy: str) -> None:
    models, spent = [], []
    for threads in (1, 3):
        lines = f"threads = {threads}\n"
        extra = (
            '[simulation]\nengine = "per-site"\npartition = "dirichlet"\n'
            "args = { num_sites = 9, alpha = 5.0 }\n" + lines
        )
        folder = tmp_path / str(threads)
        file = write_study(folder, rounds=3, privacy=privacy, extra=extra)
        run = prepare_run(file, folder / "run")
        metrics = simulate(file, run)
        models.append(model_of(run))
        spent.append({s: v.get("epsilon") for s, v in metrics["privacy"]["sites"].items()})
    np.testing.assert_array_equal(models[0], models[1])
    assert spent[0] == spent[1]
