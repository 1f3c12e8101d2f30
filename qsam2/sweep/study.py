"""The plan of a sweep on this machine: an Optuna study in a SQLite file, which survives a kill; runs are trials."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.output import read_json
from qsam2.report.read import read_curves
from qsam2.sweep.definition import STUDY, Sweep, Values, combinations, count_runs
from qsam2.sweep.parameters import LOCAL, LOGARITHMIC, Parameter
from qsam2.sweep.runner import Job, Plan, RunFailed, RunState
from qsam2.train.trainer import CURVES

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:  # an optional dependency
    raise UserError(
        "a sweep without a Weights & Biases account draws its runs with Optuna, which is not installed: "
        "pip install 'qsam2[sweep]', or wandb login"
    ) from error

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "stopped",
    TrialState.RUNNING: "cut off",
    TrialState.WAITING: "to come",
}


class Study(Plan):
    """The runs of a sweep.

    Raises:
        UserError: the folder holds another sweep, a distribution can be drawn by W&B only, or the disk is full.
    """

    def __init__(self, sweep: Sweep, folder: Path, runs: int | None) -> None:
        for key, parameter in sweep.drawn.items():
            if parameter.kind not in LOCAL:
                raise UserError(
                    f"sweep {sweep.file}: parameters.{key}: distribution={parameter.kind} is drawn by W&B only: "
                    f"wandb login, or give one of {', '.join(LOCAL)}"
                )
        self.sweep, self.folder = sweep, folder
        self.name, self.total, self.run_seconds = f"sweep {sweep.name}", count_runs(sweep, runs), sweep.run_seconds
        self.stops_early = sweep.definition.early_terminate is not None
        self._reported: dict[str, int] = {}
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

    def states(self) -> list[RunState]:
        """All runs that were begun or queued, by number."""
        return [
            RunState(
                number,
                STATES[trial.state],
                self._values(trial),
                trial.value if trial.state is TrialState.COMPLETE else None,
                trial.user_attrs.get("seconds"),
                trial.user_attrs.get("error"),
            )
            for number, trial in sorted(self._latest().items())
        ]

    def stages(self) -> Iterator[Iterator[Job]]:
        """One stage: runs that were cut off, then those that are queued, then those that are drawn."""
        with _room(self.folder):
            trials = self._latest()
            for number, trial in trials.items():
                if trial.state is TrialState.FAIL:
                    self._study.enqueue_trial(trial.params, user_attrs={"number": number})
            if self.sweep.definition.method == "grid":
                for index, values in zip(range(self.total), combinations(self.sweep), strict=False):
                    if (number := f"{index:03d}") not in trials:
                        self._study.enqueue_trial(self._params(values), user_attrs={"number": number})
        yield self._jobs()

    def end(self, job: Job, seconds: float, error: str | None, stopped: bool) -> str:
        """Record the metric, the error, or neither if the run was stopped early."""
        name = self.sweep.definition.metric.name
        if stopped:
            self._tell(job.item, TrialState.PRUNED, seconds=seconds)
            return "stopped early"
        metric = None
        if not error:
            try:
                metric = read_metric(job.folder, name)
                error = None if metric is not None else f"it has no {name}"
            except UserError as damage:
                error = str(damage)
        if error:
            self._tell(job.item, TrialState.FAIL, error=error)
            raise RunFailed(error)
        self._tell(job.item, TrialState.COMPLETE, metric=metric, seconds=seconds)
        return f"{name} {metric:.4g}"

    def is_behind(self, job: Job) -> bool:
        """Report new values of the metric; true if the run is not among the best at a rung."""
        try:
            values = read_curves(job.folder / CURVES).get(self.sweep.definition.metric.name, [])
        except UserError:  # the file is being written
            return False
        behind, reported = False, self._reported.get(job.name, 0)
        for iteration, (_, value) in enumerate(values[reported:], reported + 1):
            job.item.report(value, iteration)
            behind |= job.item.should_prune()
            self._reported[job.name] = iteration
        return behind

    def _jobs(self) -> Iterator[Job]:
        trials = self._latest()
        cut_off = [trial for trial in trials.values() if trial.state is TrialState.RUNNING]
        done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials.values())
        for _ in range(self.total - done):
            if self._reached_target():
                return
            with _room(self.folder):
                resumed = Trial(self._study, cut_off.pop(0)._trial_id) if cut_off else None
                trial = resumed or self._study.ask(self.distributions)
            number, values = _number(trial), self._values(trial)
            arguments = self.sweep.arguments(values, *self._own_overrides(number))
            yield Job(number, self.folder / number, ["train", str(self.sweep.recipe), *arguments], trial, values)

    def _own_overrides(self, number: str) -> tuple[list[str], list[str]]:
        """Overrides of a local run: those that the file may replace, and those that nothing replaces."""
        cache, output = (json.dumps(str(self.folder / name)) for name in ("float", number))
        before = ["log.wandb=offline", f"log.group={json.dumps(self.sweep.name)}", f"evaluate.float_cache={cache}"]
        return before, [f"name={self.sweep.name}-{number}", f"output={output}"]

    def _values(self, trial: Trial | FrozenTrial) -> Values:
        """Values of a run, in the file's order."""
        params = trial.params
        if isinstance(trial, FrozenTrial) and trial.state is TrialState.WAITING:
            params = trial.system_attrs["fixed_params"]
        drawn = self.sweep.drawn
        return {key: json.loads(params[key]) if _listed(drawn[key]) else params[key] for key in drawn if key in params}

    def _tell(
        self,
        trial: Trial,
        state: TrialState,
        *,
        metric: float | None = None,
        seconds: float | None = None,
        error: str | None = None,
    ) -> None:
        with _room(self.folder):
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("error", error)
            self._study.tell(trial, values=metric, state=state)

    def _latest(self) -> dict[str, FrozenTrial]:
        """The last trial of each run; one that failed and is tried again has several."""
        return {_number(trial): trial for trial in self._study.get_trials(deepcopy=False)}

    def _reached_target(self) -> bool:
        metric = self.sweep.definition.metric
        if metric.target is None:
            return False
        sign = 1 if metric.goal == "maximize" else -1
        values = [run.metric for run in self.states() if run.metric is not None]
        return any(sign * value >= sign * metric.target for value in values)

    def _params(self, values: Values) -> dict[str, Any]:
        drawn = self.sweep.drawn
        return {key: json.dumps(value) if _listed(drawn[key]) else value for key, value in values.items()}

    def _check_same(self) -> None:
        """Raise UserError if the folder holds another sweep, whose runs cannot be compared with these."""
        keys = {"method", "metric", "parameters", "early_terminate"}
        definition_keys = self.sweep.definition.model_dump(mode="json", include=keys)
        now = {**definition_keys, "recipe": str(self.sweep.recipe), "overrides": list(self.sweep.overrides)}
        before = self._study.user_attrs.get("sweep")
        if before is None:
            self._study.set_user_attr("sweep", now)
        elif before != json.loads(json.dumps(now)):
            changed = ", ".join(key for key in now if before.get(key) != json.loads(json.dumps(now[key])))
            raise UserError(
                f"{self.folder} holds another sweep (it differs in {changed}); give another folder with --output, or "
                "the same values to resume it"
            )


def read_metric(folder: Path, name: str) -> float | None:
    """A figure of a run's `metrics.json`, as quantized/J&F, or the last value of a curve of its training.

    Raises:
        UserError: a file is damaged.
    """
    figure: Any = read_json(folder / "metrics.json")
    for key in name.split("/"):
        figure = figure.get(key) if isinstance(figure, dict) else None
    if figure is None and (curve := read_curves(folder / CURVES).get(name)):
        figure = curve[-1][1]
    return float(figure) if isinstance(figure, (int, float)) and math.isfinite(figure) else None


def _number(trial: Trial | FrozenTrial) -> str:
    """The name of a run's folder."""
    return trial.user_attrs.get("number") or f"{trial.number:03d}"


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
    # A new seed for each resume, or the first draws would be repeated. A grid is queued as a whole.
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
    """Turn errors of SQLite and the file system on a full or read-only disk into one line."""
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (OSError, OperationalError, optuna.exceptions.StorageInternalError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(getattr(error.__cause__, "orig", error))
        raise UserError(
            f"{folder / STUDY} could not be written: {cause}; make room on the disk and give the same command again"
        ) from error
