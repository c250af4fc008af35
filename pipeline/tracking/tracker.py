"""One MLflow run, written through `MlflowClient` alone.

MLflow itself is behind `pipeline.tracking.client`. The fluent interface (`mlflow.log_metric` and the like) keeps a current
run per process and starts runs by itself, which in Ray's processes leaves stray ones; here every call names its run.
A `Tracker` holds texts and paths, so it can be sent to another process and log from there.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.tracking.client import (
    is_unreachable,
    one_line_errors,
    quiet,
    short_timeouts,
)
from pipeline.tracking.delivery import send
from pipeline.tracking.onnx_model import MAX_METRICS, ModelCall
from pipeline.tracking.outbox import Outbox

# MLflow's own limits on one log_batch call, and on the length of a value.
MAX_PARAMS, MAX_TAGS = 100, 100
MAX_PARAM_LENGTH, MAX_TAG_LENGTH = 6000, 5000
# A store that is away is asked again no sooner, so that a training is not held up at every epoch.
RETRY_AFTER_S = 30.0
_retry_at: dict[str, float] = {}
_noted: set[str] = set()


@dataclass(frozen=True)
class Tracker:
    """One MLflow run, or, without a run id, nothing: every call is then a no-op.

    With an outbox no call fails because the store is away: what it should get is kept there, and delivered when the store answers again. A
    refusal is a TrackingError in any case.
    """

    uri: str = ""
    run_id: str | None = None
    outbox: Outbox | None = None
    prefix: str = ""
    """Of the names of metrics."""

    def named(self, prefix: str) -> Tracker:
        """The same run, and metrics by the names ``<prefix>.<name>``."""
        return replace(self, prefix=f"{prefix}.")

    def of(self, run_id: str | None) -> Tracker:
        """The same store, and another run."""
        return replace(self, run_id=run_id)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters by dotted key, but for those that are None. A value logged before cannot change."""
        entries = [[_name(key), str(value)[:MAX_PARAM_LENGTH]] for key, value in params.items() if value is not None]
        for start in range(0, len(entries), MAX_PARAMS):
            self._send("params", {"entries": entries[start : start + MAX_PARAMS]})

    def log_metrics(self, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log numbers at one step (an epoch). Entries that are no numbers are left out."""
        time_ms = now_ms()
        entries = [
            [_name(self.prefix + key), float(value), time_ms, step]
            for key, value in metrics.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        ]
        for start in range(0, len(entries), MAX_METRICS):
            self._send("metrics", {"entries": entries[start : start + MAX_METRICS]})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, such as the hashes of the bucket maps."""
        entries = [[_name(key), str(value)[:MAX_TAG_LENGTH]] for key, value in tags.items()]
        for start in range(0, len(entries), MAX_TAGS):
            self._send("tags", {"entries": entries[start : start + MAX_TAGS]})

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, Any]) -> None:
        """Log the data that a run was trained on.

        Args:
            digest: equal for equal data, at most 36 characters.
            source: path or URI.
            profile: numbers of the data, such as users and interactions.
        """
        self._send("dataset", {"name": name, "digest": digest, "source": source, "profile": dict(profile)})

    def rename(self, name: str) -> None:
        """Give the run another name."""
        self._send("rename", {"name": name})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Store a file, or all of a folder, below `folder` of the run's artifacts. Delivered later, it is what lies there then."""
        self._send("artifact", {"path": str(Path(path).absolute()), "folder": folder})

    def log_onnx_model(self, model_path: Path, call: ModelCall, tags: Mapping[str, str] | None = None) -> None:
        """Log an ONNX file as an MLflow model of the onnx flavour.

        Args:
            model_path: `model.onnx`, with its data file beside it if it has one.
            call: an example, stored with the model. The signature is read from the graph.
            tags: of the model, to find it by.
        """
        content = {
            "path": str(Path(model_path).absolute()),
            "example": {name: [array.dtype.str, array.tolist()] for name, array in call.inputs.items()},
            "tags": dict(tags or {}),
            "outputs": list(call.outputs),
        }
        self._send("model", content)

    def reopen(self) -> None:
        """Mark the run as RUNNING."""
        self._send("status", {"status": "RUNNING", "end_time": None})

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        # The last chance of this command to deliver what was kept.
        _retry_at.pop(self.uri, None)
        self._send("status", {"status": status, "end_time": now_ms()})
        if self.run_id is not None and self.outbox is not None:
            self.outbox.ended(self.run_id)

    def _send(self, kind: str, content: dict[str, Any]) -> None:
        if self.run_id is not None and content.get("entries") != []:
            self._send_to(self.run_id, kind, content)  # Imports MLflow.

    @one_line_errors
    def _send_to(self, run_id: str, kind: str, content: dict[str, Any]) -> None:
        if self.outbox is None:
            with quiet():
                send(self.uri, None, run_id, kind, content)
            return
        if time.monotonic() >= _retry_at.get(self.uri, 0.0):
            try:
                with quiet(), short_timeouts():
                    n = len(self.outbox)
                    if n and (n := self.outbox.deliver(functools.partial(send, self.uri, self.outbox), is_unreachable)):
                        _noted.discard(self.uri)
                        note(f"MLflow answers again; {n} entries delivered")
                    # While another process delivers, older entries of this run may still lie there.
                    if not len(self.outbox):
                        send(self.uri, self.outbox, self.outbox.real_id(run_id), kind, content)
                        return
            except Exception as error:
                if not is_unreachable(error):
                    raise
                if self.uri not in _noted:
                    _noted.add(self.uri)
                    note(
                        f"MLflow does not answer; what it should get is kept in {self.outbox.folder} and delivered later"
                    )
                _retry_at[self.uri] = time.monotonic() + RETRY_AFTER_S
        self.outbox.put(run_id, kind, content)


def note(line: str) -> None:
    """Tell the user on standard error, whatever the level of messages."""
    print(f"graphhash: {line}", file=sys.stderr, flush=True)


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)


def _name(key: str) -> str:
    return key.replace("@", "_at_")  # MLflow's names have no @.
