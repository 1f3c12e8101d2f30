"""Which module imports which: from the ground up, without a cycle, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qsam2

ROOT = Path(qsam2.__file__).parent
MAX_LINES = 450

# From the ground up: a room may import itself and those of the lines above its own.
FLOORS = (
    ("errors",),
    ("inputs",),
    ("output", "recipe"),
    ("data", "models", "quantizers", "metrics"),
    ("run",),
    ("layers",),
    ("memory",),
    ("calibration", "train", "formats", "fast"),
    ("loading", "reconstruction"),
    ("evaluation",),
    ("report",),
    ("stored_model",),
    ("pipeline", "predict"),
    ("sweep", "benchmark"),
    ("api",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(FLOORS) for part in parts}


def modules() -> dict[str, Path]:
    """{dotted name: file} of all modules of the package."""
    files = {file: file.relative_to(ROOT.parent).with_suffix("").parts for file in sorted(ROOT.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): file for file, parts in files.items()}


MODULES = modules()


def imported(name: str) -> set[str]:
    """What a module imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} is a relative import; write it in full"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else str(node.module) for module in inner}
    return found


def own(name: str) -> set[str]:
    return {module for module in imported(name) if module in MODULES} - {"qsam2"}


def part(name: str) -> str:
    """The room of a module; the metrics, a room within another, have a floor of their own."""
    return "metrics" if name.startswith("qsam2.evaluation.metrics") else name.split(".")[1]


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"qsam2"}))
def test_imports_point_downwards(name: str) -> None:
    assert part(name) in LEVEL, f"qsam2/{part(name)} has no place in the order of imports: add it to FLOORS"
    for module in own(name):
        below = LEVEL[part(module)] < LEVEL[part(name)]
        assert below or part(module) == part(name), f"{name} imports {module}, which stands no lower"


def test_no_cycle() -> None:
    TopologicalSorter({name: own(name) for name in MODULES}).prepare()


def test_the_order_is_that_of_real_parts() -> None:
    present = {part(name) for name in MODULES if name != "qsam2"}
    assert LEVEL.keys() == present


def test_nothing_imports_a_module_that_is_not_there() -> None:
    wanted = {module for name in MODULES for module in imported(name) if module.split(".")[0] == "qsam2"}
    assert wanted <= MODULES.keys()


def test_no_deprecated_quantization_is_used() -> None:
    texts = {name: file.read_text() for name, file in MODULES.items()}
    assert [name for name, text in texts.items() if "torch.ao" in text or "torch.quantization" in text] == []


def test_no_module_is_long() -> None:
    assert [n for n, file in MODULES.items() if len(file.read_text().splitlines()) > MAX_LINES] == []


def test_the_command_line_starts_without_heavy_libraries() -> None:
    """`--help` should not wait for torch."""
    code = "import sys, qsam2.cli; print([n for n in ('torch', 'lightning', 'numpy', 'pydantic') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


@pytest.mark.parametrize(("own", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(own: str | None, used: str) -> None:
    code = "import os, sys; from qsam2.cli import main; main(['recipes']); "
    code += "print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.stdout.splitlines()[-1] == f"{used} False"


def test_no_print_but_in_the_command_line() -> None:
    for name in {name for name in MODULES.keys() - {"qsam2"} if part(name) not in ("cli", "commands")}:
        calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], name
