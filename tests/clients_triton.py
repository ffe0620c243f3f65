"""Every call of an unmodified tritonclient, against a served sample. Run as a script.

Arguments: HTTP address, gRPC address. Prints `PASS n` or raises.
"""

import asyncio
import sys

import numpy as np
import tritonclient.grpc as rpc
import tritonclient.grpc.aio as rpc_aio
import tritonclient.http.aio as http_aio
from tritonclient import http

_ROWS = np.array([[63, 1, 240, 1], [30, 0, np.nan, np.nan], [90, 1, 300, 0]], np.float32)
_WEIGHTS = np.array([0.02, 0.7, 0.003, 0.5])
WANTED = 1 / (1 + np.exp(-(np.nan_to_num(_ROWS).astype(float) @ _WEIGHTS - 2)))
_passed = 0


def check(what: str, holds: object) -> None:
    global _passed  # noqa: PLW0603 (a script's counter)
    if not holds:
        raise SystemExit(f"FAIL {what}")
    _passed += 1


def right(result: object) -> bool:
    return bool(np.allclose(result.as_numpy("probability")[:, 0], WANTED, atol=1e-5))  # type: ignore[attr-defined]


def tensor(module: object, **options: object) -> object:
    made = module.InferInput("input", list(_ROWS.shape), "FP32")  # type: ignore[attr-defined]
    made.set_data_from_numpy(_ROWS, **options)
    return made


def refuses(what: str, call: object, words: str) -> None:
    try:
        call()  # type: ignore[operator]
    except Exception as error:  # noqa: BLE001 (any of the client's own)
        check(f"{what}: {error}", words in str(error))
        return
    check(what, False)


def over_http(address: str) -> None:
    client = http.InferenceServerClient(address)
    check("live", client.is_server_live())
    check("ready", client.is_server_ready())
    check("model ready", client.is_model_ready("tiny"))
    check("version ready", client.is_model_ready("tiny", "1"))
    check("unknown is not ready", not client.is_model_ready("none"))
    check("server metadata", client.get_server_metadata()["name"] == "fedward")
    check("metadata", client.get_model_metadata("tiny")["inputs"][0]["name"] == "input")
    check("index", client.get_model_repository_index()[0]["name"] == "tiny")
    for binary_in in (True, False):
        for binary_out in (None, True, False):
            outputs = None
            if binary_out is not None:
                outputs = [http.InferRequestedOutput("probability", binary_data=binary_out)]
            result = client.infer(
                "tiny", [tensor(http, binary_data=binary_in)], outputs=outputs, request_id="abc"
            )
            check(f"infer {binary_in} {binary_out}", right(result))
            check("id", result.get_response()["id"] == "abc")
    for compression in ("gzip", "deflate"):
        result = client.infer(
            "tiny",
            [tensor(http)],
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        check(compression, right(result))
    waiting = [client.async_infer("tiny", [tensor(http)]) for _ in range(4)]
    check("async", all(right(one.get_result()) for one in waiting))
    refuses("unknown model", lambda: client.infer("none", [tensor(http)]), "not found")
    wrong = http.InferInput("input", [1, 3], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
    refuses("wrong shape", lambda: client.infer("tiny", [wrong]), "shape")
    old = http.InferInput("input", [1, 4], "FP32")
    old.set_data_from_numpy(np.array([[500, 0, 100, 0]], np.float32))
    refuses("out of range", lambda: client.infer("tiny", [old]), "18 to 120")


def over_grpc(address: str) -> None:
    client = rpc.InferenceServerClient(address)
    check("live", client.is_server_live())
    check("ready", client.is_server_ready())
    check("model ready", client.is_model_ready("tiny"))
    check("unknown is not ready", not client.is_model_ready("none"))
    check("server metadata", client.get_server_metadata().name == "fedward")
    check("metadata", list(client.get_model_metadata("tiny").inputs[0].shape) == [-1, 4])
    check("metadata as JSON", client.get_model_metadata("tiny", as_json=True)["name"] == "tiny")
    result = client.infer("tiny", [tensor(rpc)], request_id="q")
    check("infer", right(result))
    check("id", result.get_response().id == "q")
    compressed = client.infer("tiny", [tensor(rpc)], compression_algorithm="gzip")
    check("gzip", right(compressed))
    asked = [rpc.InferRequestedOutput("probability")]
    check("outputs", right(client.infer("tiny", [tensor(rpc)], outputs=asked)))
    refuses("unknown model", lambda: client.infer("none", [tensor(rpc)]), "not found")
    wrong = rpc.InferInput("input", [1, 3], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 3), np.float32))
    refuses("wrong shape", lambda: client.infer("tiny", [wrong]), "shape")


async def over_aio(http_address: str, grpc_address: str) -> None:
    one = http_aio.InferenceServerClient(http_address)
    check("http.aio live", await one.is_server_live())
    check("http.aio infer", right(await one.infer("tiny", [tensor(http)])))
    await one.close()
    two = rpc_aio.InferenceServerClient(grpc_address)
    check("grpc.aio ready", await two.is_server_ready())
    check("grpc.aio infer", right(await two.infer("tiny", [tensor(rpc)])))
    await two.close()


if __name__ == "__main__":
    over_http(sys.argv[1])
    over_grpc(sys.argv[2])
    asyncio.run(over_aio(sys.argv[1], sys.argv[2]))
    print("PASS", _passed)
