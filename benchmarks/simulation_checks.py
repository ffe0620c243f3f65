"""What `simulation.py` measures in its own process: the bare grid, and a study full of trouble."""

import re
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedward.core.run import RunDirectory
from fedward.server.channel import FlowerChannel
from fedward.simulations.grid import InProcessGrid
from fedward.transport.payload import InMemory, Payload, unpack

_SITES, _PARAMETERS, _TIMES = 1000, 2114, 5

TROUBLED = """\
[study]
name = "troubled"
task = "heart-disease"
rounds = 12
seed = 7
[model]
name = "logistic"
[training]
local_steps = 1
sample_rate = 0.3
learning_rate = 1.0
[privacy]
mode = "none"
acknowledge = "no privacy"
[aggregation]
secure = false
min_sites = 2
[simulation]
partition = "dirichlet"
args = { num_sites = 10, alpha = 5.0 }
dropout = { kind = "independent", rate = 0.3 }
stragglers = { median = 30.0, spread = 1.0, deadline = 120.0 }
malicious = { attack = "sign-flip", sites = 2 }
"""


def milliseconds_a_message() -> float:
    """A message to a ClientApp that does nothing and its answer, with parameters both ways."""
    app = ClientApp()

    @app.train("nothing")
    def nothing(message: Message, context: Context) -> Message:  # noqa: ARG001 (Flower's names)
        arrays = unpack(message.content, sender="coordinator").arrays
        answer = Payload({"site": "a", "round": 1}, {"update": arrays["parameters"]})
        return Message(InMemory(answer), reply_to=message)

    grid = InProcessGrid(app, [{"site": str(number)} for number in range(_SITES)])
    channel = FlowerChannel(grid, pack=InMemory)
    asked = Payload({"round": 1}, {"parameters": np.zeros(_PARAMETERS, np.float32)})
    seconds = []
    for _ in range(_TIMES):
        begun = time.process_time()
        payloads = dict.fromkeys(channel.node_ids(), asked)
        for reply in channel.ask("train.nothing", payloads, round_number=1, deadline=60):
            if reply.payload is None:
                raise RuntimeError(reply.problem)
        seconds.append(time.process_time() - begun)
    return statistics.median(seconds) / _SITES * 1e3


def share_of_happenings_in_the_report() -> tuple[float, Counter[str]]:
    """Run ten sites with 30% dropout, stragglers and two attackers, and read the report.

    Returns:
        How much of what happened is counted right in the report's row of the site to which it
        happened, and how often each thing happened.
    """
    from fedward.simulations.report import write_report
    from fedward.simulations.simulate import prepare_run, simulate

    with tempfile.TemporaryDirectory(prefix="fedward-troubled-") as folder:
        study = Path(folder) / "study.toml"
        study.write_text(TROUBLED)
        run = prepare_run(study, Path(folder) / "run")
        simulate(study, run)
        page = write_report(run).read_text()
        told, happened = _told(page), _happened(run)
    right = sum(number for what, number in happened.items() if told[what] == number)
    counts: Counter[str] = Counter()
    for (kind, _), number in happened.items():
        counts[kind] += number
    return right / happened.total(), counts


def _happened(run: RunDirectory) -> Counter[tuple[str, str]]:
    """How often each thing happened to each site."""
    kinds = ("dropped", "late", "attacked")
    return Counter((e["event"], e["site"]) for e in run.events() if e["event"] in kinds)


def _told(page: str) -> Counter[tuple[str, str]]:
    """The same, as the report's table "What happened to whom" has it."""
    _, _, after = page.partition("What happened to whom")
    table, _, _ = after.partition("</table>")
    kinds = re.findall(r"<th>(.*?)</th>", table)[1:-1]
    told: Counter[tuple[str, str]] = Counter()
    for row in re.findall(r"<tr>(<td>.*?)</tr>", table):
        site, *cells, _ = re.findall(r"<td>(.*?)</td>", row)
        for kind, cell in zip(kinds, cells, strict=True):
            number, _, _ = cell.partition(": ")
            told[kind, site] += int(number) if number.isdigit() else 0
    return told
