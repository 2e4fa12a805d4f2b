"""The LDAP operations of a plan, in an order in which every state between them is valid. Pure.

An address is given up by one entry before another takes it; what may happen at the same time does not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .lifecycle import (
    DECLARED,
    DERIVED,
    Attributes,
    Former,
    Mailbox,
    Rules,
    addresses,
    differing,
    digest,
    former_addresses,
    later,
    one,
    succeeded,
)

BRANCHES = {"unit": "ou=units", "person": "ou=people", "application": "ou=applications"}
OBJECT_CLASSES = {
    "unit": ["organizationalUnit", "hopThuMailbox", "inetLocalMailRecipient"],
    "person": ["inetOrgPerson", "hopThuMailbox", "inetLocalMailRecipient"],
    "application": ["hopThuApplication"],
}
MANAGED = {kind: (*DECLARED[kind], *DERIVED) for kind in BRANCHES}
"""What is compared and written."""


@dataclass(slots=True)
class Step:
    """One LDAP operation for the change with the index `change`, to be done when the steps `after` are done.

    "add", "modify" and "tombstone" set attributes, an empty list removes one; "delete" has none.
    """

    step: str
    change: int
    dn: str
    after: list[int] = field(default_factory=list)
    set: Attributes = field(default_factory=dict)
    password: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, in their order."""
        return {name: getattr(self, name) for name in self.__slots__}


def first_entry(
    kind: str, identity: str, after: Attributes, refs: dict[str, str], now: str, temporary: Collection[str] = ()
) -> Attributes:
    """Return all attributes, but for its password, of a mailbox that is made; `temporary` of its aliases end."""
    derived = {name: after[name] for name in DERIVED if name in after}
    declared = {name: values for name, values in after.items() if name not in derived}
    if temporary:
        declared["mailLocalAddress"] = [alias for alias in after["mailLocalAddress"] if alias not in temporary]
    found = {
        "objectClass": OBJECT_CLASSES[kind],
        "uid": [identity],
        **after,
        "mailboxStateSince": [now],
        "mailboxDigest": [digest(declared) + digest({**derived, "alias": [*temporary]})],
    }
    if refs:
        found["mailboxGrounds"] = [f"{name} {value}" for name, value in sorted(refs.items())]
    return found


def only(attributes: Attributes, names: Collection[str]) -> Attributes:
    """Return those of the attributes `names` that have a value."""
    return {name: attributes[name] for name in sorted(names) if attributes.get(name)}


@dataclass(slots=True, eq=False)
class Work:
    """What to write to one mailbox: `target`, all managed attributes (None: the entry goes), and `book`.

    `temporary` are those of its aliases that end, `inherited` those that come from dissolved units.
    """

    box: Mailbox
    target: Attributes | None
    book: Attributes
    inherited: set[str] = field(default_factory=set)
    temporary: set[str] = field(default_factory=set)
    index: int = 0
    password: bool = False
    derived_by_hand: bool = False

    def names(self) -> set[str]:
        """Return the managed attributes that differ."""
        if self.box.live is None:
            return set(self.target or ())
        return differing(self.box.live or {}, self.target or {}, MANAGED[self.box.kind])

    def shown(self) -> tuple[Attributes, Attributes]:
        """Return both sides without what stays."""
        if self.box.live is None:
            return {}, self.target or {}
        names = self.names()
        return only(self.box.live, names), only(self.target or {}, names)

    def own_action(self) -> str:
        """Name a change that is not in the files: by hand, by time, or because of another mailbox."""
        if self.derived_by_hand:
            return "drift"
        live, target = self.box.live or {}, self.target or {}
        names = self.names()
        only_lost = set(target.get("mailLocalAddress", ())) <= set(live.get("mailLocalAddress", ()))
        ended = names <= {"mailLocalAddress"} and only_lost and one(live, "mailboxDigest")
        return "expire" if ended else "update"

    def keys(self, attributes: Attributes | None) -> set[str]:
        """Return what only one mailbox may hold at a time: a main address, an alias, and an address at all.

        A dissolved unit keeps its main address though its successor takes the mail: slapd allows that, since its
        overlay looks at main addresses and aliases apart.
        """
        if not attributes:
            return set()
        mail, aliases = attributes.get("mail", ()), attributes.get("mailLocalAddress", ())
        found = {f"m:{address}" for address in mail} | {f"l:{address}" for address in aliases}
        if not succeeded(attributes):
            found.update(f"a:{address}" for address in (*mail, *aliases))
        return {key.lower() for key in found}


