"""Files that are almost right: trees with a wrong node, bytes with damage; and reading them under limits."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qsam2.errors import UserError

HANG_S = 10
MEMORY_BYTES = 2 << 30
SCALARS: list[Any] = [
    None, True, False, 0, -1, 1, 2, 255, 10**9, -(10**9), 10**30, 10**4000, 0.5, -0.0, 1e-320, 1e300, float("nan"),
    float("inf"), -float("inf"), "", " ", ".", "..", "/etc/passwd", "../../x", "a\x00b", "ü猫", "x" * 5000, "1e5", "{}",
    "null", "$$", "<b>&amp;", "\ud800",
]  # fmt: skip
DISGUISES = [
    b"", b"\0" * 64, b"\xff" * 64, b"<!DOCTYPE html><html><body>Sign in</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n", b"PK\x03\x04", b"\x80\x04.",
    b"%!PS-Adobe", b"\xef\xbb\xbf", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"[" * 5000, b'{"a":' * 5000, b"a: &a [*a, *a]\n",
]  # fmt: skip


def nasty(rng: random.Random) -> Any:
    """A value that no reader expects here."""
    if rng.random() < 0.75:
        return rng.choice(SCALARS)
    value: Any = rng.choice(SCALARS)
    for _ in range(rng.choice([1, 1, 2, 900])):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return rng.choice([value, [], {}, [[]], [value] * 50])


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _nodes(value, (*path, key))


def mutate(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree of plain values in which one to three nodes are replaced, removed, added or swapped."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2, 3])):
        nodes = list(_nodes(tree))
        if not nodes:
            return nasty(rng)
        *path, key = rng.choice(nodes)
        parent = tree
        for step in path:
            parent = parent[step]
        deed = rng.random()
        if deed < 0.6:
            parent[key] = nasty(rng)
        elif deed < 0.75:
            del parent[key]
        elif deed < 0.85 and isinstance(parent, dict):
            parent[rng.choice(["zz", "", "..", f"{key}x"])] = parent[key]
        elif isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            with contextlib.suppress(OverflowError):  # thousands of digits
                parent[key] = rng.choice([-1, 0.5, 1000, 2**31, 1e-9]) * parent[key]
        else:
            parent[key] = str(parent[key])
    return tree


def encode_json(rng: random.Random, tree: Any) -> bytes:
    """JSON of a tree, now and then in an encoding or with doubled keys that people's files have."""
    try:
        text = json.dumps(tree, ensure_ascii=rng.random() < 0.9)
    except RecursionError:
        text = '{"a":[' * 900 + "]}" * 900
    return text.encode(rng.choice(["utf-8"] * 8 + ["utf-16", "utf-8-sig"]), errors="surrogatepass")


def damage(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut short, flipped, repeated, or of another kind of file."""
    deed = rng.random()
    at = rng.randrange(len(data) + 1)
    if deed < 0.3:
        return data[:at]
    if deed < 0.7:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 2, 8, 64])):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if deed < 0.8:
        return data[:at] + rng.randbytes(rng.choice([1, 16, 4096])) + data[at:]
    return rng.choice(DISGUISES) + (data if rng.random() < 0.3 else b"")


Case = Callable[[random.Random, Path], None]
"""Makes a file in the folder, reads it, and asserts that what was accepted makes sense."""


def faults(case: Case, count: int, folder: Path, seed: int = 0) -> list[str]:
    """Faults of `count` cases, each with its number: anything but acceptance or a UserError of one line.

    They are read in a process of their own, which may grow by 2 GB and spend 10 s on a file.
    """
    context = multiprocessing.get_context("fork")
    found: list[str] = []
    start = 0
    while start < count:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_read_all, args=(case, range(start, count), folder, seed, theirs))
        process.start()
        theirs.close()
        number = start
        try:
            while True:
                number, fault = ours.recv()
                if fault:
                    found.append(f"case {number}: {fault}")
        except EOFError:
            process.join()
        if process.exitcode == 0:
            break
        found.append(f"case {number}: the process ended with {process.exitcode} (a crash, or a hang of {HANG_S} s)")
        start = number + 1
    return found


def _read_all(case: Case, numbers: range, folder: Path, seed: int, results: Any) -> None:
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for number in numbers:
        results.send((number, None))
        signal.setitimer(signal.ITIMER_PROF, HANG_S)  # of processor time, whose end kills the process
        place = folder / str(number)
        place.mkdir(parents=True)
        fault = None
        try:
            case(random.Random(f"{seed} {number}"), place)
        except UserError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                fault = f"a message of {len(str(error))} characters: {str(error)[:300]!r}"
        except BaseException:
            fault = traceback.format_exc(limit=-4)[:3000]
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if fault:
            results.send((number, fault))
