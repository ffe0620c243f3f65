"""The Open Inference Protocol v2 over gRPC, beside the REST one in the same event loop.

Needs the extra `grpc`.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from fedward.core.fields import INPUT, OUTPUT
from fedward.serving import oip
from fedward.serving.http import MAX_BODY
from fedward.serving.problems import Problem
from fedward.serving.protobuf import messages
from fedward.serving.roles import ANYONE, Caller, Role
from fedward.serving.service import Service

SERVICE = "inference.GRPCInferenceService"
_LOG = logging.getLogger("fedward.serving")
_STATUS = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "INT32": "int_contents",
    "INT16": "int_contents",
    "INT8": "int_contents",
    "UINT32": "uint_contents",
    "UINT16": "uint_contents",
    "UINT8": "uint_contents",
}

Metadata = Sequence[tuple[bytes, bytes]]
Call = Callable[[Service, Any, Caller, Metadata], Awaitable[Any]]


async def start_rpc(
    service: Service, address: str, *, certificate: Path | None, key: Path | None
) -> tuple[Any, int]:
    """Start answering.

    Args:
        service: The adapter.
        address: `host:port`; port 0 takes a free one.
        certificate: PEM chain; with `key`, only TLS is answered.
        key: PEM private key.

    Returns:
        The server, to be stopped by `await server.stop(grace)`, and the port.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_BODY),
        ]
    )
    server.add_generic_rpc_handlers((_handlers(service),))
    if certificate is None or key is None:
        port = server.add_insecure_port(address)
    else:
        pair = (key.read_bytes(), certificate.read_bytes())
        port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    await server.start()
    return server, int(port)


async def _live(_: Service, __: object, ___: Caller, ____: Metadata) -> object:
    return messages()["ServerLiveResponse"](live=True)


async def _ready(service: Service, _: object, __: Caller, ___: Metadata) -> object:
    return messages()["ServerReadyResponse"](ready=bool(service.catalogue.names()))


async def _model_ready(service: Service, request: Any, _: Caller, __: Metadata) -> object:
    try:
        service.catalogue.get(request.name, request.version or None)
    except Problem:
        return messages()["ModelReadyResponse"](ready=False)
    return messages()["ModelReadyResponse"](ready=True)


async def _server_metadata(_: Service, __: object, ___: Caller, ____: Metadata) -> object:
    return messages()["ServerMetadataResponse"](**oip.server_metadata())


async def _model_metadata(service: Service, request: Any, _: Caller, __: Metadata) -> object:
    signature = service.catalogue.get(request.name, request.version or None).signature
    described = oip.model_metadata(signature, [str(signature.version)])
    return messages()["ModelMetadataResponse"](**described)


async def _infer(service: Service, request: Any, caller: Caller, metadata: Metadata) -> object:
    version = request.model_version or None
    live = service.catalogue.choose(request.model_name, version, metadata)
    if len(request.inputs) != 1 or request.inputs[0].name != INPUT:
        raise Problem(400, f"`inputs` must be one tensor, {INPUT!r}")
    if any(output.name != OUTPUT for output in request.outputs):
        raise Problem(400, f"unexpected output; the only one is {OUTPUT!r}")
    raw = len(request.raw_input_contents) > 0
    inputs = _read(request.inputs[0], request.raw_input_contents)
    outputs = await service.predict(live, inputs, caller=caller, action="infer")
    signature = live.signature
    response = messages()["ModelInferResponse"](
        model_name=signature.model, model_version=str(signature.version), id=request.id
    )
    tensor = response.outputs.add(name=OUTPUT, datatype="FP32", shape=outputs.shape)
    if raw:
        response.raw_output_contents.append(np.ascontiguousarray(outputs, "<f4").tobytes())
    else:
        tensor.contents.fp32_contents.extend(outputs.ravel().tolist())
    return response


def _read(tensor: Any, raw: Sequence[bytes]) -> NDArray[np.float32]:
    dtype = np.dtype(oip.dtype_of(tensor.datatype)).newbyteorder("<")
    if raw:
        if len(raw) != 1 or len(raw[0]) % dtype.itemsize:
            raise Problem(400, "raw_input_contents does not fit the input")
        values = np.frombuffer(raw[0], dtype)
    elif tensor.datatype in _CONTENTS:
        values = np.array(getattr(tensor.contents, _CONTENTS[tensor.datatype]), np.float64)
    else:
        raise Problem(400, f"{tensor.datatype} must come as raw_input_contents")
    return oip.shaped(values, list(tensor.shape))


_CLINICIAN: tuple[Role, ...] = ("clinician",)
# Method: request, roles (None: anybody, key or not), what answers.
_METHODS: dict[str, tuple[str, tuple[Role, ...] | None, Call]] = {
    "ServerLive": ("Empty", None, _live),
    "ServerReady": ("Empty", None, _ready),
    "ServerMetadata": ("Empty", (), _server_metadata),
    "ModelReady": ("ModelReference", (), _model_ready),
    "ModelMetadata": ("ModelReference", (), _model_metadata),
    "ModelInfer": ("ModelInferRequest", _CLINICIAN, _infer),
}


def _handlers(service: Service) -> Any:
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            name: grpc.unary_unary_rpc_method_handler(
                _answering(service, name, roles, call),
                request_deserializer=messages()[request].FromString,
                response_serializer=_to_bytes,
            )
            for name, (request, roles, call) in _METHODS.items()
        },
    )


def _to_bytes(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _answering(
    service: Service, name: str, roles: tuple[Role, ...] | None, call: Call
) -> Callable[[Any, Any], Awaitable[Any]]:
    route = f"grpc-{name}"

    async def answer(request: Any, context: Any) -> Any:
        start = time.perf_counter()
        status, code, details = 200, grpc.StatusCode.OK, ""
        response = None
        metadata = [
            (key.encode(), value if isinstance(value, bytes) else value.encode())
            for key, value in context.invocation_metadata()
        ]
        try:
            caller = ANYONE if roles is None else service.admit(metadata, roles)
            response = await call(service, request, caller, metadata)
        except Problem as problem:
            status, details = problem.status, problem.error
            code = _STATUS.get(status, grpc.StatusCode.INVALID_ARGUMENT)
        except Exception as error:  # noqa: BLE001 (the last line before the network)
            # The type only: a message may quote a patient's values.
            _LOG.error("answering %s failed: %s", route, type(error).__name__)
            status, code, details = 500, grpc.StatusCode.INTERNAL, "internal error; see the log"
        service.answered(route, status, time.perf_counter() - start, metadata)
        if response is None:
            await context.abort(code, details)
        return response

    return answer