def ordered(works: list[Work], tombs: Collection[str], rules: Rules, now: str) -> list[Step]:
    """Order the operations so that an address is given up by one entry before another takes it.

    A change waits until its addresses are free. Where changes wait for each other in a ring, such as two units that
    swap addresses, one first gives up what others wait for: for that moment it may have a parking address, since an
    entry must have one.
    """
    return _Order(works, tombs, rules, now).steps


class _Order:
    """The steps, and what is held while they are put in order."""

    def __init__(self, works: list[Work], tombs: Collection[str], rules: Rules, now: str) -> None:
        self.works, self.tombs, self.rules, self.now = works, tombs, rules, now
        self.steps: list[Step] = []
        self.held: dict[str, int] = {}  # key → index of the work that holds it now
        self.freed: dict[str, int] = {}  # key → index of the step that gave it up
        self.gains: list[set[str]] = []
        self.losses: list[set[str]] = []
        self.last: dict[int, int] = {}  # work → its latest step
        for index, work in enumerate(works):
            before, after = work.keys(work.box.live), work.keys(work.target)
            self._heirs(work, before, after)
            self.held.update(dict.fromkeys(before, index))
            self.gains.append(after - before)
            self.losses.append(before - after)
        self.wanted = set().union(*self.gains) if works else set()
        self.waiting: dict[str, list[int]] = {}
        self.ready = deque(range(len(works)))
        self._run()
        while self.waiting:
            self._park()
            self._run()
        self._rights_after_units()

    def _heirs(self, work: Work, before: set[str], after: set[str]) -> None:
        """Have a successor give up the aliases that end before the entry of the dissolved unit forgets them.

        Else a run that dies between the two would leave aliases that nothing explains.
        """
        box = work.box
        live_aliases = set((box.live or {}).get("mailLocalAddress", ()))
        before.update(f"h:{alias}:{box.id}".lower() for alias in live_aliases - addresses(box.had))
        after.update(f"h:{alias}:{box.id}".lower() for alias in work.inherited)
        if succeeded(box.live):
            heir = one(box.live, "mailboxSuccessor")
            kept = set()
            if work.target is not None and one(work.target, "mailboxSuccessor").lower() == heir.lower():
                kept = {address for address, until in former_addresses(work.book).items() if until.alias_until}
            ended = {address for address, until in box.former.items() if until.alias_until} - kept
            after.update(f"h:{address}:{heir}".lower() for address in ended)

    def _run(self) -> None:
        while self.ready:
            index = self.ready.popleft()
            taken = next((key for key in sorted(self.gains[index]) if self.held.get(key, index) != index), None)
            if taken is not None:
                self.waiting.setdefault(taken, []).append(index)
                continue
            first = len(self.steps)
            self._emit(index)
            waits = {self.freed[key] for key in self.gains[index] if key in self.freed}
            self.steps[first].after = sorted({*self.steps[first].after, *waits} - {first})
            self._free(self.losses[index], len(self.steps) - 1)
            self.held.update(dict.fromkeys(self.gains[index], index))

    def _free(self, keys: set[str], step: int) -> None:
        for key in keys:
            self.held.pop(key, None)
            self.freed[key] = step
            self.ready.extend(self.waiting.pop(key, []))

    def _emit(self, index: int) -> None:
        """Append the steps of one change, the latter waiting for the former."""
        work = self.works[index]
        box = work.box
        if work.target is None:
            steps = [Step("delete", work.index, box.dn)]
            if not box.by_hand and box.id.lower() not in self.tombs:
                steps.insert(0, self._tombstone(work))
        elif box.live is None or box.by_hand:
            content = first_entry(box.kind, box.id, work.target, box.refs, self.now, work.temporary)
            dn = f"uid={box.id},{BRANCHES[box.kind]},{box.dn.split(',', 2)[2]}"
            steps = [Step("add", work.index, dn, set=content, password=work.password)]
            if box.live is not None:
                steps.insert(0, Step("delete", work.index, box.dn))
        else:
            replaced = {name: work.target.get(name, []) for name in sorted(work.names())}
            replaced.update((name, values) for name, values in work.book.items() if values != box.live.get(name, []))
            steps = [Step("modify", work.index, box.dn, set=replaced, password=work.password)]
        for step in steps:
            if index in self.last:
                step.after.append(self.last[index])
            self.last[index] = len(self.steps)
            self.steps.append(step)

    def _tombstone(self, work: Work) -> Step:
        """Keep the id and the addresses of a mailbox that goes: neither may pass to somebody else too early."""
        box = work.box
        live = box.live or {}
        blocked = later(one(live, "mailboxStateSince") or self.now, self.rules.block_days)
        former = {address: Former(None, blocked) for address in addresses(box.had)}
        former.update((address, Former(None, until.blocked_until)) for address, until in box.former.items())
        values: Attributes = {
            "objectClass": ["hopThuReleased"],
            "uid": [box.id],
            "mailboxState": ["purged"],
            "mailboxClass": [box.kind],
            "mailboxStateSince": [self.now],
            "mailboxFormerAddress": sorted(
                until.text(address)
                for address, until in former.items()
                if address not in box.passed_on and not address.startswith(box.parking)
            ),
            "mailboxGrounds": live.get("mailboxGrounds", []),
        }
        if box.kind != "application":  # it has no content
            values["mailboxBackupsUntil"] = [later(self.now, self.rules.backup_days)]
        dn = f"uid={box.id},ou=released,{box.dn.split(',', 2)[2]}"
        return Step("tombstone", work.index, dn, set={name: found for name, found in values.items() if found})

    def _park(self) -> None:
        """Break a ring: who holds a waited-for address waits too, so it is a change that can step aside."""
        key = next(iter(self.waiting))
        index = self.held[key]
        work = self.works[index]
        box, live = work.box, work.box.live or {}
        given = {held[2:] for held in self.losses[index] & self.wanted}
        parked: Attributes = {
            "mailLocalAddress": [alias for alias in live.get("mailLocalAddress", []) if alias.lower() not in given]
        }
        mail = one(live, "mail")
        if mail.lower() in given:
            local, domain = box.parking, mail.rpartition("@")[2]
            while any(f"{kind}:{local}@{domain}".lower() in self.held.keys() | self.wanted for kind in "mla"):
                local += "x"
            parked["mail"] = [f"{local}@{domain}"]
        written = one(live, "mailboxDigest")
        if written:
            half = digest(
                {
                    **box.had,
                    **parked,
                    "mailLocalAddress": [alias for alias in parked["mailLocalAddress"] if alias in addresses(box.had)],
                }
            )
            parked["mailboxDigest"] = [half + written[32:]]
        changed = {name: values for name, values in parked.items() if values != live.get(name, [])}
        step = Step("modify", work.index, box.dn, set=changed)
        if index in self.last:
            step.after.append(self.last[index])
        self.last[index] = len(self.steps)
        self.steps.append(step)
        lost = {held for held in self.losses[index] if held[2:] in given}
        self.losses[index] -= lost
        self._free(lost, len(self.steps) - 1)

    def _rights_after_units(self) -> None:
        """Give a person the right to act for a unit after the unit is as the plan says."""
        final = {work.box.id: self.last[index] for index, work in enumerate(self.works) if work.box.kind == "unit"}
        for index, work in enumerate(self.works):
            if work.box.kind == "person" and work.target is not None:
                step = self.last[index]
                units = set(work.target.get("mailboxActsFor", ())) - set(
                    (work.box.live or {}).get("mailboxActsFor", ())
                )
                waits = {final[unit] for unit in units if unit in final and final[unit] < step}
                self.steps[step].after = sorted({*self.steps[step].after, *waits})
