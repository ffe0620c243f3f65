"""Whether a study can be simulated, found out before anything is written."""

from pathlib import Path

import numpy as np

from fedward.core.canonical import canonical_json
from fedward.core.errors import ConfigError
from fedward.core.study import Study
from fedward.server.rounds import refuse_impossible
from fedward.simulations.engines import refuse_engine
from fedward.simulations.provision import site_names
from fedward.simulations.scenarios import make_scenario
from fedward.tasks import datasets
from fedward.tasks.registry import get_task
from fedward.tasks.study_model import study_model


class Checks:
    """Holds studies that differ in a few lines against what can be run.

    Args:
        study_file: Paths in the studies are relative to it.
    """

    def __init__(self, study_file: Path) -> None:
        self._study_file = study_file
        self._names: dict[bytes, list[str]] = {}

    def check(self, study: Study, *, file: str) -> None:
        """Check one study.

        Args:
            study: The study.
            file: What errors call it.

        Raises:
            ConfigError: It cannot be run.
        """
        try:
            task = get_task(study.study.task)
            study_model(study, task)
            refuse_engine(study, runtime=study.simulation.runtime)
            names = self._sites_of(study)
            refuse_impossible(study, dict.fromkeys(names) if study.aggregation.secure else None)
            scenario = make_scenario(study, sorted(names))
            if scenario.has_trigger and study.simulation.sites is None:
                table = datasets.pooled(study.simulation.dataset or task.name)
                scenario.trigger(task.prepare(table.take(np.arange(1)), None))
        except ConfigError as error:
            if error.file != "study":
                raise
            raise ConfigError(error.problem, file=file, key=error.key) from error

    def _sites_of(self, study: Study) -> list[str]:
        """The names of a study's sites; found once for those who spread the data alike."""
        asked = study.simulation.model_dump(
            mode="json", include={"sites", "dataset", "partition", "args", "leave_out"}
        )
        key = canonical_json({**asked, "task": study.study.task, "seed": study.study.seed})
        if key not in self._names:
            self._names[key] = site_names(study, study_file=self._study_file)
        return self._names[key]
