"""Every path of the adapter: its method, who may ask, and what answers."""

import functools
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from fedward.serving import cds, graph, manage, oip, openapi
from fedward.serving.catalogue import Live
from fedward.serving.clinical import parse_json
from fedward.serving.explanations import Asked, parse_asked
from fedward.serving.http import (
    Answer,
    Receive,
    Scope,
    Stream,
    answer_json,
    header,
    read_body,
)
from fedward.serving.problems import Problem
from fedward.serving.roles import Caller, Role
from fedward.serving.service import Service, parse_instances
from fedward.serving.telemetry import CONTENT_TYPE


@dataclass(frozen=True, slots=True)
class Request:
    """One request on its way to its handler.

    Attributes:
        service: The adapter.
        scope: ASGI's scope.
        receive: ASGI's receive.
        parts: What the path's groups matched; None where one did not.
        caller: Who asks.
    """

    service: Service
    scope: Scope
    receive: Receive
    parts: tuple[str | None, ...]
    caller: Caller

    @property
    def live(self) -> Live:
        """The model that the path names: its first part, and its version if that is the second."""
        version = self.parts[1] if len(self.parts) > 1 else None
        return self.service.catalogue.get(self.parts[0], version)

    @property
    def chosen(self) -> Live:
        """As `live`, or its canary if the request is one of the canary's."""
        version = self.parts[1] if len(self.parts) > 1 else None
        return self.service.catalogue.choose(self.parts[0], version, self.scope["headers"])

    @property
    def patient(self) -> str | None:
        """Whose request it says that it is. Raises `Problem` 400."""
        value = header(self.scope["headers"], PATIENT_HEADER)
        return None if value is None else parse_patient_id(value.decode("latin-1"))

    @property
    def asked(self) -> Asked:
        """Which explanation, by the query. Raises `Problem` 422."""
        return parse_asked(self.scope.get("query_string", b""))

    async def body(self) -> bytes:
        """The body. Raises `Problem`."""
        return await read_body(self.scope, self.receive)


def parse_patient_id(value: object) -> str:
    """A patient's id. Raises `Problem` 400 if it cannot be one."""
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_ID or not value.isprintable():
        raise Problem(400, f"a patient's id must be a text of 1 to {_LONGEST_ID} characters")
    return value


Handler = Callable[[Request], Awaitable[Answer | Stream]]


@dataclass(frozen=True, slots=True)
class Route:
    """A path.

    Attributes:
        name: What metrics call it.
        method: GET (HEAD goes with it) or POST.
        path: The whole path.
        handler: Answers.
        roles: Which may ask; empty for any caller with a key; None for anybody, key or not.
    """

    name: str
    method: str
    path: re.Pattern[str]
    handler: Handler
    roles: tuple[Role, ...] | None


async def _infer(request: Request) -> Answer:
    live = request.chosen
    body = await request.body()
    length = header(request.scope["headers"], b"inference-header-content-length")
    asked = oip.parse_infer(body, length)
    outputs = await request.service.predict(
        live, asked.inputs, caller=request.caller, action="infer", patient=request.patient
    )
    return _inferred(live, asked, outputs)


def infer_now(
    service: Service,
    parts: tuple[str | None, ...],
    headers: list[tuple[bytes, bytes]],
    body: bytes,
    json_length: bytes | None,
    *,
    before: Caller | None = None,
) -> tuple[Answer, Caller]:
    """The answer to a whole inference request, without waiting for anything.

    Args:
        service: The adapter.
        parts: The path's model and version, as `infer_parts` finds them.
        headers: The request's, names in lower case.
        body: The request's, decompressed.
        json_length: The header `Inference-Header-Content-Length`; None without binary tensors.
        before: Who was admitted by the same headers on the same connection; None if nobody was.

    Returns:
        The answer, and who asked.

    Raises:
        Problem: As the route's, 4xx.
    """
    caller = before
    if caller is None or not service.gate.admit_again(caller):
        caller = service.admit(headers, _CLINICIAN)
    model, version = parts
    live = service.catalogue.choose(model, version, headers)
    if json_length is None:
        row = oip.parse_row(body)
        found = None if row is None else service.predict_row(live, row, caller=caller)
        if found is not None:
            return Answer(oip.encode_row(live.signature, found)), caller
    asked = oip.parse_infer(body, json_length)
    outputs = service.predict_now(live, asked.inputs, caller=caller, action="infer")
    return _inferred(live, asked, outputs), caller


@functools.lru_cache(maxsize=256)
def infer_parts(url: bytes) -> tuple[str | None, ...] | None:
    """Model and version of an inference's plain path; None for any other, or one to be decoded."""
    match = None if b"%" in url or b"?" in url else _INFER_PATH.fullmatch(url.decode("latin-1"))
    return None if match is None else match.groups()


