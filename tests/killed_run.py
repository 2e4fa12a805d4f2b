"""Start site.yml on a lab (FOLDER, build/NAME) and kill it, with all it started here, while TASK runs."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def family(pid: int) -> list[int]:
    """A process and all that descend from it; Ansible's workers have sessions of their own."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def main() -> int:
    """Run the command line; exit code 1 when the run ended before it could be killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("task", help="ROLE : NAME, as Ansible prints it")
    parser.add_argument("--after", type=float, default=0.7, help="seconds into the task (0.7)")
    options = parser.parse_args()
    process = subprocess.Popen(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            *("-i", options.folder / "inventory" / "hosts.yml"),
            *("--vault-password-file", options.folder / "vault-password"),
            *("-e", f"@{options.folder / 'vault.yml'}"),
            "playbooks/site.yml",
        ],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if line.startswith(f"TASK [{options.task}]"):
            time.sleep(options.after)
            for pid in family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            print(f"killed in {options.task}")
            return 0
    print(f"the run ended with {process.wait()} before {options.task}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
