"""The plan: what has to be done so that the live tree becomes what the files declare, in a safe order.

Runs on the managed host, and is pure: no connection, no clock. `lifecycle.py` says what happens to each mailbox and
what is refused; here follow what depends on other mailboxes (rights, temporary aliases, pointers), the rows that
people read, and the LDAP operations.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

from .lifecycle import (
    BOOKKEEPING,
    DECLARED,
    DERIVED,
    PASSWORD,
    WEIGHT,
    Attributes,
    Former,
    Mailbox,
    Refusals,
    Rules,
    addresses,
    agents,
    classify,
    differing,
    digest,
    former_addresses,
    former_after,
    later,
    one,
    succeeded,
)

BRANCHES = {"unit": "ou=units", "person": "ou=people"}
OBJECT_CLASSES = {
    "unit": ["organizationalUnit", "hopThuMailbox", "inetLocalMailRecipient"],
    "person": ["inetOrgPerson", "hopThuMailbox", "inetLocalMailRecipient"],
}
READ = {kind: ("uid", *DECLARED[kind], *DERIVED, *BOOKKEEPING, "creatorsName") for kind in BRANCHES}
"""The attributes to read of live mailboxes."""
FILL = 2000
"""An empty tree that gets more mailboxes than this is filled by slapadd."""

Row = tuple[str, dict[str, list[bytes]]]
"""An entry as python-ldap gives it: DN and attributes."""

_MANAGED = {kind: (*DECLARED[kind], *DERIVED) for kind in BRANCHES}
_UNCOMPARED = frozenset({*BOOKKEEPING, "uid", "creatorsName"})
_POINTER = "this mailbox is closed, write to {0} (hop thu da dong, xin gui den {0})"
_RECEIVES = frozenset({"active", "suspended", "legacy"})


@dataclass(slots=True)
class Change:
    """What happens to one mailbox, for people: `before` and `after` hold the attributes that differ.

    `unit` is the name of its unit, `line` where the files speak of it. A refused change is not carried out.
    """

    action: str
    also: list[str]
    kind: str
    id: str
    dn: str
    address: str
    name: str
    unit: str
    before: Attributes | None
    after: Attributes | None
    refs: dict[str, str]
    refused: str | None
    drift: bool
    password: bool
    line: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, in their order."""
        return {name: getattr(self, name) for name in self.__slots__}


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


@dataclass
class Plan:
    """All changes, and the steps that carry them out; a plan that fills an empty tree has none."""

    header: dict[str, Any]
    changes: list[Change]
    steps: list[Step]

    def lines(self) -> Iterator[str]:
        """Yield the plan as lines of JSON: the header, the changes, the steps."""
        encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
        yield encode(self.header)
        for change in self.changes:
            yield encode(change.as_dict())
        for step in self.steps:
            yield encode(step.as_dict())


def read_plan(lines: Iterable[str | bytes]) -> tuple[dict[str, Any], Iterator[Change | Step]]:
    """Take back what `Plan.lines` gave: the header, and an iterator over changes and then steps."""
    parsed = map(json.loads, lines)
    header = next(parsed)
    return header, (Step(**line) if "step" in line else Change(**line) for line in parsed)


def make_plan(
    desired: Iterable[bytes],
    live: Iterable[Row],
    released: Iterable[Row],
    *,
    base: str,
    loader: str,
    now: str,
    serial: int = 0,
    removals: int | None = None,
    issued: Collection[str] = (),
) -> Plan:
    """Compare and order: what has to be done below `base` so that `live` becomes `desired`.

    `desired` are the lines of desired.jsonl, header and units first; `live` the mailboxes with the attributes of
    READ, units before people; `released` the tombstones. `loader` is the kit's own identity: an entry without digest
    that another made was made by hand. `now` is generalizedTime in UTC. `removals` allows to remove that many
    mailboxes; `issued` names slip runs whose mailboxes are looked up.

    Ids are compared as LDAP does, without case. The addresses of `desired` are unique.
    """
    return _Planner(desired, base, loader, now).plan(live, released, serial, removals, frozenset(issued))


