"""What a store serves, read from its files by the side that has no adapter.

The adapter writes `STORE/serving.json` and `STORE/releases/MODEL/VERSION/`; see docs/serving.md.
"""

import json
from pathlib import Path

from fedward.core.errors import ReleaseRejected
from fedward.core.identity import PublicIdentity
from fedward.core.release import Release, read_release, valid_name


def served_release(store: Path, model: str, trusted: PublicIdentity) -> Release | None:
    """The release of `model` that a store serves, verified again; None if it serves none.

    Raises:
        ReleaseRejected: What the store says cannot be read, or the folder holds another release.
        SignatureInvalid: A stored file changed since it was installed.
    """
    try:
        text = (store / "serving.json").read_bytes()
    except FileNotFoundError:
        return None
    try:
        entry = json.loads(text).get(model)
        if entry is None:
            return None
        version = int(entry["version"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ReleaseRejected(release=str(store / "serving.json"), reason="malformed") from error
    if not valid_name(model):
        raise ReleaseRejected(release=model, reason="its name is not allowed")
    release = read_release(store / "releases" / model / str(version), trusted)
    if (release.signature.model, release.signature.version) != (model, version):
        raise ReleaseRejected(release=f"{model}/{version}", reason=f"it holds {release.label}")
    return release
