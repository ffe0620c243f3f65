"""The Flower ClientApp: moves bytes between Flower and the local site."""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedward.client import secure
from fedward.client.answers import admit_study, evaluate_release, take_release, train_round
from fedward.client.local_site import LocalSite
from fedward.client.monitor import release_histograms
from fedward.core.errors import ConfigError, FedwardError
from fedward.transport.payload import Payload, pack, unpack

SIMULATED_SITES = "FEDWARD_SIMULATED_SITES"
"""Environment variable that names a file with one site file a line, for Flower's Simulation
Runtime, which gives a node only its number. The process that simulates sets it; a coordinator
cannot."""


Act = Callable[[LocalSite, Payload], Payload]

_TRAIN: Mapping[str, Act] = {
    "update": train_round,
    "key": secure.send_key,
    "share": secure.send_shares,
    "shares": secure.send_later_shares,
    "confirm": secure.confirm,
    "unmask": secure.unmask,
    "monitor": release_histograms,
}
_QUERY: Mapping[str, Act] = {"admit": admit_study, "publish": take_release}
_EVALUATE: Mapping[str, Act] = {"metrics": evaluate_release}


def make_app(
    open_site: Callable[[Context], LocalSite], *, pack: Callable[[Payload], RecordDict] = pack
) -> ClientApp:
    """A ClientApp that answers for the site that `open_site` finds for a node.

    Args:
        open_site: Of a node's context, its site.
        pack: How an answer becomes Flower's records.
    """
    made = ClientApp()

    def answering(act: Act) -> Callable[[Message, Context], Message]:
        def answer(message: Message, context: Context) -> Message:
            try:
                reply = act(open_site(context), unpack(message.content, sender="coordinator"))
            except FedwardError as error:
                reply = refusal(error)
            return Message(pack(reply), reply_to=message)

        return answer

    for action, act in _QUERY.items():
        made.query(action)(answering(act))
    for action, act in _TRAIN.items():
        made.train(action)(answering(act))
    for action, act in _EVALUATE.items():
        made.evaluate(action)(answering(act))
    return made


def refusal(error: FedwardError) -> Payload:
    """What a site answers where it does not do what it was asked."""
    return Payload({"refused": str(error), "kind": type(error).__name__})


def open_site(context: Context) -> LocalSite:
    """The site of a node, opened once a process."""
    return _open(str(_site_file(context)))


def _site_file(context: Context) -> Path:
    config = context.node_config
    if isinstance(config.get("site"), str):
        return Path(str(config["site"]))
    listing = os.environ.get(SIMULATED_SITES)
    if listing is not None and "partition-id" in config:
        files = Path(listing).read_text(encoding="utf-8").splitlines()
        return Path(files[int(config["partition-id"])])
    raise ConfigError(
        "names no site; start the SuperNode with --node-config 'site=\"/path/to/site.toml\"'",
        file="node config",
    )


@lru_cache(maxsize=4096)
def _open(file: str) -> LocalSite:
    return LocalSite(Path(file))


app = make_app(open_site)
