"""A directory in memory that applies the steps of a plan and refuses what slapd or the mail would not bear."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from hopthu.plan import Change, Plan, make_plan, read_plan
from hopthu.steps import BRANCHES, Step, first_entry

BASE = "dc=daklak,dc=gov,dc=vn"
DOMAIN = "daklak.gov.vn"
LOADER = f"cn=loader,ou=services,{BASE}"
NOW = "20261121000000Z"

Line = dict[str, Any]


def unit(identity: str, local_part: str, *aliases: str, refs: dict[str, str] | None = None, **attributes: Any) -> Line:
    """A line of desired.jsonl for a unit; `attributes` by their LDAP name, a value or a list."""
    values = {"ou": f"Sở {identity}", "mailboxState": "active", "mailboxClass": "unit", **attributes}
    return _line("unit", identity, local_part, aliases, values, refs)


def person(
    identity: str, local_part: str, *aliases: str, refs: dict[str, str] | None = None, **attributes: Any
) -> Line:
    """A line of desired.jsonl for a person."""
    values = {"cn": "Lê An", "sn": "Lê", "mailboxState": "active", "mailboxClass": "person", **attributes}
    return _line("person", identity, local_part, aliases, values, refs)


def application(
    identity: str, *own: str, senders: Sequence[str] = (), refs: dict[str, str] | None = None, **attributes: Any
) -> Line:
    """A line of desired.jsonl for an application that sends as its `own` addresses and as `senders`."""
    values = {"cn": f"Hệ thống {identity}", "mailboxState": "active", "mailboxClass": "application"}
    values |= {"applicationHost": ["192.0.2.1"], "applicationSender": sorted(map(_address, (*own, *senders)))}
    return _line("application", identity, identity, own, {**values, **attributes}, refs)


def _line(
    kind: str,
    identity: str,
    local_part: str,
    aliases: Sequence[str],
    values: dict[str, Any],
    refs: dict[str, str] | None,
) -> Line:
    found = {"mail": _address(local_part), "mailLocalAddress": sorted(map(_address, aliases)), **values}
    listed = {name: value if isinstance(value, list) else [value] for name, value in found.items() if value}
    return {"k": kind, "i": identity, "a": listed, "r": refs or {}, "l": f"units.yml:{identity}"}


def _address(text: str) -> str:
    return text if "@" in text else f"{text}@{DOMAIN}"


def delegate(person_id: str, **more: str) -> str:
    """A value of mailboxDelegate."""
    return json.dumps({"person": person_id, **more}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class Tree:
    """The live tree: DN → attributes; and how often a mailbox got a password."""

    def __init__(self, **policy: Any) -> None:
        self.policy = {"domain": DOMAIN, "alias_days": 10, "block_days": 30, "retention_days": 20, **policy}
        self.entries: dict[str, dict[str, list[str]]] = {}
        self.now = NOW
        self.passwords: list[str] = []

    def plan(self, *lines: Line, **options: Any) -> Plan:
        """Plan, and take the plan through its file form."""
        ordered = sorted(lines, key=lambda line: line["k"], reverse=True)
        header = {"policy": self.policy}
        desired = [json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode() for line in [header, *ordered]]
        rows = {"base": BASE, "loader": LOADER, "now": self.now, "removals": 1000, **options}
        plan = make_plan(desired, self.mailboxes(), self.rows("ou=released"), **rows)
        top, rest = read_plan(plan.lines())
        parsed = list(rest)
        changes = [row for row in parsed if isinstance(row, Change)]
        return Plan(top, changes, [row for row in parsed if isinstance(row, Step)])

    def mailboxes(self) -> list[tuple[str, dict[str, list[bytes]]]]:
        """The entries of all mailboxes, in the order in which the module reads them."""
        return [row for branch in BRANCHES.values() for row in self.rows(branch)]

    def rows(self, branch: str) -> list[tuple[str, dict[str, list[bytes]]]]:
        """The entries below a branch as python-ldap gives them."""
        return [
            (dn, {name: [value.encode() for value in values] for name, values in attributes.items()})
            for dn, attributes in self.entries.items()
            if f",{branch}," in dn
        ]

    def load(self, *lines: Line, **options: Any) -> Plan:
        """Plan and apply."""
        plan = self.plan(*lines, **options)
        self.apply(plan)
        return plan

    def apply(self, plan: Plan, steps: Iterable[int] | None = None) -> None:
        """Apply the steps with these indices, or all, in this order; check the tree after each."""
        if plan.header["fill"]:
            assert plan.steps == []
            self.entries = {
                change.dn: {
                    **first_entry(change.kind, change.id, change.after or {}, change.refs, self.now),
                    "creatorsName": [LOADER],
                }
                for change in plan.changes
            }
            self.check()
        for index in range(len(plan.steps)) if steps is None else steps:
            step = plan.steps[index]
            change = plan.changes[step.change]
            assert change.refused is None
            if step.step == "delete":
                del self.entries[step.dn]
            elif step.step == "modify":
                entry = {**self.entries[step.dn], **step.set}
                self.entries[step.dn] = {name: values for name, values in entry.items() if values}
            else:
                assert step.dn not in self.entries
                assert all(step.set.values())
                self.entries[step.dn] = {**step.set, "creatorsName": [LOADER]}
            if step.password:
                self.passwords.append(change.id)
            self.check()

    def check(self) -> None:
        """Every address has one owner: slapd's overlay, and no mail that could go to two mailboxes."""
        mails: dict[str, str] = {}
        aliases: dict[str, str] = {}
        owners: dict[str, str] = {}
        for dn, entry in self.entries.items():
            if "ou=released" in dn:
                continue
            assert len(entry["mail"]) == 1
            for where, name in ((mails, "mail"), (aliases, "mailLocalAddress")):
                for address in entry.get(name, []):
                    assert where.setdefault(address.lower(), dn) == dn, f"{name} {address} stands at two entries"
                    if not (entry["mailboxState"] == ["dissolved"] and "mailboxSuccessor" in entry):
                        assert owners.setdefault(address.lower(), dn) == dn, f"{address} stands at two entries"

    def entry(self, identity: str) -> dict[str, list[str]]:
        """The entry of a mailbox, or its tombstone."""
        return next(entry for dn, entry in self.entries.items() if dn.startswith(f"uid={identity},"))

    def one(self, identity: str, name: str) -> str | None:
        """The only value of an attribute, or None."""
        values = self.entry(identity).get(name)
        assert values is None or len(values) == 1
        return values[0] if values else None


def any_order(plan: Plan, chance: random.Random) -> list[int]:
    """The steps in an order that slapd may come to carry them out in: each after those that it waits for."""
    waiting = {index: set(step.after) for index, step in enumerate(plan.steps)}
    order: list[int] = []
    while waiting:
        ready = [index for index, after in waiting.items() if after <= set(order)]
        assert ready, "steps wait for each other"
        index = chance.choice(ready)
        order.append(index)
        del waiting[index]
    return order


def words(plan: Plan) -> list[str]:
    """The changes, short: "id action also…", with "REFUSED" before the refused."""
    return [
        " ".join([*(["REFUSED"] if change.refused else []), change.id, change.action, *change.also])
        for change in plan.changes
    ]