def make_reset_plan(
    policy: dict[str, Any],
    resets: list[dict[str, Any]],
    live: Iterable[Row],
    *,
    base: str,
    loader: str,
    now: str,
    serial: int = 0,
) -> Plan:
    """Plan new initial passwords: `resets` are {"id", "refs"}; `live` are the mailboxes of these ids."""
    planner = _Planner([json.dumps({"policy": policy}).encode()], base, loader, now)
    boxes = {box.id.lower(): box for box in planner.boxes(live)}
    judge = Refusals([], {}, {}, {}, planner.rules, now)
    changes: list[Change] = []
    steps = []
    for wish in resets:
        box = boxes.get(wish["id"].lower()) or Mailbox("person", wish["id"], "", None)
        box.refs, box.line, box.actions, box.listed = wish["refs"], "the command line (-e)", {"reset"}, True
        box.want = box.had
        state = one(box.had, "mailboxState")
        if box.live is None:
            box.refused = f"there is no mailbox with the id {box.id}: look up the id in the files of units and people"
        elif state not in ("active", "suspended"):
            box.refused = f"the mailbox is {state}, and nobody logs in to it"
        else:
            box.refused = judge.grounds(box)
        if not box.refused:
            written = {"mailboxSessionsSince": [now], **_grounds(box)}
            steps.append(Step("modify", len(changes), box.dn, set=written, password=True))
        changes.append(planner.change(box, ["reset"], {}, {}))
    return Plan(_header(changes, serial, now, fill=False, stop=None, issued={}), changes, steps)


def _identified(row: Row) -> tuple[str, dict[str, list[bytes]], str]:
    dn, attributes = row
    return dn, attributes, attributes["uid"][0].decode("utf-8", "replace")


def exported(live: Iterable[Row], *, base: str, loader: str, now: str) -> Iterator[dict[str, Any]]:
    """Yield each live mailbox as {"k", "i", "a"}: what the files would declare, former addresses and grounds.

    Temporary aliases are left out: the files do not name them.
    """
    planner = _Planner([b'{"policy":{"domain":""}}'], base, loader, now)
    for box in planner.boxes(live):
        kept = _only(box.live or {}, ("mailboxFormerAddress", "mailboxGrounds"))
        yield {"k": box.kind, "i": box.id, "a": {**box.had, **kept}}


