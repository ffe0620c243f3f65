"""What an answer costs: the adapter with everything on, beside the least and the usual.

    python benchmarks/serving.py [--quick] [--json]

Every server is a process of its own on loopback and is asked in turns with the same body, one
patient of the heart-disease task as an Open Inference Protocol request. CPU is the server's whole
process, user and system, for each request; latencies are wrk's. All in one run, so that ratios
hold on a machine that others share.

Needs `wrk`; `nginx` and MLServer (a Python that has it, in FEDWARD_MLSERVER_PYTHON) if there.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

_TICKS = os.sysconf("SC_CLK_TCK")
_CONNECTIONS = (1, 16)
_RPC_CALLS = 1000  # a turn
_FEATURES = [63, 1, 0, 145, 233, 1, 2, 150, 0, 2.3, 2, 0, 1]
_BODY = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 13], "data": _FEATURES}]}
_PATH = "/v2/models/heart-disease/infer"

_ECHO = """
import sys, uvicorn
async def app(scope, receive, send):
    message = await receive()
    if scope["type"] == "lifespan":
        await send({"type": message["type"] + ".complete"})
        return
    body = message["body"]
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    length = str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-type", b"application/json"), (b"content-length", length)]})
    await send({"type": "http.response.body", "body": body})
uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False,
            lifespan="off", log_level="error")
"""
_FASTAPI = """
import sys, numpy as np, onnxruntime as ort, uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[float]
class Request(BaseModel):
    inputs: list[Tensor]
class Response(BaseModel):
    model_name: str
    outputs: list[Tensor]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[2], options)
app = FastAPI()
@app.post("/v2/models/heart-disease/infer")
async def infer(request: Request) -> Response:
    tensor = request.inputs[0]
    values = np.array(tensor.data, np.float32).reshape(tensor.shape)
    output = session.run(["probability"], {"input": values})[0]
    return Response(model_name="heart-disease", outputs=[Tensor(name="probability",
        datatype="FP32", shape=list(output.shape), data=output.ravel().tolist())])
uvicorn.run(app, port=int(sys.argv[1]), loop="uvloop", http="httptools", access_log=False,
            log_level="error")
"""
_MLSERVER_MODEL = """
import numpy as np, onnxruntime as ort
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse
class Heart(MLModel):
    async def load(self):
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = ort.InferenceSession(self.settings.parameters.uri, options)
        return True
    async def predict(self, payload):
        values = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        output = self._session.run(["probability"], {"input": values})[0]
        return InferenceResponse(model_name=self.name,
                                 outputs=[NumpyCodec.encode_output("probability", output)])
"""
_NOOP_RPC = """
import asyncio, sys, grpc
from fedward.serving.protobuf import messages
reply = messages()["ModelInferResponse"](model_name="heart-disease")
async def infer(request, context):
    return reply
async def main():
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(infer,
        request_deserializer=messages()["ModelInferRequest"].FromString,
        response_serializer=lambda message: message.SerializeToString())
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService", {"ModelInfer": handler}),))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()
import uvloop
uvloop.run(main())
"""


@dataclass(frozen=True)
class Cost:
    """One server under one load."""

    server: str
    connections: int
    requests: int
    cpu_us: float
    p50_us: float
    p99_us: float
    per_second: float


def main() -> None:
    """Measure, print, and say which bars hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three turns of a second, not eleven")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("this needs wrk: apt-get install wrk")
    with tempfile.TemporaryDirectory(prefix="fedward-bench-") as folder:
        result = measure(Path(folder), turns=3 if options.quick else 11)
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


def measure(folder: Path, *, turns: int) -> dict[str, Any]:
    """All servers at once, asked in turns: neighbours of the machine come and go in seconds."""
    store, key, onnx = _make_store(folder)
    costs: list[list[Cost]] = []
    facts: dict[str, float] = {"environment_mb": _environment()}
    with contextlib.ExitStack() as running:
        servers = {}
        for name, start in _servers(folder, store, key, onnx).items():
            pid, port, headers = running.enter_context(start())
            if name == "fedward":
                facts["ready_cpu_seconds"] = _cpu(pid)
            script = _wrk_script(folder / f"{name}.lua", headers)
            servers[name] = (pid, port), script
            _wrk(port, script, connections=1, seconds=1)  # warm up
        for _ in range(turns):
            loads = [(name, n) for n in _CONNECTIONS for name in servers]
            costs.append([_cost(name, *servers[name], n) for name, n in loads])
        facts["resident_mb"] = _resident(servers["fedward"][0][0])
    rpc = _rpc_costs(_rpcs(store), turns=turns)
    return {
        "rest": [asdict(_median(same)) for same in zip(*costs, strict=True)],
        "grpc_cpu_us": {name: statistics.median(each) for name, each in rpc.items()},
        **facts,
        "bars": _bars(costs, rpc, facts),
    }


