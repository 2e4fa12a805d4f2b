"""Filters that hand section `retention` of policy.yml to the roles."""

from __future__ import annotations

import json
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu import retention as rules
from hopthu.schema import policy_fields


def retention(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `retention` of a policy.yml, with the defaults of its schema.

    >>> retention({"retention": {"leaver_days": 90}})["leaver_days"], retention({})["backups"]["all_days"]
    (90, 3)
    """
    defaults = policy_fields().defaults["retention"]
    given = {name: value for name, value in (policy.get("retention") or {}).items() if value is not None}
    backups = {name: value for name, value in given.get("backups", {}).items() if value is not None}
    return {**defaults, **given, "backups": {**defaults["backups"], **backups}}


def backup_keep(policy: Mapping[str, Any]) -> dict[str, str]:
    """Return for how long restic keeps every snapshot, and one of each day, week and month."""
    return rules.backup_keep(retention(policy))


def purge_rules(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the end of a leaver's retention goes by (`Rules` of the engine).

    >>> purge_rules({"required_refs": {"purge": ["decision_ref"]}})
    {'block_days': 365, 'backup_days': 373, 'required_refs': {'purge': ['decision_ref']}}
    """
    block_days = (policy.get("address") or {}).get("reuse_block_days")
    return {
        "block_days": policy_fields().defaults["address"]["reuse_block_days"] if block_days is None else block_days,
        "backup_days": rules.backup_days(retention(policy)),
        "required_refs": {"purge": list((policy.get("required_refs") or {}).get("purge") or [])},
    }


def retention_seen(hosts: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what playbooks/retention.yml has registered on each of `hosts` (their variables), for `retention_report`.

    >>> found = {"stdout_lines": ["Junk 3"]}
    >>> retention_seen([{"inventory_hostname": "mail1", "retention_folders": found}])
    {'mail1': {'logs': [], 'journal': 0, 'folders': {'Junk': 3}, 'purged': []}}
    """

    def files(host: Mapping[str, Any], name: str) -> list[str]:
        return [Path(file["path"]).name for file in host.get(name, {}).get("files", ())]

    def lines(host: Mapping[str, Any], name: str) -> list[str]:
        return list(host.get(name, {}).get("stdout_lines", ()))

    return {
        host["inventory_hostname"]: {
            "logs": sorted(set(files(host, "retention_logs"))),
            "journal": len(files(host, "retention_journal")),
            "folders": {line.split()[0]: int(line.split()[1]) for line in lines(host, "retention_folders")},
            "purged": [line.partition(":")[0] for line in lines(host, "retention_purged")],
        }
        for host in hosts
    }


def retention_report(
    policy: Mapping[str, Any], directory: Mapping[str, Any], hosts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is kept, for how long, and what should be gone by now; and the same in words (`lines`)."""
    found = rules.report(retention(policy), directory, hosts)
    return {**found, "lines": rules.lines(found)}


def access_lines(ldif: str) -> list[str]:
    """Return what ldapsearch says of the accesses in the decision log, a line for each, oldest first.

    >>> access_lines("dn: cn=a\\ndecisionTime: 20261126120000Z\\ndecisionBy: an@pc\\n"
    ...     'decisionChange: {"address": "so@x.vn", "what": "list", "refs": {"grounds": "1/QD"}}\\n')
    ['2026-11-26 12:00 UTC an@pc: so@x.vn, list, on 1/QD']
    """
    found = []
    for entry in ldif.split("\n\n"):
        values = {}
        for line in entry.splitlines():
            name, _sign, value = line.partition(":")
            values[name] = b64decode(value[1:]).decode() if value.startswith(":") else value.strip()
        if "decisionChange" not in values:
            continue
        change, time = json.loads(values["decisionChange"]), values["decisionTime"]
        shown = f"{time[:4]}-{time[4:6]}-{time[6:8]} {time[8:10]}:{time[10:12]} UTC {values['decisionBy']}"
        what = ", ".join(str(change[name]) for name in ("what", "folder", "sender", "subject") if change.get(name))
        found.append(f"{shown}: {change['address']}, {what}, on {change['refs']['grounds']}")
    return sorted(found)


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "retention": retention,
            "backup_keep": backup_keep,
            "purge_rules": purge_rules,
            "retention_report": retention_report,
            "retention_seen": retention_seen,
            "access_lines": access_lines,
        }
