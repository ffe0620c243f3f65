"""Every call of an unmodified KServe SDK, against a served sample. Run as a script.

Arguments: HTTP address, gRPC address. Prints `PASS n` or raises.
"""

import asyncio
import sys

import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

_ROWS = np.array([[63, 1, 240, 1], [30, 0, np.nan, np.nan], [90, 1, 300, 0]], np.float32)
_WEIGHTS = np.array([0.02, 0.7, 0.003, 0.5])
WANTED = 1 / (1 + np.exp(-(np.nan_to_num(_ROWS).astype(float) @ _WEIGHTS - 2)))
_passed = 0


def check(what: str, holds: object) -> None:
    global _passed  # noqa: PLW0603 (a script's counter)
    if not holds:
        raise SystemExit(f"FAIL {what}")
    _passed += 1


def request(*, binary: bool) -> InferRequest:
    made = InferInput("input", list(_ROWS.shape), "FP32")
    made.set_data_from_numpy(_ROWS, binary_data=binary)
    return InferRequest("tiny", [made], parameters={"binary_data_output": binary}, request_id="z")


def right(response: object) -> bool:
    values = response.outputs[0].as_numpy()  # type: ignore[attr-defined]
    return bool(np.allclose(values[:, 0], WANTED, atol=1e-5))


async def over_rest(address: str) -> None:
    base = f"http://{address}"
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    check("live", await client.is_server_live(base) is True)
    check("ready", await client.is_server_ready(base) is True)
    check("model ready", await client.is_model_ready(base, "tiny") is True)
    for binary in (True, False):
        response = await client.infer(base, request(binary=binary), model_name="tiny")
        check(f"infer {binary}", right(response))
    first = InferenceRESTClient(RESTConfig(protocol="v1"))
    rows = [[None if np.isnan(v) else float(v) for v in row] for row in _ROWS]
    body = {"instances": rows}
    predicted = await first.infer(base, body, model_name="tiny")
    check("v1 predict", np.allclose(predicted["predictions"], WANTED, atol=1e-5))
    explained = await first.explain(base, "tiny", body)
    check("v1 explain", len(explained["explanations"]) == len(_ROWS))
    check("v1 ready", await first.is_model_ready(base, "tiny") is True)


async def over_grpc(address: str) -> None:
    client = InferenceGRPCClient(address)
    check("live", await client.is_server_live())
    check("ready", await client.is_server_ready())
    check("model ready", await client.is_model_ready("tiny"))
    for binary in (True, False):
        check(f"infer {binary}", right(await client.infer(request(binary=binary))))
    await client.close()


async def main() -> None:
    await over_rest(sys.argv[1])
    await over_grpc(sys.argv[2])
    print("PASS", _passed)


asyncio.run(main())