def _median(same: Sequence[Cost]) -> Cost:
    """One server under one load, over all turns."""
    numbers = [asdict(cost) for cost in same]
    middle = {
        field: statistics.median(number[field] for number in numbers)
        for field in ("requests", "cpu_us", "p50_us", "p99_us", "per_second")
    }
    return replace(same[0], **middle)


def show(result: dict[str, Any]) -> None:
    """The tables."""
    echo = {c["connections"]: c["cpu_us"] for c in result["rest"] if c["server"] == "echo"}
    print(
        f"{'server':<10}{'conns':>6}{'CPU µs':>9}{'× echo':>8}{'p50 µs':>9}{'p99 µs':>9}{'/s':>9}"
    )
    for c in result["rest"]:
        ratio = c["cpu_us"] / echo[c["connections"]]
        print(
            f"{c['server']:<10}{c['connections']:>9}{c['cpu_us']:>9.0f}{ratio:>9.2f}"
            f"{c['p50_us']:>9.0f}{c['p99_us']:>9.0f}{c['per_second']:>9.0f}"
        )
    for name, value in result["grpc_cpu_us"].items():
        print(f"gRPC {name}: {value:.0f} µs of CPU a request")
    for bar in result["bars"]:
        sign = "holds" if bar["holds"] else "MISSED"
        print(f"{sign:<7}{bar['name']}: {bar['value']:.3g} (bar {bar['bar']:.3g})")


Server = Callable[[], contextlib.AbstractContextManager[tuple[int, int, dict[str, str]]]]


def _servers(folder: Path, store: Path, key: str, onnx: Path) -> dict[str, Server]:
    servers: dict[str, Server] = {}
    if shutil.which("nginx") is not None or Path("/usr/sbin/nginx").exists():
        servers["nginx"] = lambda: _nginx(folder)
    servers["echo"] = lambda: _script(_ECHO)
    with contextlib.suppress(metadata.PackageNotFoundError):
        metadata.version("fastapi")
        servers["fastapi"] = lambda: _script(_FASTAPI, str(onnx))
    if "FEDWARD_MLSERVER_PYTHON" in os.environ:
        servers["mlserver"] = lambda: _mlserver(folder, onnx)
    servers["fedward"] = lambda: _fedward(store, key)
    return servers


def _rpcs(store: Path) -> dict[str, Server]:
    return {"no-op": lambda: _script(_NOOP_RPC), "fedward": lambda: _fedward(store, "", rpc=True)}


def _bars(
    costs: list[list[Cost]], rpc: dict[str, list[float]], facts: dict[str, float]
) -> list[dict[str, Any]]:
    # The median over turns of each turn's ratio; at one connection as at sixteen: the worse holds.
    def worst(other: str) -> float | None:
        ratios: dict[int, list[float]] = {}
        for turn in costs:
            cost = {(c.server, c.connections): c.cpu_us for c in turn}
            for n in _CONNECTIONS:
                if (other, n) in cost:
                    ratios.setdefault(n, []).append(cost["fedward", n] / cost[other, n])
        return max((statistics.median(each) for each in ratios.values()), default=None)

    of_no_op = [ours / theirs for ours, theirs in zip(rpc["fedward"], rpc["no-op"], strict=True)]
    measured = [
        ("CPU a request, of the echo's", worst("echo"), 5.0),
        ("CPU a request, of MLServer's", worst("mlserver"), 0.2),
        ("CPU a request, of FastAPI's", worst("fastapi"), 1.0),
        ("gRPC: CPU a request, of a no-op's", statistics.median(of_no_op), 1.5),
        ("environment without torch, MB", facts["environment_mb"], 200.0),
        ("resident, MB", facts["resident_mb"], 100.0),
        ("CPU until ready, s", facts["ready_cpu_seconds"], 1.5),
    ]
    return [
        {"name": name, "value": value, "bar": bar, "holds": value <= bar}
        for name, value, bar in measured
        if value is not None
    ]


