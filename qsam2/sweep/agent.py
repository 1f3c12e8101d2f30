"""A sweep on wandb.ai: created there once; this machine is one of its agents."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import wandb
from typing_extensions import TypedDict
from wandb.errors import Error

from qsam2.errors import UserError
from qsam2.output import read_json, write_text
from qsam2.recipe.load import read_yaml
from qsam2.sweep.definition import ARGUMENTS, Sweep, edges

AGENT = "wandb.json"
"""File in a sweep's folder: {"id", "project", "entity", "config"} of the sweep on wandb.ai."""


class _Agent(TypedDict):
    id: str
    project: str
    entity: str | None
    config: Any


log = logging.getLogger("qsam2")


def run_agent(sweep: Sweep, folder: Path, *, runs: int | None, jobs: int) -> None:
    """Create the sweep, or join the one named in the folder, and carry out `runs` of its runs here.

    Raises UserError if W&B refuses the sweep, or the folder names another one.
    """
    if jobs > 1:
        raise UserError(f"--jobs {jobs}: an agent carries out one run at a time; start another agent instead")
    words = list(sweep.definition.command)
    place = words.index(ARGUMENTS)
    command = [*words[:place], *(word for word in sweep.overrides if word not in words), *words[place:]]
    config = {**read_yaml(sweep.file, "sweep"), "name": sweep.name, "command": command}
    file = folder / AGENT
    kept: dict[str, Any] = read_json(file, _Agent, advice="give another folder with --output") or {}
    if kept and kept["config"] != config:
        raise UserError(f"{folder} holds another sweep, {kept['id']}; give another folder with --output")
    project = sweep.definition.project or sweep.recipe_of(next(edges(sweep))).log.project
    try:
        if not kept:
            kept = {"id": wandb.sweep(config, entity=sweep.definition.entity, project=project), "project": project}
            kept |= {"entity": sweep.definition.entity, "config": config}
            write_text(file, json.dumps(kept, indent=1))
        path = "/".join(part for part in (kept["entity"], kept["project"], kept["id"]) if part)
        log.info("other machines join with: wandb agent %s", path)
        wandb.agent(kept["id"], entity=kept["entity"], project=kept["project"], count=runs)
    except Error as error:
        raise UserError(f"sweep {sweep.file}: W&B refuses it: {' '.join(str(error).split())}") from error
