"""The directory as LDIF, with its operational attributes, and its configuration."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

SLAPCAT = "/usr/sbin/slapcat"
CONFIG = "/etc/ldap/slapd.d"


def dump(folder: Path, base: str, host: str) -> dict[str, int]:
    """Write data.ldif, config.ldif and manifest.json into `folder`; return the number of entries of each.

    slapd goes on meanwhile: slapcat reads one state of its database. Raises OSError or subprocess.CalledProcessError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    counts = {}
    for name, chosen in (("data", ["-b", base]), ("config", ["-n", "0"])):
        partial = folder / f".{name}.ldif.tmp"
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            subprocess.run([SLAPCAT, "-F", CONFIG, *chosen], stdout=file, stderr=subprocess.PIPE, check=True)
        counts[name] = entries(partial)
        os.replace(partial, folder / f"{name}.ldif")
    manifest = {"host": host, "base": base, "taken": datetime.now(UTC).isoformat(timespec="seconds"), "entries": counts}
    (folder / "manifest.json").write_text(json.dumps(manifest) + "\n", encoding="utf-8")
    return counts


def entries(path: Path) -> int:
    """Return how many entries an LDIF file has."""
    with path.open("rb") as file:
        return sum(line.startswith(b"dn:") for line in file)