def _make_store(folder: Path) -> tuple[Path, str, Path]:
    """A store with one heart-disease release, its key, and the graph alone."""
    from fedward.core.identity import Identity
    from fedward.core.study import parse_study
    from fedward.server.publisher import publish
    from fedward.serving.gate import add_key
    from fedward.serving.store import Store
    from fedward.tasks.parameters import to_vector
    from fedward.tasks.registry import get_task

    study = parse_study(
        textwrap.dedent("""
        [study]
        name = "heart-disease"
        task = "heart-disease"
        rounds = 1
        [model]
        name = "logistic"
        [training]
        local_steps = 1
        sample_rate = 0.3
        learning_rate = 0.5
        [privacy]
        mode = "none"
        acknowledge = "no privacy"
        """)
    )
    task = get_task("heart-disease")
    monitor = {
        "format": 1,
        "fields": {
            field.name: {"edges": [-1000, 0.5, 1000], "shares": [0.5, 0.4], "missing": 0.1}
            for field in task.schema.features
        },
        "prediction": {"edges": [0, 0.5, 1], "shares": [0.5, 0.5], "missing": 0.0},
    }
    identity = Identity.generate_publisher()
    release = publish(
        registry=folder / "registry",
        study=study,
        task=task,
        parameters=to_vector(task.model("logistic")),
        fitted=None,
        privacy={"mode": "none", "simulated": True},
        metrics={},
        training={},
        identity=identity,
        monitor=monitor,
    )
    Store(folder / "store").install(release, identity.public)
    Store(folder / "open").install(release, identity.public)
    key = add_key(folder / "store" / "state" / "keys.json", name="bench", role="clinician")
    return folder / "store", key, release / "model.onnx"


@contextlib.contextmanager
def _fedward(
    store: Path, key: str, *, rpc: bool = False
) -> Iterator[tuple[int, int, dict[str, str]]]:
    ready = store.with_name("ready.json")
    ready.unlink(missing_ok=True)
    folder = store.with_name("open") if rpc else store
    command = [sys.executable, "-m", "fedward.serving", "--store", str(folder), "--port", "0"]
    command += ["--ready-file", str(ready), "--rate", "1e9", *(["--grpc-port", "0"] if rpc else [])]
    with _process(command) as process:
        while not ready.exists():
            time.sleep(0.02)
            if process.poll() is not None:
                raise SystemExit("the adapter did not start")
        where = json.loads(ready.read_text())
        port = where["grpc_port"] if rpc else where["port"]
        yield process.pid, port, {"Authorization": f"Bearer {key}"}


@contextlib.contextmanager
def _script(source: str, *arguments: str) -> Iterator[tuple[int, int, dict[str, str]]]:
    port = _free_port()
    with _process([sys.executable, "-c", source, str(port), *arguments]) as process:
        _wait(port)
        yield process.pid, port, {}


@contextlib.contextmanager
def _nginx(folder: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    port = _free_port()
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;\n"
        "events {}\n"
        f"http {{ access_log off; keepalive_requests 100000000; client_body_temp_path {folder}/b;\n"
        f"  proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u;\n"
        f"  scgi_temp_path {folder}/s;\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ return 200 '{{}}'; }} }} }}\n"
    )
    binary = shutil.which("nginx") or "/usr/sbin/nginx"
    with _process([binary, "-c", str(folder / "nginx.conf"), "-p", str(folder)]) as process:
        _wait(port)
        yield process.pid, port, {}


