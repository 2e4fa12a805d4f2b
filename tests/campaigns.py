"""The long campaigns: `make soak`. Each province is stood up whole and lives through its life cycle; on Đắk Lắk's hosts
fifty runs are killed as well, hosts, cables and daemons fail under load, both mail hosts burn and come back from the
backup alone, 20,000 mailboxes are replicated, scanners look for holes, and every guarded setting is broken. Ends with
`N passed, N failed` over the campaigns.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PROVINCES = sorted(path.parent.name for path in CHECKOUT.glob("inventories/*/hosts.yml"))
LAB = "soak"
PYTEST = ["-m", "pytest", "-q", "-x", "--requirements", "soak"]
CAMPAIGNS = {
    "life cycle": [*PYTEST, "tests/acceptance/test_lifecycle.py"],
    "killed runs": [*PYTEST, "tests/acceptance/test_killed_runs.py"],
    "availability": ["tests/availability.py", "--lab", f"build/{LAB}/lab.json"],
    "replication": ["bench/replication.py", "--only", "store", "--mailboxes", "20000"],
    "recovery": ["tests/recovery.py", "--lab", f"build/{LAB}/lab.json"],
    "scanners": ["tests/scanners.py", "--lab", f"build/{LAB}/lab.json"],
    "sabotage": ["tests/soak.py", "--lab", f"build/{LAB}/lab.json"],
}


def run(name: str, command: list[str]) -> bool:
    """Run Python with `command`; True when it exits with 0."""
    print(f"\n--- {name}", flush=True)
    started = time.monotonic()
    environment = os.environ | {"HOPTHU_LAB": f"build/{LAB}/lab.json", "HOPTHU_KILLS": "50"}
    environment |= {"HOPTHU_LAB_STORE_MIB": "8192"}  # a disk that may be filled
    good = subprocess.run([sys.executable, *command], cwd=CHECKOUT, env=environment, check=False).returncode == 0
    print(f"--- {name}: {'passed' if good else 'FAILED'} in {time.monotonic() - started:.0f} s", flush=True)
    return good


def main() -> int:
    """Run the command line; exit code 1 when a campaign failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--province", choices=PROVINCES, action="append", help="only this one (default: all)")
    parser.add_argument("--campaign", choices=CAMPAIGNS, action="append", help="only this one (default: all)")
    options = parser.parse_args()
    results = []
    for province in options.province or PROVINCES:
        try:
            up = run(f"{province}: stood up", ["lab/lab.py", "up", "--name", LAB, "--province", province])
            results.append(up)
            for name, command in CAMPAIGNS.items() if up else ():
                if name in (options.campaign or CAMPAIGNS) and (province == "daklak" or name == "life cycle"):
                    results.append(run(f"{province}: {name}", command))
        finally:
            subprocess.run([sys.executable, "lab/lab.py", "destroy", "--name", LAB], cwd=CHECKOUT, check=True)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
