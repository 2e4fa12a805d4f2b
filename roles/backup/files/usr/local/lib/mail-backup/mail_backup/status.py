"""What came of each kind of run: status.json for people and playbooks, metrics.prom for Prometheus."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def read(state: str | Path) -> dict[str, dict[str, Any]]:
    """Return the entries by kind; none when nothing has run yet."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(Path(state, "status.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def note(state: str | Path, kind: str, entry: dict[str, Any]) -> None:
    """Replace what is known of a kind; what an entry does not say of `good` (last good run) stays.

    Times are seconds since the epoch. Several programs may do so at once.
    """
    folder = Path(state)
    with (folder / ".status.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        every = read(folder)
        kept = {name: value for name, value in every.get(kind, {}).items() if name == "good"}
        every[kind] = kept | entry
        _write(folder / "status.json", json.dumps(every, ensure_ascii=False, indent=1) + "\n")
        _write(folder / "metrics.prom", metrics(every))


def metrics(every: dict[str, dict[str, Any]]) -> str:
    """Return the numbers among the entries as Prometheus reads them: mail_backup_NAME{kind="KIND"} VALUE."""
    rows: dict[str, list[str]] = {}
    for kind, entry in sorted(every.items()):
        for name, value in sorted(entry.items()):
            if isinstance(value, int | float):
                rows.setdefault(name, []).append(
                    f'mail_backup_{name}{{kind="{kind}"}} {float(value):g}'
                    if not float(value).is_integer()
                    else f'mail_backup_{name}{{kind="{kind}"}} {int(value)}'
                )
    return "".join(
        f"# TYPE mail_backup_{name} gauge\n" + "\n".join(lines) + "\n" for name, lines in sorted(rows.items())
    )


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    partial.chmod(0o644)
    os.replace(partial, path)
