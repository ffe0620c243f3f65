"""`python -m fedward.serving --store DIR`: the adapter alone, for a machine without the rest."""

import argparse
import sys
from pathlib import Path

from fedward.core.errors import FedwardError
from fedward.serving.server import serve
from fedward.serving.store import Store


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; 1 for a failure that is explained on standard error."""
    parser = argparse.ArgumentParser(prog="python -m fedward.serving", description=__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of verified releases")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--ready-file", type=Path, help="gets host and port as JSON, once ready")
    options = parser.parse_args(arguments)
    try:
        serve(Store(options.store), options.host, options.port, ready_file=options.ready_file)
    except (FedwardError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
