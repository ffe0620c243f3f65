"""The shorter way of an inference request answers as the longer one, on any connection."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from release_samples import SIGNATURE, publish_sample, sigmoid_of, valid_inputs
from serving_client import adapter

from fedward.core.identity import Identity
from fedward.core.release import read_release
from fedward.serving import oip
from fedward.serving.audit import read_log, verify_log
from fedward.serving.catalogue import Catalogue
from fedward.serving.engine import start_engine
from fedward.serving.gate import add_key
from fedward.serving.guard import Guard
from fedward.serving.problems import Problem
from fedward.serving.quick import MOST_BYTES
from fedward.serving.routes import infer_now, infer_parts
from fedward.serving.service import Service
from fedward.serving.staging import Candidate, Limits
from fedward.serving.store import Store
from fedward.serving.trial import Trial

_IDENTITY = Identity.generate_publisher()
# Forces the longer way, and changes nothing else.
_LONG = "Connection: keep-alive\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder = tmp_path_factory.mktemp("quick")
    store = Store(folder / "store")
    store.install(publish_sample(folder / "registry", _IDENTITY), _IDENTITY.public)
    with adapter(store.folder, folder / "ready.json") as (address, _):
        yield int(address.rpartition(":")[2])


def _body(rows: Any = ((63, 1, 240, 0),), **more: Any) -> bytes:
    array = np.asarray(rows, np.float32)
    data = [None if np.isnan(v) else float(v) for v in array.ravel()]
    tensor = {"name": "input", "datatype": "FP32", "shape": list(array.shape), "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def _request(body: bytes, head: str = "", path: str = "/v2/models/tiny/infer") -> bytes:
    start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{head}\r\n"
    return start.encode() + body


def _read(connection: socket.socket, answers: int) -> list[tuple[int, dict[str, str], bytes]]:
    """So many answers, one after the other."""
    file, found = connection.makefile("rb"), []
    for _ in range(answers):
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name] = value
        found.append((status, headers, file.read(int(headers.get("content-length", "0")))))
    return found


def _ask(port: int, *pieces: bytes, answers: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        return _read(connection, answers)


@pytest.mark.parametrize(
    "body",
    [
        _body(),
        _body(valid_inputs(7)),
        _body(id="r1"),
        _body(parameters={"binary_data_output": True}),
        _body(((17, 1, 240, 0),)),
        _body(((63, 1, 240),)),
        b"",
        b"{}",
        b"\xff",
        b"[" * 5000,
        _body(valid_inputs(600)),
    ],
)
def test_both_ways_answer_alike(port: int, body: bytes) -> None:
    (quick,) = _ask(port, _request(body))
    (slow,) = _ask(port, _request(body, _LONG))

    assert quick == slow
    assert quick[0] in (200, 400, 422)


def test_the_answer_is_the_models(port: int) -> None:
    inputs = valid_inputs(5)
    ((status, _, body),) = _ask(port, _request(_body(inputs)))

    assert status == 200
    got = json.loads(body)["outputs"][0]["data"]
    np.testing.assert_allclose(got, sigmoid_of(inputs)[:, 0], atol=1e-6)


def test_pipelined_requests_are_answered_in_their_order(port: int) -> None:
    ages = [20 + number for number in range(40)]
    # Every third goes the longer way, and holds up the quick ones behind it.
    sent = b"".join(
        _request(_body(((age, 1, 240, 0),)), _LONG if number % 3 == 1 else "")
        for number, age in enumerate(ages)
    )

    answers = _ask(port, sent, answers=40)

    got = [json.loads(body)["outputs"][0]["data"][0] for _, _, body in answers]
    inputs = np.array([(age, 1, 240, 0) for age in ages], np.float32)
    np.testing.assert_allclose(got, sigmoid_of(inputs)[:, 0], atol=1e-6)


def test_a_request_may_come_byte_by_byte(port: int) -> None:
    whole = _request(_body())
    pieces = [whole[i : i + 1] for i in range(len(whole))]

    assert _ask(port, *pieces) == _ask(port, whole)


def _ages(connection: socket.socket, ages: list[int]) -> list[float]:
    found = []
    for age in ages:
        connection.sendall(_request(_body(((age, 1, 240, 0),))))
        ((status, _, body),) = _read(connection, 1)
        assert status == 200
        found.append(json.loads(body)["outputs"][0]["data"][0])
    return found


def test_a_head_that_was_seen_before_answers_for_the_body_that_came_now(port: int) -> None:
    ages = [20, 30, 99, 100, 101, 40, 102, 50]  # heads of two lengths, in turn
    wanted = sigmoid_of(np.array([(age, 1, 240, 0) for age in ages], np.float32))[:, 0]

    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        first = _ages(connection, ages)
        again = _request(_body(((20, 1, 240, 0),)))
        connection.sendall(again[:-7])  # the same head, and not all of its body
        time.sleep(0.05)
        connection.sendall(again[-7:] + again)  # the rest, and the next
        late = _read(connection, 2)
        connection.sendall(_request(b"{}") + _request(_body(((15, 1, 240, 0),))))
        refused = [status for status, _, _ in _read(connection, 2)]
        last = _ages(connection, ages)

    np.testing.assert_allclose(first, wanted, atol=1e-6)
    np.testing.assert_allclose(last, wanted, atol=1e-6)
    got = [json.loads(body)["outputs"][0]["data"][0] for _, _, body in late]
    np.testing.assert_allclose(got, wanted[[0, 0]], atol=1e-6)
    assert refused == [400, 422]


@pytest.mark.parametrize("missing", [False, True])
def test_a_missing_value_is_one_on_a_known_head_too(port: int, missing: bool) -> None:
    row = (63, 1, np.nan if missing else 240, np.nan)

    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        answers = []
        for _ in range(3):
            connection.sendall(_request(_body((row,))))
            answers += _read(connection, 1)

    values = [json.loads(body)["outputs"][0]["data"][0] for _, _, body in answers]
    np.testing.assert_allclose(values, sigmoid_of(np.array([row], np.float32))[0, 0], atol=1e-6)


def test_what_looks_like_a_request_inside_a_body_is_a_body(port: int) -> None:
    known = _request(_body())
    head = f"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: {len(known)}\r\n\r\n"

    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        for _ in range(2):
            connection.sendall(known)
            assert _read(connection, 1)[0][0] == 200
        connection.sendall(head.encode())
        refused = _read(connection, 1)[0][0]  # before its body came
        connection.sendall(known)
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(20)
        connection.sendall(known)
        answered = _read(connection, 1)[0][0]

    assert (refused, answered) == (404, 200)


def test_each_request_of_a_connection_needs_its_own_key_and_is_in_the_log(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _IDENTITY), _IDENTITY.public)
    keys = store.folder / "state" / "keys.json"
    ward = add_key(keys, name="ward", role="clinician")
    auditor = add_key(keys, name="auditor", role="auditor")
    heads = [f"Authorization: Bearer {key}\r\n" for key in (ward, ward, auditor, "x", ward)]

    with (
        adapter(store.folder, tmp_path / "ready.json", "--rate", "4") as (address, _),
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 20) as connection,
    ):
        statuses = []
        for head in [*heads, "", *(heads[:1] * 12)]:
            connection.sendall(_request(_body(), head))
            statuses.append(_read(connection, 1)[0][0])
        metrics = httpx.get(f"{address}/metrics", headers={"x-api-key": auditor}).text
    entries = list(read_log(store.folder / "state" / "audit.jsonl"))

    verify_log(store.folder / "state" / "audit.jsonl")
    asked = [entry for entry in entries if entry["action"] == "infer"]
    assert statuses[:6] == [200, 200, 403, 401, 200, 401]
    assert statuses[-1] == 429
    assert len(asked) == statuses.count(200)
    assert {(e["caller"], e["model"], e["version"], e["rows"]) for e in asked} == {
        ("ward", "tiny", 1, 1)
    }
    assert f'predicted_rows_total{{model="tiny",version="1"}} {len(asked)}' in metrics


@pytest.mark.parametrize(
    "head",
    ["Transfer-Encoding: chunked\r\n", "Content-Encoding: br\r\n", "Upgrade: h2c\r\n"],
)
def test_what_is_unusual_goes_the_longer_way(port: int, head: str) -> None:
    if head.startswith("Transfer"):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(_body()), _body())
        request = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body
    else:
        request = _request(_body(), head)
    ((status, _, _),) = _ask(port, request)

    assert status == (415 if "br" in head else 200)


def test_a_client_that_asks_to_go_on_is_told_to(port: int) -> None:
    request = _request(_body(), "Expect: 100-continue\r\n")

    told, answered = _ask(port, request, answers=2)

    assert (told[0], answered[0]) == (100, 200)


def test_a_client_that_leaves_harms_nobody(port: int) -> None:
    whole = _request(_body())
    for cut in (10, 60, len(whole) - 1):
        with socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(whole[:cut])

    assert _ask(port, whole)[0][0] == 200


def test_a_request_under_way_is_answered_when_the_adapter_stops(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.install(publish_sample(tmp_path / "registry", _IDENTITY), _IDENTITY.public)
    whole = _request(_body())
    with adapter(store.folder, tmp_path / "ready.json") as (address, process):
        where = ("127.0.0.1", int(address.rpartition(":")[2]))
        with socket.create_connection(where, 20) as connection:
            connection.sendall(whole[:-5])
            process.terminate()
            # Until it no longer takes connections, it has not begun to stop.
            while True:
                try:
                    socket.create_connection(where, 0.2).close()
                except OSError:
                    break
            connection.sendall(whole[-5:])
            ((status, _, _),) = _read(connection, 1)
            assert connection.recv(1) == b""

    assert status == 200


def test_a_connection_is_kept_for_a_while_and_no_longer(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        start = time.monotonic()
        for pause in (0.0, 3.0):
            time.sleep(pause)
            connection.sendall(_request(_body()))
            assert _read(connection, 1)[0][0] == 200
        assert connection.recv(1) == b""
        kept = time.monotonic() - start

    assert 7.5 < kept < 12  # 3 s, then uvicorn's 5 s without a request


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (b"/v2/models/tiny/infer", ("tiny", None)),
        (b"/v2/models/tiny/versions/3/infer", ("tiny", "3")),
        (b"/v2/models/t%69ny/infer", None),
        (b"/v2/models/tiny/infer?x", None),
        (b"/v2/models/tiny/ready", None),
        (b"/predict", None),
    ],
)
def test_only_a_plain_inference_is_quick(url: bytes, parts: tuple[str | None, ...] | None) -> None:
    assert infer_parts(url) == parts


_VALUE = st.none() | st.floats() | st.integers(-(2**70), 2**70) | st.booleans() | st.text("1a")


@given(
    data=st.lists(_VALUE, max_size=5),
    shape=st.lists(st.integers(0, 5) | st.booleans() | st.floats(0, 5), max_size=3),
)
def test_one_patient_is_read_as_any_tensor_is(data: list[Any], shape: list[Any]) -> None:
    tensor = {"name": "input", "datatype": "FP32", "shape": shape, "data": data}

    body = json.dumps({"inputs": [tensor]}).encode()
    try:
        asked = oip.parse_infer(body, None).inputs
    except Problem:
        asked = None

    row = oip.parse_row(body)

    if row is not None and not any(v is not None and abs(v) > 1e30 for v in row):
        assert asked is not None
        np.testing.assert_array_equal(np.array([row], np.float64).astype(np.float32), asked)


_NEAR = st.sampled_from([18.0, 17.9999999, 120.0, 120.000001, 0.0, 1.0, 2.0, 0.5, -0.0, 1e39])


@given(row=st.lists(st.none() | st.floats() | _NEAR, min_size=3, max_size=5))
def test_a_row_that_passes_at_once_passes_the_guard(row: list[float | None]) -> None:
    guard = Guard(SIGNATURE)

    if guard.passes(row):
        guard.check(np.array([row], np.float64).astype(np.float32))


def test_one_row_in_bound_memory_is_what_the_session_gives(tmp_path: Path) -> None:
    release = read_release(publish_sample(tmp_path, _IDENTITY), _IDENTITY.public)
    engine = start_engine(release)
    inputs = valid_inputs(50)

    rows = [engine.predict(row[None]) for row in inputs]  # kept: none may change the one before

    assert engine.single is not None
    np.testing.assert_array_equal(np.concatenate(rows), engine.predict(inputs))
    with engine.single._free:  # another thread is at it
        np.testing.assert_array_equal(engine.predict(inputs[:1]), rows[0])


def test_a_large_body_goes_the_longer_way(port: int) -> None:
    body = _body() + b" " * MOST_BYTES

    ((status, _, _),) = _ask(port, _request(body))

    assert status == 200


def test_a_canary_gets_its_share_of_quick_requests_too(tmp_path: Path) -> None:
    engines = [
        start_engine(read_release(publish_sample(tmp_path, _IDENTITY, bias=bias), _IDENTITY.public))
        for bias in (-2.0, -1.9)
    ]
    catalogue = Catalogue(engines[:1])
    limits = Limits(shadow=60, canary=60, share=1.0)
    candidate = Candidate(version=2, digest="", stage="canary", limits=limits)
    catalogue.begin_trial(Trial(candidate, old=engines[0], new=engines[1]))

    answer, _ = infer_now(Service(catalogue), ("tiny", None), [], _body(), None)
    catalogue.end_trial("tiny")
    alone, _ = infer_now(Service(catalogue), ("tiny", None), [], _body(), None)

    assert json.loads(answer.body)["model_version"] == "2"
    assert json.loads(alone.body)["model_version"] == "1"