@contextlib.contextmanager
def _mlserver(folder: Path, onnx: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    home = folder / "mlserver"
    home.mkdir(exist_ok=True)
    port = _free_port()
    (home / "heart.py").write_text(_MLSERVER_MODEL)
    settings = {
        "http_port": port,
        "grpc_port": _free_port(),
        "metrics_port": _free_port(),
        "parallel_workers": 0,
        "debug": False,
    }
    model = {
        "name": "heart-disease",
        "implementation": "heart.Heart",
        "parameters": {"uri": str(onnx)},
    }
    (home / "settings.json").write_text(json.dumps(settings))
    (home / "model-settings.json").write_text(json.dumps(model))
    binary = Path(os.environ["FEDWARD_MLSERVER_PYTHON"]).with_name("mlserver")
    with _process([str(binary), "start", str(home)], cwd=home) as process:
        _wait(port, seconds=90)
        time.sleep(2)  # the port answers before the model does
        yield process.pid, port, {}


@contextlib.contextmanager
def _process(command: list[str], cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, cwd=cwd)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _cost(name: str, where: tuple[int, int], script: Path, connections: int) -> Cost:
    pid, port = where
    before = _cpu(pid)
    said = _wrk(port, script, connections=connections, seconds=1)
    used = _cpu(pid) - before
    count = re.search(r"(\d+) requests in", said)
    if count is None or "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"{name} did not answer every request:\n{said}")
    requests = int(count[1])
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    return Cost(
        server=name,
        connections=connections,
        requests=requests,
        cpu_us=1e6 * used / requests,
        p50_us=_latency(said, "50%"),
        p99_us=_latency(said, "99%"),
        per_second=float(rate[1]) if rate else 0.0,
    )


def _wrk(port: int, script: Path, *, connections: int, seconds: int) -> str:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}{_PATH}"], capture_output=True, text=True, check=True
    )
    return done.stdout


def _wrk_script(script: Path, headers: dict[str, str]) -> Path:
    lines = ['wrk.method = "POST"', f"wrk.body = [[{json.dumps(_BODY)}]]"]
    for name, value in {"Content-Type": "application/json", **headers}.items():
        lines.append(f'wrk.headers["{name}"] = "{value}"')
    script.write_text("\n".join(lines))
    return script


def _latency(said: str, share: str) -> float:
    found = re.search(rf"{share}\s+([\d.]+)(us|ms|s)\b", said)
    if found is None:
        return float("nan")
    return float(found[1]) * {"us": 1.0, "ms": 1e3, "s": 1e6}[found[2]]


def _rpc_costs(servers: dict[str, Server], *, turns: int) -> dict[str, list[float]]:
    """CPU of a call in µs, one after the other over one channel; of each turn."""
    import grpc

    from fedward.serving.protobuf import messages

    request = messages()["ModelInferRequest"](model_name="heart-disease")
    request.inputs.add(name="input", datatype="FP32", shape=[1, 13])
    request.raw_input_contents.append(np.array(_FEATURES, "<f4").tobytes())
    costs: dict[str, list[float]] = {name: [] for name in servers}
    with contextlib.ExitStack() as running:
        calls = {}
        for name, start in servers.items():
            pid, port, _ = running.enter_context(start())
            channel = running.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=messages()["ModelInferResponse"].FromString,
            )
            calls[name] = pid, call
            for _ in range(200):
                call(request, wait_for_ready=True, timeout=30)
        for _ in range(turns):
            for name, (pid, call) in calls.items():
                before = _cpu(pid)
                for _ in range(_RPC_CALLS):
                    call(request, timeout=30)
                costs[name].append(1e6 * (_cpu(pid) - before) / _RPC_CALLS)
    return costs


def _cpu(pid: int) -> float:
    """Seconds of CPU of a process and its waited-for children so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(fields[i]) for i in (11, 12)) / _TICKS


def _resident(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def _environment() -> float:
    """Megabytes of what `pip install fedward[serve]` brings, as the packages' records state."""
    todo = ["cryptography", "numpy", "pydantic", "rich", "typer"]
    todo += ["httptools", "onnxruntime", "safetensors", "uvicorn", "uvloop"]
    seen: set[str] = set()
    total = 0
    while todo:
        name = re.split(r"[ ;<>=!~\[(]", todo.pop())[0].lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform or Python
        files = [f for f in package.files or [] if not str(f).endswith(".pyc")]
        total += sum(f.size or 0 for f in files)
        todo += [r for r in package.requires or [] if "extra ==" not in r]
    return total / 2**20


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait(port: int, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        time.sleep(0.05)
    raise SystemExit("a server did not start")


if __name__ == "__main__":
    main()
