"""Tell whether a lab's hosts are as they were: `remember FOLDER`, then `compare FOLDER` (build/NAME)."""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
from pathlib import Path

import yaml

# Everything that a run could install, write or remove. Left out is what a login or a look alone changes.
LISTING = (
    "find /etc /usr /opt /srv /root /var/lib /var/mail /var/spool -xdev"
    " \\( -path /root/.ansible -o -path /var/lib/systemd -o -path /var/lib/private \\) -prune"
    " -o ! -path /root -printf '%p %m %U:%G %s %T@\\n' | sort"
)


def listing(folder: Path, host: str) -> list[str]:
    """Every file of `host` with mode, owner, size and time."""
    command = ["ssh", "-F", str(folder / "ssh" / "config"), host, LISTING]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    """Run the command line; exit code 1 when something changed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("remember", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    inventory = yaml.safe_load((options.folder / "inventory" / "hosts.yml").read_text(encoding="utf-8"))
    changed = []
    for host in inventory["all"]["hosts"]:
        before = options.folder / f"{host}.listing"
        now = listing(options.folder, host)
        if options.command == "remember":
            before.write_text("\n".join(now), encoding="utf-8")
        else:
            known = before.read_text(encoding="utf-8").splitlines()
            changed += [
                f"{host}: {line}"
                for line in difflib.unified_diff(known, now, n=0, lineterm="")
                if not line.startswith(("---", "+++", "@@"))
            ]
    print("\n".join(changed[:40]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