def _inferred(live: Live, asked: oip.InferRequest, outputs: NDArray[np.float32]) -> Answer:
    content, json_length = oip.encode_infer(live.signature, asked, outputs)
    if json_length is None:
        return Answer(content)
    headers = (
        (b"content-type", b"application/octet-stream"),
        (b"inference-header-content-length", str(json_length).encode()),
    )
    return Answer(content, headers=headers)


async def _predict(request: Request) -> Answer:
    live = request.chosen
    values = parse_json(await request.body())
    answer = await request.service.answer_patient(
        live, values, caller=request.caller, patient=request.patient
    )
    return answer_json(answer)


async def _explain(request: Request) -> Answer:
    live = request.chosen
    values = parse_json(await request.body())
    answer = await request.service.explain_patient(
        live, values, caller=request.caller, patient=request.patient, asked=request.asked
    )
    return answer_json(answer)


async def _v1_predict(request: Request) -> Answer:
    live = request.chosen
    inputs = parse_instances(live, parse_json(await request.body()))
    outputs = await request.service.predict(live, inputs, caller=request.caller, action="infer")
    rows = outputs[:, 0] if outputs.shape[1] == 1 else outputs
    return answer_json({"predictions": rows.tolist()})


async def _v1_explain(request: Request) -> Answer:
    live = request.chosen
    inputs = parse_instances(live, parse_json(await request.body()))
    if len(inputs) > _MOST_EXPLAINED:
        raise Problem(413, f"at most {_MOST_EXPLAINED} instances are explained in one request")
    service, asked = request.service, request.asked
    await service.predict(live, inputs, caller=request.caller, action="explain")
    explained = [await service.contributions(live, row, asked) for row in inputs]
    return answer_json({"explanations": explained})


async def _outcome(request: Request) -> Answer:
    live = request.live
    value = parse_json(await request.body())
    return answer_json(await request.service.add_outcome(live, value, caller=request.caller))


async def _model(request: Request) -> Answer:
    live = request.live
    return answer_json(oip.model_metadata(live.signature, [str(live.signature.version)]))


async def _model_ready(request: Request) -> Answer:
    return answer_json({"name": request.live.signature.model, "ready": True})


async def _index(request: Request) -> Answer:
    await request.body()
    catalogue = request.service.catalogue
    return answer_json(
        [
            {
                "name": name,
                "version": str(catalogue.get(name).signature.version),
                "state": "READY",
                "reason": "",
            }
            for name in catalogue.names()
        ]
    )


async def _v1_models(request: Request) -> Answer:
    return answer_json({"models": list(request.service.catalogue.names())})


async def _server(_: Request) -> Answer:
    return answer_json(oip.server_metadata())


async def _alive(_: Request) -> Answer:
    return answer_json({"live": True})


async def _ready(request: Request) -> Answer:
    ready = bool(request.service.catalogue.names())
    return answer_json({"ready": ready, "live": True}, status=200 if ready else 503)


async def _metrics(request: Request) -> Answer:
    text = request.service.metrics().encode()
    return Answer(text, headers=((b"content-type", CONTENT_TYPE),))


async def _monitor(request: Request) -> Answer:
    return answer_json(request.service.monitor(request.live))


async def _status(request: Request) -> Answer:
    return answer_json(request.service.status())


async def _graphql(request: Request) -> Answer:
    body = parse_json(await request.body())
    return answer_json(await graph.answer(request.service, body, caller=request.caller))


async def _events(request: Request) -> Stream:
    headers = ((b"content-type", b"text/event-stream"), (b"cache-control", b"no-store"))
    return Stream(request.service.events(), headers)


async def _cds_services(request: Request) -> Answer:
    catalogue = request.service.catalogue
    served = [cds.service_of(catalogue.get(name).signature) for name in catalogue.names()]
    return answer_json({"services": served})


async def _cds_hook(request: Request) -> Answer:
    live = request.chosen
    body = parse_json(await request.body())
    try:
        inputs = cds.parse_hook(body, live.signature)
    except Problem as problem:
        request.service.note_refusal(live, problem)
        if problem.status != _WRONG_VALUE:
            raise
        request.service.record("cds-abstained", live, request.caller)
        return answer_json(cds.abstention(live.signature, problem))
    patient = parse_patient_id(body["context"]["patientId"])
    outputs = await request.service.predict(
        live, inputs, caller=request.caller, action="cds-hook", patient=patient
    )
    return answer_json(cds.cards(live.signature, inputs, outputs, privacy=live.privacy))


async def _cds_feedback(request: Request) -> Answer:
    live = request.live
    for said in cds.parse_feedback(parse_json(await request.body())):
        request.service.record("cds-" + said["outcome"], live, request.caller, facts=said)
        request.service.telemetry.told(live.signature.model, said["outcome"])
    return answer_json({})


async def _roll_back(request: Request) -> Answer:
    await request.body()
    model = request.live.signature.model
    return answer_json(await manage.roll_back(request.service, model, caller=request.caller))


