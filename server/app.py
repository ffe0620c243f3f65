"""The Flower ServerApp: moves bytes between the grid and the round loop."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedward.core.errors import ConfigError, FedwardError
from fedward.core.identity import Identity
from fedward.core.roster import load_roster
from fedward.core.run import RunDirectory
from fedward.core.study import load_study
from fedward.server.channel import Channel, FlowerChannel
from fedward.server.rounds import Settings, coordinate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run configuration names.

    Run configuration: `run` (the run directory, prepared), `registry` and `publisher` (paths at
    the coordinator), `roster` (likewise, for secure aggregation), `sites` (how many to wait for),
    `deadline` (seconds for an answer), `durable` (false only in simulations: whether a power cut
    may take checkpoints).
    """
    run_study(FlowerChannel(grid), context)


def run_study(channel: Channel, context: Context) -> None:
    """What the app does, over any channel; the run configuration is as in `main`."""
    config = context.run_config
    run = RunDirectory.open(Path(_text(config, "run")))
    settings = Settings(
        registry=Path(_text(config, "registry")),
        sites=int(config.get("sites", 1)),
        patience=float(config.get("patience", 120.0)),
        deadline=float(config.get("deadline", 600.0)),
        roster=load_roster(Path(str(config["roster"]))) if config.get("roster") else None,
        durable=bool(config.get("durable", True)),
    )
    try:
        coordinate(
            channel,
            load_study(run.path / "study.toml"),
            run,
            settings=settings,
            publisher=Identity.load(Path(_text(config, "publisher"))),
        )
    except FedwardError as error:
        # Whoever started the run may be another process: this line is how it learns why.
        run.event("aborted", error=type(error).__name__, reason=str(error))
        raise


def _text(config: object, key: str) -> str:
    value = config.get(key) if isinstance(config, dict) else None
    if not isinstance(value, str):
        raise ConfigError("is missing; start runs with `fedward`", file="run config", key=key)
    return value