class _Planner:
    """The data that the parts of one planning share."""

    def __init__(self, desired: Iterable[bytes], base: str, loader: str, now: str) -> None:
        lines = iter(desired)
        policy = json.loads(next(lines))["policy"]
        self.rules = Rules(**{name: value for name, value in policy.items() if value is not None})
        self.base, self.loader, self.now = base, loader.lower(), now
        self.units: dict[str, Mailbox] = {}
        self.people: dict[str, Mailbox] = {}
        self.new_units: dict[str, dict[str, Any]] = {}
        self.new_people: dict[str, bytes] = {}  # parsed only when the live entry is there to compare with
        for line in lines:
            if line.startswith(b'{"k":"person","i":"'):
                self.new_people[line[19 : line.index(b'"', 19)].decode().lower()] = line
            else:
                value = json.loads(line)
                self.new_units[value["i"].lower()] = value
        self.heirs: dict[str, set[str]] = {}  # unit → addresses that it has from dissolved ones, as in LDAP

    # --- reading ---

    def boxes(self, live: Iterable[Row]) -> Iterator[Mailbox]:
        """Yield all live mailboxes, units first."""
        units, rows = self._units_of(live)
        yield from units
        for row in rows:
            yield self.box(*row)

    def _units_of(self, live: Iterable[Row]) -> tuple[list[Mailbox], Iterator[Row]]:
        """Take the units from the front of `live`; return them and what follows."""
        rows = iter(live)
        found, first = [], None
        for row in rows:
            if "ou=people," in row[0]:
                first = row
                break
            found.append(self.box(*row))
        for unit in found:
            if succeeded(unit.live):
                taken = {address for address, until in unit.former.items() if until.alias_until}
                self.heirs.setdefault(one(unit.live, "mailboxSuccessor").lower(), set()).update(taken)
        for unit in found:
            unit.had = self._declared(unit)

        def rest() -> Iterator[Row]:
            if first is not None:
                yield first
            yield from rows

        return found, rest()

    def box(self, dn: str, attributes: dict[str, list[bytes]]) -> Mailbox:
        """Return a live entry as a Mailbox."""
        values = {name: [value.decode("utf-8", "replace") for value in raw] for name, raw in attributes.items()}
        kind = "unit" if ",ou=units," in dn.lower() else "person"
        box = Mailbox(kind, values["uid"][0], dn, values, listed=False)
        box.by_hand = "mailboxDigest" not in values and one(values, "creatorsName").lower() != self.loader
        if not box.by_hand:
            box.former = former_addresses(values)
        box.had = self._declared(box)
        return box

    def _declared(self, box: Mailbox) -> Attributes:
        """Return what the files said of a live mailbox: without what is derived."""
        live = box.live or {}
        found = {name: live[name] for name in DECLARED[box.kind] if name in live}
        temporary = box.former.keys() | self.heirs.get(box.id.lower(), set())
        if temporary and "mailLocalAddress" in found:
            kept = [alias for alias in found["mailLocalAddress"] if alias not in temporary]
            found["mailLocalAddress"] = kept
            if not kept:
                del found["mailLocalAddress"]
        return found

    def _wish(self, box: Mailbox, value: dict[str, Any]) -> Mailbox:
        """Fill in what the files say."""
        want = value["a"]
        if succeeded(want):
            want.pop("mailLocalAddress", None)
        box.want, box.refs, box.line, box.listed = want, value["r"], value["l"], True
        return box

    def _new(self, value: dict[str, Any]) -> Mailbox | None:
        """Return a mailbox that is not in LDAP; None when it has left and so needs none."""
        if value["a"]["mailboxState"][0] in ("left", "dissolved"):
            return None
        kind, identity = value["k"], value["i"]
        return self._wish(Mailbox(kind, identity, f"uid={identity},{BRANCHES[kind]},{self.base}", None), value)

    # --- planning ---

    def plan(
        self, live: Iterable[Row], released: Iterable[Row], serial: int, removals: int | None, issued: Set[str]
    ) -> Plan:
        """Return the plan."""
        slips: dict[str, list[dict[str, str]]] = {run: [] for run in sorted(issued)}
        units, rows = self._units_of(live)
        for unit in units:
            if unit.id.lower() in self.new_units:
                self._wish(unit, self.new_units.pop(unit.id.lower()))
            self.units[unit.id.lower()] = unit
        for value in self.new_units.values():
            if (box := self._new(value)) is not None:
                self.units[box.id.lower()] = box
        acting = {person for box in self.units.values() for side in (box.want, box.live) for person in agents(side)}
        active = sum(one(unit.live, "mailboxState") == "active" for unit in units)
        any_live = bool(units)
        slip_boxes = [unit for unit in units if one(unit.live, "mailboxSlip") in issued]
        for dn, attributes in rows:
            any_live = True
            key = attributes["uid"][0].decode("utf-8", "replace").lower()
            active += attributes["mailboxState"][0] == b"active"
            line = self.new_people.pop(key, None)
            wish = json.loads(line) if line is not None else None
            slip = issued and attributes.get("mailboxSlip", [b""])[0].decode() in issued
            if wish is not None and not slip and key not in acting and _same(attributes, wish["a"]):
                continue
            box = self.box(dn, attributes)
            if wish is not None:
                self._wish(box, wish)
            self.people[key] = box
            if slip:
                slip_boxes.append(box)
        for line in self.new_people.values():
            if (new := self._new(json.loads(line))) is not None:
                self.people[new.id.lower()] = new
        tombs = {}
        for _dn, attributes, identity in map(_identified, released):
            values = {name: [value.decode("utf-8", "replace") for value in raw] for name, raw in attributes.items()}
            tombs[identity.lower()] = (one(values, "mailboxClass"), former_addresses(values))
        for box in slip_boxes:
            about = self.change(box, [""], {}, {})
            fields = {name: getattr(about, name) for name in ("id", "kind", "address", "name", "unit")}
            slips[one(box.live, "mailboxSlip")].append(fields)

        everyone = [*self.units.values(), *self.people.values()]
        for box in everyone:
            waits = succeeded(box.had) and any(until.alias(self.now) for until in box.former.values())
            classify(box, self.rules, self.now, waits)
        Refusals(everyone, self.units, self.people, tombs, self.rules, self.now).run()
        fill = not any_live and sum(not box.refused for box in everyone) > FILL
        changes, works = self._changes(everyone)
        stop = self._stop(changes, active, removals)
        steps = [] if fill or stop else _ordered(works, tombs.keys(), self.rules, self.now)
        return Plan(_header(changes, serial, self.now, fill, stop, slips), changes, steps)

    def _stop(self, changes: list[Change], active: int, allowed: int | None) -> str | None:
        """Return why so many removals are not carried out without a word of the operator."""
        removed = sum(
            not change.refused
            and (change.action in ("leave", "dissolve") or (change.action == "drift" and not change.after))
            for change in changes
        )
        if removed <= 1 or removed <= self.rules.removal_limit * active or (allowed is not None and removed <= allowed):
            return None
        return (
            f"{removed} of {active} active mailboxes would be removed, more than policy.yml allows at once "
            f"(removal_limit {self.rules.removal_limit:g}): nothing was changed. When that is right, run again with "
            f"-e directory_removals={removed}"
        )

    def _changes(self, everyone: list[Mailbox]) -> tuple[list[Change], list[_Work]]:
        """Return the rows, and for those that are carried out what to write."""
        acts_for, agent = self._rights()
        inherited = self._inherited()
        changes: list[Change] = []
        works: list[_Work] = []
        for box in everyone:
            actions = sorted(box.actions, key=WEIGHT.index)
            if box.refused:
                names = differing(box.had, box.want or {}, DECLARED[box.kind])
                changes.append(self.change(box, actions, _only(box.had, names), _only(box.want or {}, names)))
                if box.live is None or box.by_hand:
                    continue
                actions = []
            work = self._work(box, acts_for, agent, inherited)
            if work is None:
                continue
            if not actions or (work.derived_by_hand and "drift" not in actions):
                actions.append(work.own_action())
            change = self.change(box, actions, *work.shown())
            change.refused = None
            change.drift = "drift" in actions
            change.password = not box.refused and not PASSWORD.isdisjoint(actions)
            if box.refused:
                change.refs = {}
            work.index, work.password = len(changes), change.password
            changes.append(change)
            works.append(work)
        return changes, works

    def change(self, box: Mailbox, actions: list[str], before: Attributes, after: Attributes) -> Change:
        """Return the row of a mailbox."""
        shown = box.want or box.had
        unit = self.units.get(one(shown, "departmentNumber").lower()) if box.kind == "person" else box
        unit_name = one(unit.want or unit.had, "ou") if unit is not None else one(shown, "departmentNumber")
        return Change(
            action=actions[0],
            also=actions[1:],
            kind=box.kind,
            id=box.id,
            dn=box.dn,
            address=one(shown, "mail"),
            name=one(shown, "cn" if box.kind == "person" else "ou"),
            unit=unit_name,
            before=before or None,
            after=after or None,
            refs=box.refs,
            refused=box.refused,
            drift="drift" in actions,
            password=not PASSWORD.isdisjoint(actions),
            line=box.line,
        )

    def _rights(self) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """Return person → units that he may act for, and unit → addresses of those who may send as it.

        Nobody acts for a unit that is suspended, and a suspended person for none; a legacy unit is only read.
        """
        acts_for: dict[str, set[str]] = {}
        agent: dict[str, set[str]] = {}
        for key, unit in self.units.items():
            state = one(unit.effective, "mailboxState")
            if state not in ("active", "legacy"):
                continue
            for identity in agents(unit.effective):
                person = self.people.get(identity)
                if person is None or one(person.effective, "mailboxState") != "active":
                    continue
                acts_for.setdefault(identity, set()).add(unit.id)
                if state == "active":
                    agent.setdefault(key, set()).add(one(person.effective, "mail"))
        return acts_for, agent

    def _inherited(self) -> dict[str, set[str]]:
        """Return unit → addresses of dissolved units that are its temporary aliases after the plan."""
        found: dict[str, set[str]] = {}
        for unit in self.units.values():
            if succeeded(unit.effective):
                former = former_after(unit, self.rules, self.now)
                taken = {address for address, until in former.items() if until.alias(self.now)}
                found.setdefault(one(unit.effective, "mailboxSuccessor").lower(), set()).update(taken)
        return found

    def _pointer(self, box: Mailbox, former: dict[str, Former]) -> str:
        """Return whom a closed mailbox points to, or ""."""
        shown = box.effective
        state = one(shown, "mailboxState")
        if self.rules.pointer != "unit" or state not in ("left", "dissolved"):
            return ""
        name = "departmentNumber" if box.kind == "person" else "mailboxSuccessor"
        if any(until.alias(self.now) for until in former.values()) and succeeded(shown):
            return ""  # its mail still goes to the successor
        seen: set[str] = set()
        while (key := one(shown, name).lower()) and key not in seen and key in self.units:
            seen.add(key)
            shown, name = self.units[key].effective, "mailboxSuccessor"
            if one(shown, "mailboxState") in _RECEIVES:
                return _POINTER.format(one(shown, "mail"))
        return ""

    def _work(
        self, box: Mailbox, acts_for: dict[str, set[str]], agent: dict[str, set[str]], inherited: dict[str, set[str]]
    ) -> _Work | None:
        """Return what to write to a mailbox; None when nothing."""
        declared = box.effective
        if declared is None:
            return _Work(box, None, {}) if box.live is not None else None
        key = box.id.lower()
        former = former_after(box, self.rules, self.now) if box.live is not None else {}
        own = set() if succeeded(declared) else {address for address, until in former.items() if until.alias(self.now)}
        temporary = own | inherited.get(key, set()) - addresses(declared)
        derived: Attributes = {}
        if key in acts_for and box.kind == "person":
            derived["mailboxActsFor"] = sorted(acts_for[key])
        if key in agent and box.kind == "unit":
            derived["mailboxAgent"] = sorted(agent[key])
        if pointer := self._pointer(box, former):
            derived["mailboxPointer"] = [pointer]
        target = {**declared, **derived}
        if temporary:
            target["mailLocalAddress"] = sorted({*declared.get("mailLocalAddress", ()), *temporary})
        work = _Work(box, target, {}, inherited.get(key, set()), temporary)
        if box.live is None or box.by_hand:
            return work
        written = one(box.live, "mailboxDigest")
        half = written[:32] if box.refused and written else digest(declared)
        book = work.book
        book["mailboxDigest"] = [half + digest({**derived, "alias": [*temporary]})]
        names = work.names()
        former_values = sorted(until.text(address) for address, until in former.items())
        if (
            not names
            and (box.refused or not box.actions)
            and written
            and former_values == sorted(box.live.get("mailboxFormerAddress", ()))
        ):
            return None
        book["mailboxFormerAddress"] = former_values
        self._book(box, target, book)
        if names & {*DERIVED, "mailLocalAddress"} and written:
            was = {name: box.live[name] for name in DERIVED if name in box.live}
            heired = self.heirs.get(key, set())
            aliases = [
                *(alias for alias in box.live.get("mailLocalAddress", ()) if alias in box.former or alias in heired),
            ]
            work.derived_by_hand = digest({**was, "alias": aliases}) != written[32:]
        return work

    def _book(self, box: Mailbox, target: Attributes, book: Attributes) -> None:
        """Fill in times and grounds for a mailbox that is in LDAP."""
        live = box.live or {}
        state = one(target, "mailboxState")
        if state != one(live, "mailboxState") or "mailboxStateSince" not in live:
            book["mailboxStateSince"] = [self.now]
        if state not in ("left", "dissolved"):
            book["mailboxRetainUntil"] = []
        elif "mailboxStateSince" in book or "mailboxRetainUntil" not in live:
            book["mailboxRetainUntil"] = [later(self.now, self.rules.retention_days)]
        if not box.refused:
            book.update(_grounds(box))
        lost = set(live.get("mailboxActsFor", ())) - set(target.get("mailboxActsFor", ()))
        if lost or (not box.refused and box.actions & PASSWORD):
            book["mailboxSessionsSince"] = [self.now]


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


