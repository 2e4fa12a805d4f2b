"""How long what is stored is kept: section `retention` of policy.yml. Pure.

All times are whole days; the defaults are those of inventories/schema/policy.schema.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRUNED_DAYS = 7  # from the end of a backup's time until its octets are gone: the repository is pruned weekly
_KEEP = {
    "within": "all_days",
    "within_daily": "daily_days",
    "within_weekly": "weekly_days",
    "within_monthly": "monthly_days",
}


def backup_days(retention: Mapping[str, Any]) -> int:
    """Return for how many days after it is gone from the mail store backups may still hold something."""
    return int(max(retention["backups"].values())) + _PRUNED_DAYS


def backup_keep(retention: Mapping[str, Any]) -> dict[str, str]:
    """Return what `restic forget` is told, as durations: `--keep-within` and the three finer ones.

    >>> backup_keep({"backups": {"all_days": 3, "daily_days": 31, "weekly_days": 92, "monthly_days": 366}})
    {'within': '3d', 'within_daily': '31d', 'within_weekly': '92d', 'within_monthly': '366d'}
    """
    return {name: f"{retention['backups'][days]}d" for name, days in _KEEP.items()}
