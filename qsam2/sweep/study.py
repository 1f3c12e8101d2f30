"""A sweep on this machine and its results: an Optuna study in a SQLite file, which survives a kill; runs are trials."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qsam2.errors import UserError
from qsam2.output import aligned, read_json, write_text
from qsam2.report.read import read_curves
from qsam2.sweep.definition import LOCAL, LOGARITHMIC, STUDY, Parameter, Sweep, Values, combinations, count_runs
from qsam2.sweep.runner import Job, Plan, RunFailed, RunState, disk_is_full
from qsam2.train.loggers import CURVES

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import FrozenTrial, Trial, TrialState
except ImportError as error:  # an optional dependency
    raise UserError(
        "a sweep without a Weights & Biases account draws its runs with Optuna, which is not installed: "
        "pip install 'qsam2[sweep]', or wandb login"
    ) from error

SWEEP_RESULTS = "sweep.json"
"""File in a sweep's folder: {"sweep", "metric", "goal", "runs": [best first], "best" (a command)}."""

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.FAIL: "failed",
    TrialState.PRUNED: "stopped",
    TrialState.RUNNING: "cut off",
    TrialState.WAITING: "to come",
}


class Study(Plan):
    """The runs of a sweep.

    Raises UserError if the folder holds another sweep, a distribution can be drawn by W&B only, or the disk is full.
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
        self._reported: dict[str, int] = {}
        self.distributions = {key: _distribution(parameter) for key, parameter in sweep.drawn.items()}
        rule = sweep.definition.early_terminate
        self.stops_early = rule is not None
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if rule:  # W&B's hyperband is asynchronous successive halving: one series of rungs for all runs
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rule.first, reduction_factor=rule.eta)
        samplers = optuna.samplers
        sampler = samplers.TPESampler if sweep.definition.method == "bayes" else samplers.RandomSampler
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _room(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._study = optuna.create_study(
                study_name="sweep",
                storage=f"sqlite:///{folder / STUDY}",
                pruner=pruner,
                direction=sweep.definition.metric.goal,
                load_if_exists=True,
            )
            # A new seed for each resume, or the first draws would be repeated. A grid is queued as a whole.
            self._study.sampler = sampler(seed=len(self._study.get_trials(deepcopy=False)))
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
                        params = {key: _param(self.sweep.drawn[key], value) for key, value in values.items()}
                        self._study.enqueue_trial(params, user_attrs={"number": number})
        yield self._jobs()

    def end(self, job: Job, seconds: float, error: str | None, stopped: bool) -> str:
        """Record the metric, the error, or neither if the run was stopped early."""
        name = self.sweep.definition.metric.name
        if stopped:
            self._tell(job.item, TrialState.PRUNED, seconds=seconds)
            return "stopped early"
        metric = None
        try:
            metric = None if error else read_metric(job.folder, name)
            error = error or (f"it has no {name}" if metric is None else None)
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
            # What the file may replace, and what nothing replaces
            cache, output = (json.dumps(str(self.folder / name)) for name in ("float", number))
            before = ["log.wandb=offline", f"log.group={json.dumps(self.sweep.name)}", f"evaluate.float_cache={cache}"]
            after = [f"name={self.sweep.name}-{number}", f"output={output}"]
            arguments = self.sweep.arguments(values, before, after)
            yield Job(number, self.folder / number, ["train", str(self.sweep.recipe), *arguments], trial, values)

    def _values(self, trial: Trial | FrozenTrial) -> Values:
        """Values of a run, in the file's order."""
        params = trial.params
        if isinstance(trial, FrozenTrial) and trial.state is TrialState.WAITING:
            params = trial.system_attrs["fixed_params"]
        drawn = {key: parameter for key, parameter in self.sweep.drawn.items() if key in params}
        return {key: json.loads(params[key]) if p.values is not None else params[key] for key, p in drawn.items()}

    def _tell(
        self,
        trial: Trial,
        state: TrialState,
        metric: float | None = None,
        seconds: float | None = None,
        error: str = "",
    ) -> None:
        with _room(self.folder):
            trial.set_user_attr("seconds", seconds)
            trial.set_user_attr("error", error or None)
            self._study.tell(trial, values=metric, state=state)

    def _latest(self) -> dict[str, FrozenTrial]:
        """The last trial of each run; one that failed and is tried again has several."""
        return {_number(trial): trial for trial in self._study.get_trials(deepcopy=False)}

    def _reached_target(self) -> bool:
        target = self.sweep.definition.metric.target
        best = ranked(self.sweep, self.states())[:1]
        if target is None or not best or best[0].metric is None:
            return False
        return best[0].metric >= target if self.sweep.definition.metric.goal == "maximize" else best[0].metric <= target

    def _check_same(self) -> None:
        """Raise UserError if the folder holds another sweep, whose runs cannot be compared with these."""
        keys = {"method", "metric", "parameters", "early_terminate"}
        now = self.sweep.definition.model_dump(mode="json", include=keys)
        now = json.loads(json.dumps({**now, "recipe": str(self.sweep.recipe), "overrides": self.sweep.overrides}))
        before = self._study.user_attrs.get("sweep")
        if before is None:
            self._study.set_user_attr("sweep", now)
        elif changed := [key for key in now if before.get(key) != now[key]]:
            raise UserError(
                f"{self.folder} holds another sweep (it differs in {', '.join(changed)}); give another folder with "
                "--output, or the same values to resume it"
            )


