"""The state of a local sweep: Optuna's study in a SQLite file, which survives a kill; runs are its trials."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.sweep.definition import Sweep, Values, combinations
from qsam2.sweep.parameters import LOCAL, LOGARITHMIC, Parameter

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:  # an extra
    raise UserError(
        "a sweep without a Weights & Biases account draws its runs with Optuna, which is not installed: "
        "pip install 'qsam2[sweep]', or wandb login"
    ) from error

STUDY = "sweep.db"
"""In a sweep's folder: the state of all runs."""


@dataclass(frozen=True)
class SweepRun:
    """A run as it stands; `state` is finished, failed, stopped (early), cut off or to come."""

    number: str
    """Its folder's name."""
    values: Values
    state: str
    metric: float | None
    seconds: float | None
    error: str | None


class Study:
    """The runs of a sweep; call it from one thread at a time.

    Raises:
        UserError: the folder holds another sweep, the file draws what only W&B can, the disk is full.
    """

    def __init__(self, sweep: Sweep, folder: Path, runs: int | None) -> None:
        for key, parameter in sweep.drawn.items():
            if parameter.kind not in LOCAL:
                raise UserError(
                    f"sweep {sweep.file}: parameters.{key}: distribution={parameter.kind} is drawn by W&B only: "
                    f"wandb login, or give one of {', '.join(LOCAL)}"
                )
        self.sweep, self.folder = sweep, folder
        self.runs = count_runs(sweep, runs)
        self.distributions = {key: _distribution(parameter) for key, parameter in sweep.drawn.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _room(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._study = optuna.create_study(
                study_name="sweep",
                storage=f"sqlite:///{folder / STUDY}",
                pruner=_pruner(sweep),
                direction=sweep.definition.metric.goal,
                load_if_exists=True,
            )
            self._study.sampler = _sampler(sweep, seed=len(self._study.get_trials(deepcopy=False)))
            self._check_same()

    def begin(self) -> int:
        """Queue what failed and, of a grid, all that is to come; returns how many runs are left."""
        with _room(self.folder):
            trials = self._latest()
            for number, trial in trials.items():
                if trial.state is TrialState.FAIL:
                    self._study.enqueue_trial(trial.params, user_attrs={"number": number})
            if self.sweep.definition.method == "grid":
                for index, values in zip(range(self.runs), combinations(self.sweep), strict=False):
                    if (number := f"{index:03d}") not in trials:
                        self._study.enqueue_trial(self._params(values), user_attrs={"number": number})
            trials = self._latest()
            self._cut_off = [trial for trial in trials.values() if trial.state is TrialState.RUNNING]
            done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials.values())
            self.left = max(self.runs - done, 0)
        return self.left

    def ask(self) -> Trial | None:
        """The next run: first what was cut off, then what is queued, then one that is drawn; None at the end."""
        if self.left == 0 or self._reached_target():
            return None
        self.left -= 1
        with _room(self.folder):
            if self._cut_off:
                return Trial(self._study, self._cut_off.pop(0)._trial_id)
            return self._study.ask(self.distributions)

    def values(self, trial: Trial | FrozenTrial) -> Values:
        """What a run was given, in the file's order."""
        params = trial.params
        if isinstance(trial, FrozenTrial) and trial.state is TrialState.WAITING:
            params = trial.system_attrs["fixed_params"]
        drawn = self.sweep.drawn
        return {key: json.loads(params[key]) if _listed(drawn[key]) else params[key] for key in drawn if key in params}

    def tell(
        self, trial: Trial, *, metric: float | None = None, seconds: float | None = None, error: str | None = None
    ) -> None:
        """How a run ended: with its metric, with an error, or with neither where it was stopped early."""
        with _room(self.folder):
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("error", error)
            state = TrialState.FAIL if error else TrialState.COMPLETE if metric is not None else TrialState.PRUNED
            self._study.tell(trial, values=metric if state is TrialState.COMPLETE else None, state=state)

    def board(self) -> list[SweepRun]:
        """All runs that were begun or queued, by number."""
        words = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.PRUNED: "stopped"}
        words |= {TrialState.RUNNING: "cut off", TrialState.WAITING: "to come"}
        return [
            SweepRun(
                number,
                self.values(trial),
                words[trial.state],
                trial.value if trial.state is TrialState.COMPLETE else None,
                trial.user_attrs.get("seconds"),
                trial.user_attrs.get("error"),
            )
            for number, trial in sorted(self._latest().items())
        ]

    def _latest(self) -> dict[str, FrozenTrial]:
        """The last trial of each run; one that failed and is tried again has several."""
        return {number_of(trial): trial for trial in self._study.get_trials(deepcopy=False)}

    def _reached_target(self) -> bool:
        metric = self.sweep.definition.metric
        if metric.target is None:
            return False
        sign = 1 if metric.goal == "maximize" else -1
        values = [run.metric for run in self.board() if run.metric is not None]
        return any(sign * value >= sign * metric.target for value in values)

    def _params(self, values: Values) -> dict[str, Any]:
        drawn = self.sweep.drawn
        return {key: json.dumps(value) if _listed(drawn[key]) else value for key, value in values.items()}

    def _check_same(self) -> None:
        """Runs of two different sweeps cannot be compared."""
        definition = self.sweep.definition
        what = definition.model_dump(mode="json", include={"method", "metric", "parameters", "early_terminate"})
        now = {**what, "recipe": str(self.sweep.recipe), "overrides": list(self.sweep.overrides)}
        before = self._study.user_attrs.get("sweep")
        if before is None:
            self._study.set_user_attr("sweep", now)
        elif before != json.loads(json.dumps(now)):
            changed = ", ".join(key for key in now if before.get(key) != json.loads(json.dumps(now[key])))
            raise UserError(
                f"{self.folder} holds another sweep (it differs in {changed}); give another folder with --output, or "
                "the same values to resume it"
            )


