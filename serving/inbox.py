"""Releases that came over the wire, into service."""

import shutil
import sys

from fedward.core.errors import FedwardError
from fedward.core.inbox import waiting
from fedward.serving.store import Store


def install_inbox(store: Store) -> list[str]:
    """Install every release that waits in the store's inbox, oldest version first.

    What is refused is kept with its reason by the store, said on standard error, and removed from
    the inbox; what serves today goes on serving.

    Returns:
        The labels of what was installed.
    """
    installed = []
    for folder in waiting(store.folder):
        try:
            installed.append(store.install(folder, store.trusted()).label)
        except FedwardError as error:
            print(f"refused: {error}", file=sys.stderr)
        shutil.rmtree(folder)
    return installed