def ranked(sweep: Sweep, states: Iterable[RunState]) -> list[RunState]:
    """Runs of a sweep from best to worst; those without a metric last."""
    sign = -1 if sweep.definition.metric.goal == "maximize" else 1
    return sorted(states, key=lambda run: math.inf if run.metric is None else sign * run.metric)


def write_sweep(sweep: Sweep, runs: Sequence[RunState], folder: Path) -> str | None:
    """Write the runs, best first, into a sweep's folder; returns the command of the best one, if there is one."""
    best = sweep.command_of(dict(runs[0].values)) if runs and runs[0].metric is not None else None
    metric = sweep.definition.metric
    rows = [{"number": run.name, **{key: value for key, value in vars(run).items() if key != "name"}} for run in runs]
    results = {"sweep": sweep.name, "metric": metric.name, "goal": metric.goal, "runs": rows, "best": best}
    write_text(folder / SWEEP_RESULTS, json.dumps(results, indent=1))
    return best


def sweep_text(sweep: Sweep, runs: Sequence[RunState]) -> str:
    """The runs of a sweep as a table of plain text, in the order that is given."""
    keys = list(sweep.drawn)
    rows = [["run", sweep.definition.metric.name, "seconds", *keys, ""]]
    for run in runs:
        metric = run.state if run.metric is None else f"{run.metric:.4g}"
        seconds = "-" if run.seconds is None else f"{run.seconds:.0f}"
        values = [run.values.get(key) for key in keys]
        short = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        rows.append([run.name, metric, seconds, *short, run.error or ""])
    return aligned(rows)


def read_metric(folder: Path, name: str) -> float | None:
    """A figure of a run's `metrics.json`, as quantized/J&F, or the last value of a curve; UserError if damaged."""
    figure: Any = read_json(folder / "metrics.json")
    for key in name.split("/"):
        figure = figure.get(key) if isinstance(figure, dict) else None
    if figure is None and (curve := read_curves(folder / CURVES).get(name)):
        figure = curve[-1][1]
    return float(figure) if isinstance(figure, (int, float)) and math.isfinite(figure) else None


def _number(trial: Trial | FrozenTrial) -> str:
    """The name of a run's folder."""
    return trial.user_attrs.get("number") or f"{trial.number:03d}"


def _param(parameter: Parameter, value: Any) -> Any:
    """A value as Optuna keeps it: lists and nulls may be among those that are listed."""
    return json.dumps(value) if parameter.values is not None else value


def _distribution(parameter: Parameter) -> BaseDistribution:
    if parameter.values is not None:
        return CategoricalDistribution([_param(parameter, value) for value in parameter.values])
    low, high = parameter.ends
    if parameter.kind == "int_uniform":
        return IntDistribution(low, high)
    step = parameter.q if parameter.kind == "q_uniform" else None
    return FloatDistribution(low, high, log=parameter.kind in LOGARITHMIC, step=step)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Turn errors of SQLite and the file system on a full or read-only disk into one line."""
    from sqlalchemy.exc import OperationalError

    try:
        yield
    except (OSError, OperationalError, optuna.exceptions.StorageInternalError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(getattr(error.__cause__, "orig", error))
        raise disk_is_full(folder / STUDY, cause) from error