def number_of(trial: Trial | FrozenTrial) -> str:
    """The name of a run's folder."""
    return trial.user_attrs.get("number") or f"{trial.number:03d}"


def count_runs(sweep: Sweep, runs: int | None) -> int:
    """How many runs the sweep has in all; raises UserError where nothing says."""
    wanted = [each for each in (runs, sweep.definition.run_cap) if each is not None]
    if sweep.definition.method == "grid":
        wanted.append(sum(1 for _ in combinations(sweep)))
    elif not wanted:
        raise UserError(f"sweep {sweep.file}: method {sweep.definition.method} has no end: give --count N or run_cap")
    return min(wanted)


def run_seconds(sweep: Sweep, board: list[SweepRun]) -> float | None:
    """What a run takes: the median of those that are finished, or what the file says."""
    seconds = [run.seconds for run in board if run.seconds]
    return statistics.median(seconds) if seconds else sweep.run_seconds


def _listed(parameter: Parameter) -> bool:
    return parameter.values is not None


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.values is not None:
        return CategoricalDistribution([json.dumps(value) for value in parameter.values])  # lists and nulls, too
    low, high = parameter.ends
    if parameter.kind == "int_uniform":
        return IntDistribution(low, high)
    step = parameter.q if parameter.kind == "q_uniform" else None
    return FloatDistribution(low, high, log=parameter.kind in LOGARITHMIC, step=step)


def _sampler(sweep: Sweep, seed: int) -> optuna.samplers.BaseSampler:
    # A seed of its own each time it is resumed, or the first draws would come again. A grid is queued as a whole.
    bayes = sweep.definition.method == "bayes"
    return optuna.samplers.TPESampler(seed=seed) if bayes else optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    """W&B's hyperband is asynchronous successive halving: one series of rungs for all runs."""
    rule = sweep.definition.early_terminate
    if rule is None:
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=rule.first, reduction_factor=rule.eta)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Turns what a full or read-only disk makes SQLite and the file system say into one line."""
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (OSError, OperationalError, optuna.exceptions.StorageInternalError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(getattr(error.__cause__, "orig", error))
        raise UserError(
            f"{folder / STUDY} could not be written: {cause}; make room on the disk and give the same command again"
        ) from error
