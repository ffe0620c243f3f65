"""The Flower ClientApp: moves bytes between Flower and the local site."""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedward.client import secure
from fedward.client.answers import admit_study, evaluate_release, take_release, train_round
from fedward.client.local_site import LocalSite
from fedward.core.errors import ConfigError, FedwardError
from fedward.transport.payload import Payload, pack, unpack

SIMULATED_SITES = "FEDWARD_SIMULATED_SITES"
"""Environment variable that names a file with one site file a line, for Flower's Simulation
Runtime, which gives a node only its number. The process that simulates sets it; a coordinator
cannot."""

app = ClientApp()


@app.query("admit")
def admit(message: Message, context: Context) -> Message:
    """Hold the study against the site's policy and budget."""
    return _answer(message, context, admit_study)


@app.train("update")
def train(message: Message, context: Context) -> Message:
    """Train one round."""
    return _answer(message, context, train_round)


@app.train("key")
def send_key(message: Message, context: Context) -> Message:
    """Secure aggregation: this site's signed key."""
    return _answer(message, context, secure.send_key)


@app.train("share")
def send_shares(message: Message, context: Context) -> Message:
    """Secure aggregation: shares for the other sites."""
    return _answer(message, context, secure.send_shares)


@app.train("shares")
def send_later_shares(message: Message, context: Context) -> Message:
    """Secure aggregation: shares of later rounds."""
    return _answer(message, context, secure.send_later_shares)


@app.train("confirm")
def confirm(message: Message, context: Context) -> Message:
    """Secure aggregation: sign who survives."""
    return _answer(message, context, secure.confirm)


@app.train("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Secure aggregation: shares that unmask the sum."""
    return _answer(message, context, secure.unmask)


@app.evaluate("metrics")
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate a model on held-out patients."""
    return _answer(message, context, evaluate_release)


@app.query("publish")
def accept_release(message: Message, context: Context) -> Message:
    """Take a release into the store."""
    return _answer(message, context, take_release)


def _answer(
    message: Message, context: Context, act: Callable[[LocalSite, Payload], Payload]
) -> Message:
    try:
        site = _open(str(_site_file(context)))
        reply = act(site, unpack(message.content, sender="coordinator"))
    except FedwardError as error:
        reply = Payload({"refused": str(error), "kind": type(error).__name__})
    return Message(pack(reply), reply_to=message)


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
