"""An Optuna study with numbered trials, used by ask and tell, and the record of its trials on disk.

The sampler is seeded anew for every trial, from the seed of the study and the trial's number. Draws of the random sampler therefore do
not depend on the number of trials that run at once, or on where a command was stopped. TPE models the scores that are known when a trial
is chosen, so it repeats only when trials run one after the other.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.storage.atomic import write_json_atomic
from pipeline.sweeps.space import Space, distributions

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

SAMPLERS = ("random", "tpe")


class Study:
    """Chooses the settings of trial 0, 1, 2, ... and takes their scores, the higher the better.

    Args:
        space: settings to choose.
        sampler: one of SAMPLERS.
        seed: of the draws.
        first: settings of trial 0; the sampler chooses those of the space that are missing.
        recorded: settings of the trials of an earlier command, in order; they are chosen again.

    Attributes:
        settings: chosen so far, by trial number.
    """

    def __init__(
        self,
        space: Space,
        *,
        sampler: str,
        seed: int,
        first: Mapping[str, Any],
        recorded: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._sampler, self._seed = space, sampler, seed
        self._known = [dict(settings) for settings in recorded] or [dict(first)]
        self._study = optuna.create_study(direction="maximize")
        self._trials: list[Trial] = []
        self.settings: list[dict[str, Any]] = []

    def ask(self) -> int:
        """Choose the settings of the next trial and return its number."""
        number = len(self._trials)
        self._study.sampler = _sampler(self._sampler, self._seed, number)
        if number < len(self._known):
            self._study.enqueue_trial(self._known[number])
        with warnings.catch_warnings():
            # Of choices that are lists of values: only a database could not hold them.
            warnings.filterwarnings("ignore", "Choices for a categorical distribution")
            trial = self._study.ask(distributions(self._space))
        self._trials.append(trial)
        self.settings.append({key: trial.params[key] for key in self._space})
        return number

    def tell(self, number: int, score: float | None) -> None:
        """Set the score of a trial; None: it failed, and the sampler ignores it."""
        from optuna.trial import TrialState

        if score is None:
            self._study.tell(self._trials[number], state=TrialState.FAIL)
        else:
            self._study.tell(self._trials[number], score)


def _sampler(name: str, seed: int, number: int) -> BaseSampler:
    from optuna.samplers import RandomSampler, TPESampler

    seed_of_trial = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    # The trials before TPE's model begins are those of the random sampler.
    return RandomSampler(seed=seed_of_trial) if name == "random" else TPESampler(seed=seed_of_trial)


@dataclass
class SearchRecord:
    """The chosen settings of a search's trials, kept in a JSON file. Results are in the run folders of the trials.

    Args:
        file: of the record.
        chosen_by: everything that determines the settings, scores aside. A record with another value is not used.
        trials: settings of trial 0, 1, 2, ..., by dotted key.
        mlflow_run_id: of the run that the trials' runs are nested under.
    """

    file: Path
    chosen_by: Mapping[str, Any]
    trials: list[dict[str, Any]] = field(default_factory=list)
    mlflow_run_id: str | None = None

    @classmethod
    def read(cls, file: Path, chosen_by: Mapping[str, Any]) -> SearchRecord:
        """The record of an earlier command, or an empty one where there is none, or none that can be read."""
        record = cls(file, json.loads(json.dumps(chosen_by)))
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            record.mlflow_run_id = kept["mlflow_run_id"]
            if kept["chosen_by"] == record.chosen_by:
                record.trials = [{key: _as_setting(value) for key, value in trial.items()} for trial in kept["trials"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # The folders of the trials are found again wherever the same settings are chosen.
        return record

    def add(self, number: int, settings: Mapping[str, Any]) -> None:
        """Remember the settings of a trial, unless they are known."""
        if number == len(self.trials):
            self.trials.append(dict(settings))
            self.write()

    def write(self) -> None:
        """Write the file, at once and whole."""
        content = {"mlflow_run_id": self.mlflow_run_id, "chosen_by": self.chosen_by, "trials": self.trials}
        write_json_atomic(self.file, content)


def _as_setting(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
