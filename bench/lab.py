"""Seconds of `make lab`, cold, warm and again, beside plain apt-get with the same packages.

    .venv/bin/python bench/lab.py        about 12 minutes; Debian's archive must be reachable

cold   package cache and base image are not there: builds the image, makes the hosts, runs site.yml, gives
       every mailbox a password, sends the proof mail
warm   after `make lab-down`: packages and the image's archive come from the cache
again  the hosts run already: the second converge
plain  `apt-get update` and one `apt-get install` of exactly the packages that the kit added to each host, on
       three fresh hosts of the same base image at the same time, from the same mirror, with an empty cache

Cold and plain are measured three times in turn, and the medians compared. Not in any figure: the packages that
the machine itself needs (podman and so on) and the Python environment.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import measure
from measure import BenchError, Row

STAGE = re.compile(r"^(\S.*?) +(\d+\.\d) s$")
TASK = re.compile(r"^(TASK|RUNNING HANDLER) \[", re.MULTILINE)
CHANGED = re.compile(r"^\S+ +: ok=\d+ +changed=(\d+)", re.MULTILINE)
FOLDER = measure.CHECKOUT / "build" / measure.LAB
GOAL = {"max": 4.0}
ROUNDS = 3  # of cold and plain in turn: both see the same changes of the machine and the mirror


@dataclass(frozen=True)
class Up:
    """One `make lab`: seconds in all, of building or importing the base image and of site.yml, and its tasks."""

    seconds: float
    image: float
    site: float
    tasks: int
    changed: int


def up(title: str, cache: Path) -> Up:
    """Run `lab/lab.py up` with its packages in `cache` and measure it; BenchError when it fails."""
    print(f"{title} …", end=" ", flush=True)
    started = time.monotonic()
    command = measure.lab_command("up")
    environment = {**os.environ, "HOPTHU_CACHE": str(cache)}
    stages, marks, lines = {}, {}, []
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if found := STAGE.match(line):
                stages[found[1]] = float(found[2])
            for mark in ("site.yml", "PLAY RECAP"):
                if line.startswith(mark):
                    marks[mark] = time.monotonic()
    seconds = time.monotonic() - started
    if process.returncode:
        raise BenchError(f"{' '.join(command[1:])} failed: {lines[-1].strip()}")
    print(f"{seconds:.1f} s", flush=True)
    log = (FOLDER / "up.log").read_text(encoding="utf-8")
    return Up(
        seconds=seconds,
        image=stages["base image"],
        site=marks["PLAY RECAP"] - marks["site.yml"],
        tasks=len(TASK.findall(log)),
        changed=sum(map(int, CHANGED.findall(log))),
    )


def containers() -> list[str]:
    """The containers of the lab's hosts, by its inventory."""
    names = subprocess.run(
        ["podman", "ps", "--filter", f"label=hopthu.lab={measure.LAB}", "--format", "{{.Names}}"],
        check=True,
        text=True,
        capture_output=True,
    )
    return sorted(names.stdout.split())


def packages(container: str) -> set[str]:
    """Names of the installed packages of a host."""
    listed = measure.inside(container, ["dpkg-query", "-W", "-f", "${db:Status-Status} ${binary:Package}\n"])
    return {line.split()[1] for line in listed.splitlines() if line.startswith("installed ")}


def plain(installed: dict[str, set[str]]) -> float:
    """Seconds until apt-get has put the packages of `installed` (container → names) on the fresh hosts."""
    script = "apt-get -q update && xargs apt-get -q install -y --no-install-recommends"
    missing = {container: sorted(names - packages(container)) for container, names in installed.items()}

    def install(container: str) -> None:
        environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
        measure.inside(container, [*environment, "sh", "-c", script], " ".join(missing[container]))

    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        list(pool.map(install, missing))
    seconds = time.monotonic() - started
    for container, names in installed.items():
        if differing := packages(container) ^ names:
            raise BenchError(f"{container}: not the kit's packages: {' '.join(sorted(differing)[:5])}")
    counts = ", ".join(f"{container} {len(names)}" for container, names in missing.items())
    print(f"plain apt-get … {seconds:.1f} s (packages: {counts})", flush=True)
    return seconds


def main() -> int:
    """Measure, print the table, write build/bench/lab.json; exit code 1 when cold misses its goal."""
    cold: list[Up] = []
    references: list[float] = []
    measure.lab_run("down")
    try:
        for _round in range(ROUNDS):
            with tempfile.TemporaryDirectory(prefix="hopthu-bench-", dir="/var/tmp") as folder:
                cache, empty = Path(folder, "cache"), Path(folder, "empty")
                cold.append(up("make lab, cold", cache))
                installed = {container: packages(container) for container in containers()}
                if len(cold) == ROUNDS:
                    again = up("make lab, again", cache)
                measure.lab_run("down")

                # The same base image, and no package in the cache.
                empty.mkdir()
                for archive in cache.glob("base-*.tar"):
                    shutil.copy2(archive, empty)
                measure.lab_run("create", empty)
                references.append(plain(installed))
                measure.lab_run("down")
                if len(cold) == ROUNDS:
                    warm = up("make lab, warm", cache)
                    measure.lab_run("down")
    finally:
        measure.lab_run("down")
    middle = sorted(cold, key=lambda one: one.seconds)[ROUNDS // 2]
    reference = statistics.median(references)
    runs = [one.seconds for one in cold]
    rows = [
        Row("make lab, cold: no cache, no image", middle.seconds, "s", reference, GOAL, runs),
        Row("… of it building the base image", middle.image, "s"),
        Row("… of it site.yml", middle.site, "s"),
        Row("… tasks of site.yml", middle.tasks, "tasks"),
        Row("make lab, warm: after make lab-down", warm.seconds, "s", reference),
        Row("… of it importing the base image", warm.image, "s"),
        Row("… of it site.yml", warm.site, "s"),
        Row("… tasks of site.yml", warm.tasks, "tasks"),
        Row("make lab, again: second converge", again.seconds, "s", reference),
        Row("… of it site.yml", again.site, "s"),
        Row("… tasks of site.yml", again.tasks, "tasks"),
        Row("… changed by them", again.changed, "tasks"),
        Row("reference: apt-get update and install, three hosts at once", reference, "s", runs=references),
    ]
    return measure.report("lab", rows)


if __name__ == "__main__":
    sys.exit(measure.run(main))