async def _decide(request: Request) -> Answer:
    value = parse_json(await request.body())
    model, verb = str(request.parts[0]), request.parts[1]
    return answer_json(
        await manage.decide(
            request.service,
            model,
            value.get("version"),
            caller=request.caller,
            approve=verb == "approve",
        )
    )


async def _erase(request: Request) -> Answer:
    patient = parse_patient_id(parse_json(await request.body()).get("patient"))
    return answer_json(await manage.erase(request.service, patient, caller=request.caller))


async def _openapi(request: Request) -> Answer:
    catalogue = request.service.catalogue
    return answer_json(openapi.describe(catalogue.get(n).signature for n in catalogue.names()))


_PAGE_TYPES = {
    "index.html": b"text/html; charset=utf-8",
    "page.css": b"text/css; charset=utf-8",
    "page.js": b"text/javascript; charset=utf-8",
    "preact-htm.js": b"text/javascript; charset=utf-8",
    "uplot.css": b"text/css; charset=utf-8",
    "uplot.js": b"text/javascript; charset=utf-8",
    "LICENSES.txt": b"text/plain; charset=utf-8",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    b"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def _page_file(name: str) -> bytes:
    return (resources.files("fedward.serving") / "page" / name).read_bytes()


async def _page(request: Request) -> Answer:
    name = request.parts[0] or "index.html"
    headers = (
        (b"content-type", _PAGE_TYPES[name]),
        (b"content-security-policy", _POLICY),
        (b"x-content-type-options", b"nosniff"),
    )
    return Answer(_page_file(name), headers=headers)


PATIENT_HEADER = b"x-patient-id"
_LONGEST_ID = 128
_WRONG_VALUE = 422
_MOST_EXPLAINED = 32
_NAME = r"([^/:]+)"
_MODEL = rf"/v2/models/{_NAME}(?:/versions/([^/]+))?"
_INFER_PATH = re.compile(_MODEL + "/infer/?")
_CLINICIAN: tuple[Role, ...] = ("clinician",)
_OPERATOR: tuple[Role, ...] = ("operator",)
_WATCHING: tuple[Role, ...] = ("operator", "auditor")


def _route(
    name: str, method: str, path: str, handler: Handler, roles: tuple[Role, ...] | None
) -> Route:
    return Route(name, method, re.compile(path + "/?"), handler, roles)


ROUTES = (
    _route("infer", "POST", _MODEL + "/infer", _infer, _CLINICIAN),
    _route("predict", "POST", rf"/predict(?:/{_NAME})?", _predict, _CLINICIAN),
    _route("explain", "POST", rf"/explain(?:/{_NAME})?", _explain, _CLINICIAN),
    _route("outcomes", "POST", rf"/outcomes(?:/{_NAME})?", _outcome, _CLINICIAN),
    _route("ready", "GET", "/v2/health/ready", _ready, None),
    _route("live", "GET", "/v2/health/live", _alive, None),
    _route("server", "GET", "/v2", _server, ()),
    _route("model", "GET", _MODEL, _model, ()),
    _route("model-ready", "GET", _MODEL + "/ready", _model_ready, ()),
    _route("index", "POST", "/v2/repository/index", _index, ()),
    _route("v1-predict", "POST", rf"/v1/models/{_NAME}:predict", _v1_predict, _CLINICIAN),
    _route("v1-explain", "POST", rf"/v1/models/{_NAME}:explain", _v1_explain, _CLINICIAN),
    _route("v1-model", "GET", rf"/v1/models/{_NAME}", _model_ready, ()),
    _route("v1-models", "GET", "/v1/models", _v1_models, ()),
    _route("cds-services", "GET", "/cds-services", _cds_services, None),
    _route("cds-hook", "POST", rf"/cds-services/{_NAME}", _cds_hook, _CLINICIAN),
    _route("cds-feedback", "POST", rf"/cds-services/{_NAME}/feedback", _cds_feedback, _CLINICIAN),
    _route("metrics", "GET", "/metrics", _metrics, _WATCHING),
    _route("monitor", "GET", rf"/monitor(?:/{_NAME})?", _monitor, _WATCHING),
    _route("status", "GET", "/status", _status, _WATCHING),
    _route("graphql", "POST", "/graphql", _graphql, _CLINICIAN),
    _route("events", "GET", "/events", _events, _WATCHING),
    _route("decide", "POST", rf"/manage/models/{_NAME}/(approve|decline)", _decide, _OPERATOR),
    _route("erase", "POST", "/manage/erase", _erase, _OPERATOR),
    _route("openapi", "GET", r"/openapi\.json", _openapi, ()),
    _route("page", "GET", f"/({'|'.join(map(re.escape, _PAGE_TYPES))})?", _page, None),
    _route("roll-back", "POST", rf"/manage/models/{_NAME}/roll-back", _roll_back, _OPERATOR),
)
