"""Delivery of an entry to MLflow: which call of its client each kind of entry becomes.

`pipeline.tracking.tracker` makes entries; `pipeline.tracking.outbox` keeps them while MLflow is unreachable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage.uris import is_uri
from pipeline.tracking.client import client_of
from pipeline.tracking.onnx_model import log_onnx_model
from pipeline.tracking.outbox import PROVISIONAL, Outbox

if TYPE_CHECKING:
    from mlflow import MlflowClient


def send(uri: str, outbox: Outbox | None, run_id: str, kind: str, content: Mapping[str, Any]) -> str | None:
    """Deliver an entry about a run.

    Args:
        uri: of the store.
        outbox: has the real ids of runs that were opened while the store was unreachable; None: there are none.
        kind, content: of the entry, as `Tracker` makes them.

    Returns: the id of the run that was opened, for "create"; else None.

    Raises:
        ValueError: the run was never opened, or there is no such kind of entry.
        FileNotFoundError: a file to store has been removed or replaced since.
    """
    from mlflow.entities import Metric, Param, RunStatus, RunTag

    client = client_of(uri)
    if run_id.startswith(PROVISIONAL) and kind != "create":
        raise ValueError(f"the run {run_id} was never opened")
    match kind:
        case "create":
            tags = dict(content["tags"])
            if outbox is not None and "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = outbox.real_id(tags["mlflow.parentRunId"])
            run = client.create_run(content["experiment_id"], content["start_time"], tags, run_name=content["name"])
            return str(run.info.run_id)
        case "params":
            client.log_batch(run_id, params=[Param(*entry) for entry in content["entries"]])
        case "metrics":
            client.log_batch(run_id, metrics=[Metric(*entry) for entry in content["entries"]])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(*entry) for entry in content["entries"]])
        case "dataset":
            _log_dataset(client, run_id, content)
        case "rename":
            client.update_run(run_id, name=content["name"])
        case "status" if RunStatus.is_terminated(RunStatus.from_string(content["status"])):
            client.set_terminated(run_id, content["status"], content["end_time"])
        case "status":
            client.update_run(run_id, status=content["status"])
        case "artifact":
            path = Path(content["path"])
            if not path.exists():
                raise FileNotFoundError(f"{path} is no longer there")
            (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), content["folder"])
        case "model":
            log_onnx_model(uri, run_id, Path(content["path"]), content["example"], content["tags"], content["outputs"])
        case _:
            raise ValueError(f"{kind!r} is not a kind of entry")
    return None


def _log_dataset(client: MlflowClient, run_id: str, content: Mapping[str, Any]) -> None:
    """A dataset as an input of a run; the same one a second time changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = content["source"]
    dataset = Dataset(
        name=content["name"],
        digest=content["digest"],
        source_type=source.partition("://")[0] if is_uri(source) else "local",
        source=json.dumps({"uri": source}),
        profile=json.dumps(content["profile"]),
    )
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
