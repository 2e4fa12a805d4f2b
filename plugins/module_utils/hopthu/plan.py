"""The difference between the entries that shall exist and the live tree, in a safe order.

The only part of the engine that runs on the managed host, and pure: no connection, no clock.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from typing import Any

Attributes = dict[str, list[str]]

BRANCHES = {"unit": "ou=units", "person": "ou=people"}
OBJECT_CLASSES = {
    "unit": ["organizationalUnit", "hopThuMailbox", "inetLocalMailRecipient"],
    "person": ["inetOrgPerson", "hopThuMailbox", "inetLocalMailRecipient"],
}
_MAILBOX = (
    "mail",
    "mailLocalAddress",
    "mailboxState",
    "mailboxClass",
    "mailboxQuota",
    "businessCategory",
)
MANAGED = {
    "unit": ("ou", *_MAILBOX, "mailboxUnitCode"),
    "person": ("cn", "sn", "givenName", "title", "departmentNumber", *_MAILBOX),
}
"""The attributes that are compared and changed; all others belong to slapd or to the user."""


@dataclass(slots=True)
class Entry:
    """A mailbox that shall exist. `kind` and `id` are its identity; its addresses may change."""

    kind: str
    id: str
    attributes: Attributes
    refs: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class LiveEntry:
    """A mailbox that exists."""

    kind: str
    id: str
    dn: str
    attributes: Attributes


@dataclass(slots=True)
class Change:
    """What happens to one mailbox: `add` has no `before`, `remove` no `after`."""

    action: str
    kind: str
    id: str
    dn: str
    before: Attributes | None
    after: Attributes | None
    refs: dict[str, str]


@dataclass(slots=True)
class Step:
    """One LDAP operation of the change with the index `change`.

    Of a change of action `change`, `attributes` are replaced; an empty list removes the attribute.
    """

    change: int
    attributes: Attributes | None = None


@dataclass
class Plan:
    """All changes, and the steps that carry them out in order."""

    changes: list[Change]
    steps: list[Step]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """Take back what `to_json` gave."""
        return cls(
            [Change(**change) for change in value["changes"]],
            [Step(**step) for step in value["steps"]],
        )


def make_plan(desired: list[Entry], live: list[LiveEntry], base: str) -> Plan:
    """Compare and order: what has to be done below `base` so that `live` becomes `desired`.

    Ids are compared as LDAP does, without case. The addresses of `desired` must be unique.
    """
    wanted = {(entry.kind, entry.id.lower()): entry for entry in desired}
    known = {(entry.kind, entry.id.lower()): entry for entry in live}
    changes = [
        Change("remove", old.kind, old.id, old.dn, old.attributes, None, {})
        for key, old in known.items()
        if key not in wanted
    ]
    adds = []
    for key, entry in wanted.items():
        present = known.get(key)
        if present is None:
            dn = f"uid={entry.id},{BRANCHES[entry.kind]},{base}"
            adds.append(Change("add", entry.kind, entry.id, dn, None, entry.attributes, entry.refs))
        elif different(entry.kind, present.attributes, entry.attributes):
            before, after = present.attributes, entry.attributes
            changes.append(Change("change", entry.kind, entry.id, present.dn, before, after, entry.refs))
    changes += adds
    return Plan(changes, _ordered(changes, live))


def different(kind: str, before: Attributes, after: Attributes) -> Attributes:
    """Return the managed attributes that differ, with the values of `after` (none: empty list)."""
    return {
        name: after.get(name, [])
        for name in MANAGED[kind]
        if sorted(before.get(name, [])) != sorted(after.get(name, []))
    }


def _addresses(attributes: Attributes | None) -> set[str]:
    """Return all addresses of an entry, in lower case as LDAP compares them."""
    if attributes is None:
        return set()
    values = attributes.get("mail", []) + attributes.get("mailLocalAddress", [])
    return {value.lower() for value in values}


def _ordered(changes: list[Change], live: list[LiveEntry]) -> list[Step]:
    """Order the changes so that an address is given up by one entry before another takes it.

    A change waits until its addresses are free. Where changes wait for each other in a ring, such
    as two mailboxes that swap addresses, one first gives up all that it will lose: for that moment
    it may have a parking address, since an entry must have one.
    """
    held: dict[str, tuple[str, str]] = {
        address: (entry.kind, entry.id.lower()) for entry in live for address in _addresses(entry.attributes)
    }
    gains = [_addresses(change.after) - _addresses(change.before) for change in changes]
    losses = [_addresses(change.before) - _addresses(change.after) for change in changes]
    wanted = set().union(*gains)
    waiting: dict[str, list[int]] = {}
    ready = deque(range(len(changes)))
    steps: list[Step] = []

    def free(addresses: set[str]) -> None:
        for address in addresses:
            held.pop(address, None)
            ready.extend(waiting.pop(address, []))

    def run() -> None:
        while ready:
            index = ready.popleft()
            change = changes[index]
            taken = next((address for address in sorted(gains[index]) if address in held), None)
            if taken is not None:
                waiting.setdefault(taken, []).append(index)
                continue
            step = Step(index)
            if change.before is not None and change.after is not None:
                step.attributes = different(change.kind, change.before, change.after)
            steps.append(step)
            free({address for address in losses[index] if address in held})
            held.update(dict.fromkeys(gains[index], (change.kind, change.id.lower())))

    run()
    owners = {(change.kind, change.id.lower()): index for index, change in enumerate(changes)}
    while waiting:
        # Who holds a waited-for address waits too, so it is a change: an added entry holds nothing
        # before its step, and a removed one waits for nothing.
        index = owners[held[next(iter(waiting))]]
        change = changes[index]
        steps.append(Step(index, _release(change, held.keys() | wanted)))
        given_up, losses[index] = losses[index], set()
        free(given_up)
        run()
    return steps


def _release(change: Change, taken: Set[str]) -> Attributes:
    """Return what a change has to replace so that it holds no address which it will lose."""
    before, keeps = change.before or {}, _addresses(change.after)
    released: Attributes = {
        "mailLocalAddress": [alias for alias in before.get("mailLocalAddress", []) if alias.lower() in keeps]
    }
    mail = before["mail"][0]
    if mail.lower() not in keeps:
        local, domain = f"moving.{change.id}", mail.rpartition("@")[2]
        while f"{local}@{domain}".lower() in taken:
            local += "x"
        released["mail"] = [f"{local}@{domain}"]
    return released


def counts(changes: list[Change]) -> dict[str, int]:
    """Count the changes by action and kind: {"add": 2, "change": 0, "remove": 0, "add_unit": …}."""
    found = Counter(change.action for change in changes)
    found.update(f"{change.action}_{change.kind}" for change in changes)
    actions = ("add", "change", "remove")
    names = [*actions, *(f"{action}_{kind}" for action in actions for kind in BRANCHES)]
    return {name: found[name] for name in names}


def as_text(kind: str, attributes: Attributes | None) -> str:
    """Return one side of a change as lines "attribute: value" for a diff."""
    lines = [f"{name}: {value}\n" for name in MANAGED[kind] for value in sorted((attributes or {}).get(name, []))]
    return "".join(lines)
