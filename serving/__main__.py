"""`python -m fedward.serving`: the adapter alone, for a machine without the rest.

`--store DIR` serves; `keys add|revoke|list --store DIR` looks after who may ask; `approve` and
`decline --store DIR --by NAME MODEL VERSION` decide on what waits; `promote`, with the same words,
ends a candidate's stages; `log verify --store DIR` checks the audit log, and
`values show|erase --store DIR PATIENT` opens or erases what it keeps of a patient.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from fedward.core.errors import FedwardError
from fedward.serving.audit import read_log, verify_log
from fedward.serving.gate import add_key, read_keys, revoke_key
from fedward.serving.roles import Role
from fedward.serving.server import Options, serve
from fedward.serving.staging import Limits
from fedward.serving.store import Store
from fedward.serving.vault import Vault

_PROGRAM = "python -m fedward.serving"


def main(arguments: list[str] | None = None, *, program: str = _PROGRAM) -> int:
    """Serve until stopped; 1 for a failure that is explained on standard error.

    `program` is what help and usage call it.
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        match words[:1]:
            case ["keys"]:
                _keys(words[1:], program)
            case ["log"]:
                _log(words[1:], program)
            case ["values"]:
                _values(words[1:], program)
            case ["approve" | "decline" | "promote"]:
                _decide(words, program)
            case _:
                _serve(words, program)
    except (FedwardError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(words: list[str], program: str) -> None:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    _store_option(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help="gets host and port as JSON, once ready")
    parser.add_argument("--tls-certificate", type=Path, help="PEM chain; answers HTTPS only")
    parser.add_argument("--tls-key", type=Path, help="PEM private key")
    parser.add_argument("--look-every", type=float, default=0.25, help="seconds between looks")
    parser.add_argument("--rate", type=float, default=5000.0, help="requests a second by caller")
    parser.add_argument(
        "--record-values",
        action="store_true",
        help="keep patients' values in the audit log, sealed and erasable by X-Patient-Id",
    )
    parser.add_argument("--otlp", metavar="URL", help="OpenTelemetry collector to send spans to")
    parser.add_argument("--grpc-port", type=int, help="answers gRPC there, too; 0: a free one")
    parser.add_argument(
        "--registry", type=_registry, help="to follow: a folder, or oci://HOST/NAME"
    )
    parser.add_argument("--root", type=Path, help="the registry's pinned root of trust")
    parser.add_argument("--fetch-every", type=float, default=60.0, help="seconds between looks")
    for name, kind, about in _STAGES:
        parser.add_argument(f"--{name}", type=kind, help=about)
    chosen = parser.parse_args(words)
    options = Options(
        ready_file=chosen.ready_file,
        tls_certificate=chosen.tls_certificate,
        tls_key=chosen.tls_key,
        look_every=chosen.look_every,
        rate=chosen.rate,
        grpc_port=chosen.grpc_port,
        registry=chosen.registry,
        root=chosen.root,
        fetch_every=chosen.fetch_every,
        record_values=chosen.record_values,
        otlp=chosen.otlp,
    )
    serve(Store(chosen.store, limits=_limits(chosen)), chosen.host, chosen.port, options=options)


def _registry(text: str) -> Path | str:
    return text if text.startswith("oci://") else Path(text)


_STAGES: tuple[tuple[str, type, str], ...] = (
    ("shadow", int, "rows that a new release answers for nobody first; default 0"),
    ("canary", int, "rows that it then answers for a share of callers; default 0"),
    ("share", float, "of the requests that a canary answers; default 0.1"),
    ("tolerance", float, "difference of a probability that is a disagreement; default 0.1"),
    ("max-disagreement", float, "share of rows that may disagree; default 0.1"),
    ("max-slowdown", float, "times the serving version's median time; default 3"),
    ("max-errors", int, "requests on which it may fail; default 0"),
)


def _limits(chosen: argparse.Namespace) -> Limits | None:
    """The stages that were asked for; None if the store's policy says."""
    names = [name.replace("-", "_") for name, _, _ in _STAGES]
    given = {name: getattr(chosen, name) for name in names if getattr(chosen, name) is not None}
    return Limits(**given) if given else None


def _keys(words: list[str], program: str) -> None:
    parser = argparse.ArgumentParser(prog=f"{program} keys")
    parser.add_argument("do", choices=("add", "revoke", "list"))
    _store_option(parser)
    parser.add_argument("name", nargs="?", default="", help="whose key; goes into the audit log")
    parser.add_argument("role", nargs="?", choices=get_args(Role), default="clinician")
    # Intermixed: else a name after `--store DIR` is taken for one word too many.
    chosen = parser.parse_intermixed_args(words)
    file = chosen.store / "state" / "keys.json"
    match chosen.do:
        case "add":
            print(add_key(file, name=chosen.name, role=chosen.role))
        case "revoke":
            revoke_key(file, name=chosen.name)
        case _:
            for key in read_keys(file):
                print(f"{key.name}\t{key.role}")


def _log(words: list[str], program: str) -> None:
    parser = argparse.ArgumentParser(prog=f"{program} log")
    parser.add_argument("do", choices=("verify",))
    _store_option(parser)
    lines, head = verify_log(parser.parse_args(words).store / "state" / "audit.jsonl")
    print(f"{lines} lines verify; head {head}")


def _values(words: list[str], program: str) -> None:
    parser = argparse.ArgumentParser(prog=f"{program} values")
    parser.add_argument("do", choices=("show", "erase", "rotate"))
    _store_option(parser)
    parser.add_argument("patient", nargs="?", default="", help="as X-Patient-Id said")
    chosen = parser.parse_intermixed_args(words)
    state = chosen.store / "state"
    vault = Vault(state)
    match chosen.do:
        case "show":
            verify_log(state / "audit.jsonl")
            for line in vault.show(chosen.patient, read_log(state / "audit.jsonl")):
                print(json.dumps(line))
        case "erase":
            print("erased" if vault.erase(chosen.patient) else "nothing was kept")
        case _:
            vault.rotate()


def _decide(words: list[str], program: str) -> None:
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument("do", choices=("approve", "decline", "promote"))
    _store_option(parser)
    parser.add_argument("--by", required=True, help="your name; it is kept")
    parser.add_argument("model")
    parser.add_argument("version", type=int)
    chosen = parser.parse_args(words)
    store = Store(chosen.store)
    if chosen.do == "promote":
        if not chosen.by.strip():
            raise ValueError("a promotion needs a name")
        store.advance(chosen.model, chosen.version, by=chosen.by)
        return
    store.decide(chosen.model, chosen.version, by=chosen.by, approve=chosen.do == "approve")


def _store_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", type=Path, required=True, help="folder of verified releases")


if __name__ == "__main__":
    sys.exit(main())
