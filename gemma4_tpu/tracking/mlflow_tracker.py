"""MLflow behind the interface of `tracker.py`: at the server that MLFLOW_TRACKING_URI names, else in the run folder."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from gemma4_tpu.config.outputs import TrackerConfig
from gemma4_tpu.tracking.run import RunFolder
from gemma4_tpu.tracking.tracker import Tracker, identity, is_good

log = logging.getLogger(__name__)

_ID = "gemma4_tpu.id"
"""Tag by which a resumed run is found again, since MLflow chooses its own ids."""


class MlflowTracker(Tracker):
    """A run of the experiment `tracker.project`; its parameters are the resolved configuration's."""

    def __init__(self, config: TrackerConfig, run: RunFolder, resolved: dict[str, Any], name: str, job: str):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.exceptions import MlflowException

        self._metric = Metric
        local, files = f"sqlite:///{run.path / 'mlflow.db'}", (run.path / "mlflow").as_uri()
        uri = os.environ.get("MLFLOW_TRACKING_URI", local)
        self._client, known = MlflowClient(tracking_uri=uri), identity(run, name)
        with suppress(MlflowException):  # it exists, or another job of the sweep was faster
            self._client.create_experiment(config.project, artifact_location=files if uri == local else None)
        experiment = self._client.get_experiment_by_name(config.project)
        assert experiment is not None
        place = experiment.experiment_id
        found = self._client.search_runs([place], f"tags.`{_ID}` = '{known['id']}'", max_results=1)
        about = {_ID: known["id"], "job": job, "group": config.group or "", "tags": ", ".join(config.tags)}
        made = found[0] if found else self._client.create_run(place, tags=about, run_name=known["name"])
        self._run = made.info.run_id
        self._client.update_run(self._run, status="RUNNING")
        params = [] if found else [Param(key, str(value)) for key, value in _flat(resolved)]  # they never change
        for first in range(0, len(params), 100):  # what its server takes at once
            self._client.log_batch(self._run, params=params[first : first + 100])
        log.info("MLflow: run %s; %s", self._run, f"mlflow ui --backend-store-uri {uri}" if uri == local else "online")

    def log(self, metrics: dict[str, Any], update: int) -> None:
        """As `Tracker.log`."""
        now, numbers = int(time.time() * 1000), {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        self._client.log_batch(self._run, [self._metric(key, value, now, update) for key, value in numbers.items()])

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], update: int) -> None:
        """As `Tracker.table`: MLflow appends, so the rows tell their update."""
        by_column = dict(zip(["update", *columns], zip(*[(update, *row) for row in rows], strict=True), strict=True))
        self._client.log_table(self._run, {key: list(values) for key, values in by_column.items()}, f"{name}.json")

    def artifact(self, kind: str, place: str, aliases: Sequence[str], metadata: dict[str, Any]) -> None:
        """As `Tracker.artifact`: a tag for each alias, since MLflow's artifacts are copies."""
        for alias in ["latest", *aliases]:
            self._client.set_tag(self._run, f"{kind}/{alias}", place)

    def summary(self, values: dict[str, Any]) -> None:
        """As `Tracker.summary`: numbers as metrics, words as tags."""
        self.log({f"result/{key}": value for key, value in values.items()}, 0)
        for key in [key for key, value in values.items() if isinstance(value, str)]:
            self._client.set_tag(self._run, f"result/{key}", values[key])

    def close(self, status: str = "finished") -> None:
        """As `Tracker.close`."""
        self._client.set_terminated(self._run, "FINISHED" if is_good(status) else "FAILED")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, as on the command line; what a user named, such as a pattern, stays in its value."""
    for key, value in values.items():
        nested = isinstance(value, dict) and value and all(map(str.isidentifier, value))
        yield from _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
