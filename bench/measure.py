"""What all benchmarks share: rows with a goal, a table, build/bench/NAME.json, and a lab to measure on.

Run by itself it prints the tables of all results for docs/measurements.md:

    .venv/bin/python bench/measure.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "build" / "bench"
# Not `bench`: build/bench holds the results, and a lab that is taken down takes its folder with it.
LAB = "bench-lab"


class BenchError(Exception):
    """One sentence for the operator: what is wrong and the way out."""


@dataclass(frozen=True)
class Row:
    """One figure. `reference` is in the same `unit`; `goal` bounds value / reference: {"max": 4} or {"min": 1.5}."""

    name: str
    value: float
    unit: str
    reference: float | None = None
    goal: dict[str, float] | None = None
    runs: list[float] | None = None

    @property
    def ratio(self) -> float | None:
        """value / reference; None without a reference."""
        return None if self.reference is None else self.value / self.reference

    @property
    def met(self) -> bool | None:
        """Whether the ratio keeps to the goal; None without a goal. ValueError for a goal without a reference."""
        if self.goal is None:
            return None
        if self.ratio is None:
            raise ValueError(f"{self.name}: a goal needs a reference")
        return self.goal.get("min", 0) <= self.ratio <= self.goal.get("max", float("inf"))

    def as_dict(self) -> dict[str, Any]:
        """The row as build/bench/NAME.json holds it."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of build/bench/NAME.json as a Markdown table."""
    head = ["what", "value", "reference", "ratio", "goal", "met"]
    body = [
        [
            row["name"] + (f" (runs: {', '.join(map(_figure, row['runs']))})" if row["runs"] else ""),
            f"{_figure(row['value'])} {row['unit']}",
            "" if row["reference"] is None else f"{_figure(row['reference'])} {row['unit']}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f} ×",
            ", ".join(
                f"{'at most' if side == 'max' else 'at least'} {n:g} ×" for side, n in (row["goal"] or {}).items()
            ),
            {None: "", True: "yes", False: "**no**"}[row["met"]],
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def report(name: str, rows: Sequence[Row]) -> int:
    """Print the table, write build/bench/`name`.json; return the exit code: 1 when a goal is not met."""
    data = [row.as_dict() for row in rows]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(data)}\n\n{path.relative_to(CHECKOUT)}")
    missed = [row.name for row in rows if row.met is False]
    for what in missed:
        print(f"goal not met: {what}", file=sys.stderr)
    return 1 if missed else 0


# --- a lab -----------------------------------------------------------------------------------


def lab_command(command: str) -> list[str]:
    """The command line of lab/lab.py for the benchmarks' own lab; `make lab` runs the same program."""
    return [sys.executable, str(CHECKOUT / "lab" / "lab.py"), command, "--name", LAB]


def lab_run(command: str, cache: Path | None = None) -> None:
    """Run lab/lab.py `command` quietly, with its packages in `cache`; BenchError with its last line when it fails."""
    environment = {**os.environ, **({"HOPTHU_CACHE": str(cache)} if cache else {})}
    done = subprocess.run(lab_command(command), env=environment, text=True, capture_output=True)
    if done.returncode:
        raise BenchError(f"lab/lab.py {command} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


@contextmanager
def lab() -> Iterator[dict[str, Any]]:
    """The content of the lab.json that HOPTHU_LAB names, or of a lab made for the block and removed after it."""
    given = os.environ.get("HOPTHU_LAB")
    if given:
        try:
            yield json.loads(Path(given).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BenchError(f"HOPTHU_LAB: there is no {given}; `make lab` writes build/lab.json.") from None
        return
    print("a lab of its own (set HOPTHU_LAB=build/lab.json to use one that runs)", flush=True)
    try:
        lab_run("up")
        yield json.loads((CHECKOUT / "build" / LAB / "lab.json").read_text(encoding="utf-8"))
    finally:
        lab_run("down")


def inside(container: str, command: Sequence[str], stdin: str = "") -> str:
    """Run a command in a lab's host and return its output; BenchError with its last line when it fails."""
    done = subprocess.run(
        ["podman", "exec", "-i", container, *command], input=stdin, text=True, capture_output=True, timeout=600
    )
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise BenchError(f"{container}: `{' '.join(command)[:80]}` failed: {said}")
    return done.stdout


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(main: Callable[[], int]) -> int:
    """Run a benchmark's `main` and return its exit code: 1 after a BenchError, 130 when interrupted.

    SIGTERM ends it like Ctrl-C does, so that what was changed is put back.
    """
    signal.signal(signal.SIGTERM, _stop)
    try:
        return main()
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything was put back", file=sys.stderr)
        return 130


def main() -> int:
    """Print the tables of all results."""
    for path in sorted(RESULTS.glob("*.json")):
        print(f"`make bench-{path.stem}`\n\n{table(json.loads(path.read_text(encoding='utf-8')))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