def _same(attributes: dict[str, list[bytes]], want: Attributes) -> bool:
    """Tell whether a live entry holds exactly the declared attributes, and was written by the kit."""
    if "mailboxDigest" not in attributes or "mailboxFormerAddress" in attributes or "mailboxRetainUntil" in attributes:
        return False
    if attributes.keys() - _UNCOMPARED != want.keys():
        return False
    for name, values in want.items():
        raw = attributes[name]
        if len(raw) == 1 == len(values):
            if raw[0] != values[0].encode():
                return False
        elif sorted(value.decode("utf-8", "replace") for value in raw) != sorted(values):
            return False
    return True


def _grounds(box: Mailbox) -> Attributes:
    if not box.refs or not box.listed or box.actions <= {"drift", "expire"}:
        return {}
    return {"mailboxGrounds": [f"{name} {value}" for name, value in sorted(box.refs.items())]}


def _only(attributes: Attributes, names: Collection[str]) -> Attributes:
    return {name: attributes[name] for name in sorted(names) if attributes.get(name)}


def _header(
    changes: list[Change], serial: int, now: str, fill: bool, stop: str | None, issued: dict[str, list[dict[str, str]]]
) -> dict[str, Any]:
    done = [change for change in changes if not change.refused]
    counts: dict[str, int] = dict(Counter(change.action for change in done))
    counts.update(total=len(done), refused=len(changes) - len(done))
    hand_overs = sum("hand-over" in (change.action, *change.also) for change in done)
    return {
        "counts": counts,
        "serial": serial,
        "now": now,
        "fill": fill,
        "stop": stop,
        "issued": issued,
        "hand_overs": hand_overs,
    }


# --- steps -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Work:
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
        return differing(self.box.live or {}, self.target or {}, _MANAGED[self.box.kind])

    def shown(self) -> tuple[Attributes, Attributes]:
        """Return both sides without what stays."""
        if self.box.live is None:
            return {}, self.target or {}
        names = self.names()
        return _only(self.box.live, names), _only(self.target or {}, names)

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


def _ordered(works: list[_Work], tombs: Collection[str], rules: Rules, now: str) -> list[Step]:
    """Order the operations so that an address is given up by one entry before another takes it.

    A change waits until its addresses are free. Where changes wait for each other in a ring, such as two units that
    swap addresses, one first gives up what others wait for: for that moment it may have a parking address, since an
    entry must have one.
    """
    return _Order(works, tombs, rules, now).steps


class _Order:
    """The steps, and what is held while they are put in order."""

    def __init__(self, works: list[_Work], tombs: Collection[str], rules: Rules, now: str) -> None:
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

    def _heirs(self, work: _Work, before: set[str], after: set[str]) -> None:
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

    def _tombstone(self, work: _Work) -> Step:
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
