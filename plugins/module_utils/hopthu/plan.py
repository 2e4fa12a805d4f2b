"""The plan: what has to be done so that the live tree becomes what the files declare, in a safe order.

Runs on the managed host, and is pure: no connection, no clock. `lifecycle.py` says what happens to each mailbox and
what is refused; here follow what depends on other mailboxes (rights, temporary aliases, pointers), the rows that
people read; `steps.py` orders the LDAP operations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Set
from dataclasses import dataclass
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
from .steps import BRANCHES, Step, Work, only, ordered

READ = {kind: ("uid", *DECLARED[kind], *DERIVED, *BOOKKEEPING, "creatorsName") for kind in BRANCHES}
"""The attributes to read of live mailboxes."""
FILL = 2000
"""An empty tree that gets more mailboxes than this is filled by slapadd."""

Row = tuple[str, dict[str, list[bytes]]]
"""An entry as python-ldap gives it: DN and attributes."""

_UNCOMPARED = frozenset({*BOOKKEEPING, "uid", "creatorsName"})
_SPECIAL = frozenset({"mailboxFormerAddress", "mailboxRetainUntil"})  # what time changes
_POINTER = "this mailbox is closed, write to {0} (hop thu da dong, xin gui den {0})"
_REMOVE = frozenset({"leave", "dissolve", "disconnect"})
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
    READ, units before people before applications; `released` the tombstones. `loader` is the kit's own identity: an
    entry without digest that another made was made by hand. `now` is generalizedTime in UTC. `removals` allows to
    remove that many mailboxes; `issued` names slip runs whose mailboxes are looked up.

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


def make_purge_plan(
    policy: dict[str, Any],
    due: Iterable[Row],
    released: Iterable[Row],
    *,
    base: str,
    loader: str,
    now: str,
    serial: int = 0,
) -> Plan:
    """Plan the end of retention, and nothing else: of the mailboxes `due`, those go whose time is over.

    Without the files: what the policy asks grounds for is refused here, and left to a run that knows them.
    """
    planner = _Planner([json.dumps({"policy": {"domain": "", **policy}}).encode()], base, loader, now)
    boxes = [box for box in planner.boxes(due) if not box.by_hand]
    for box in boxes:
        planner.classify(box)
    boxes = [box for box in boxes if box.actions == {"purge"}]
    judge = Refusals([], {}, {}, {}, planner.rules, now)
    changes: list[Change] = []
    works: list[Work] = []
    for box in boxes:
        box.refused = judge.grounds(box)
        work = Work(box, None, {}, index=len(changes))
        changes.append(planner.change(box, ["purge"], *work.shown()))
        works += [work] if not box.refused else []
    tombs = {identity.lower() for _dn, _attributes, identity in map(_identified, released)}
    steps = ordered(works, tombs, planner.rules, now)
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
        kept = only(box.live or {}, ("mailboxFormerAddress", "mailboxGrounds"))
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
        self.applications: dict[str, Mailbox] = {}
        self.new_applications: dict[str, dict[str, Any]] = {}
        self.new_people: dict[str, bytes] = {}  # parsed only when the live entry is there to compare with
        for line in lines:
            if line.startswith(b'{"k":"person","i":"'):
                self.new_people[line[19 : line.index(b'"', 19)].decode().lower()] = line
            else:
                value = json.loads(line)
                new = self.new_units if value["k"] == "unit" else self.new_applications
                new[value["i"].lower()] = value
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
            if _kind(row[0]) != "unit":
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
        box = Mailbox(_kind(dn), values["uid"][0], dn, values, listed=False)
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
            if _kind(dn) == "application":
                box = self.applications[key] = self.box(dn, attributes)
                if key in self.new_applications:
                    self._wish(box, self.new_applications.pop(key))
                if one(box.live, "mailboxSlip") in issued:
                    slip_boxes.append(box)
                continue
            line = self.new_people.pop(key, None)
            slip = bool(issued) and attributes.get("mailboxSlip", [b""])[0].decode() in issued
            if line is not None and not slip and key not in acting and _as_written(attributes, line):
                continue
            wish = json.loads(line) if line is not None else None
            box = self.box(dn, attributes)
            if wish is not None:
                self._wish(box, wish)
            self.people[key] = box
            if slip:
                slip_boxes.append(box)
        for line in self.new_people.values():
            if (new := self._new(json.loads(line))) is not None:
                self.people[new.id.lower()] = new
        for value in self.new_applications.values():
            if (new := self._new(value)) is not None:
                self.applications[new.id.lower()] = new
        tombs = {}
        for _dn, attributes, identity in map(_identified, released):
            values = {name: [value.decode("utf-8", "replace") for value in raw] for name, raw in attributes.items()}
            tombs[identity.lower()] = (one(values, "mailboxClass"), former_addresses(values))
        for box in slip_boxes:
            about = self.change(box, [""], {}, {})
            fields = {name: getattr(about, name) for name in ("id", "kind", "address", "name", "unit")}
            slips[one(box.live, "mailboxSlip")].append(fields)

        everyone = [*self.units.values(), *self.people.values(), *self.applications.values()]
        for box in everyone:
            self.classify(box)
        Refusals(everyone, self.units, self.people, tombs, self.rules, self.now).run()
        fill = not any_live and sum(not box.refused for box in everyone) > FILL
        changes, works = self._changes(everyone)
        stop = self._stop(changes, active, removals)
        steps = [] if fill or stop else ordered(works, tombs.keys(), self.rules, self.now)
        return Plan(_header(changes, serial, self.now, fill, stop, slips), changes, steps)

    def classify(self, box: Mailbox) -> None:
        """Name what happens to a mailbox."""
        waits = succeeded(box.had) and any(until.alias(self.now) for until in box.former.values())
        classify(box, self.rules, self.now, waits)

    def _stop(self, changes: list[Change], active: int, allowed: int | None) -> str | None:
        """Return why so many removals are not carried out without a word of the operator."""
        removed = sum(
            not change.refused and (change.action in _REMOVE or (change.action == "drift" and not change.after))
            for change in changes
        )
        if removed <= 1 or removed <= self.rules.removal_limit * active or (allowed is not None and removed <= allowed):
            return None
        return (
            f"{removed} of {active} active mailboxes would be removed, more than policy.yml allows at once "
            f"(removal_limit {self.rules.removal_limit:g}): nothing was changed. When that is right, run again with "
            f"-e directory_removals={removed}"
        )

    def _changes(self, everyone: list[Mailbox]) -> tuple[list[Change], list[Work]]:
        """Return the rows, and for those that are carried out what to write."""
        acts_for, agent = self._rights()
        inherited = self._inherited()
        changes: list[Change] = []
        works: list[Work] = []
        for box in everyone:
            actions = sorted(box.actions, key=WEIGHT.index)
            if box.refused:
                names = differing(box.had, box.want or {}, DECLARED[box.kind])
                changes.append(self.change(box, actions, only(box.had, names), only(box.want or {}, names)))
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
        unit = box if box.kind == "unit" else self.units.get(one(shown, "departmentNumber").lower())
        unit_name = one(unit.want or unit.had, "ou") if unit is not None else one(shown, "departmentNumber")
        return Change(
            action=actions[0],
            also=actions[1:],
            kind=box.kind,
            id=box.id,
            dn=box.dn,
            address=one(shown, "mail"),
            name=one(shown, "ou" if box.kind == "unit" else "cn"),
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
    ) -> Work | None:
        """Return what to write to a mailbox; None when nothing."""
        declared = box.effective
        if declared is None:
            return Work(box, None, {}) if box.live is not None else None
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
        work = Work(box, target, {}, inherited.get(key, set()), temporary)
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


def _kind(dn: str) -> str:
    """Return the kind of a mailbox by the branch that it stands in."""
    below = dn.lower()
    if ",ou=people," in below:
        return "person"
    return "unit" if ",ou=units," in below else "application"


def _as_written(attributes: dict[str, list[bytes]], line: bytes) -> bool:
    """Tell whether a live entry holds exactly what a line of desired.jsonl declares, without parsing it.

    Most lines of most runs are such: each attribute stands in the line as JSON, and together they are all of it.
    What this does not recognise (a backslash, another order of values) is compared later, one attribute at a time.
    """
    if not attributes.keys().isdisjoint(_SPECIAL) or "mailboxDigest" not in attributes or b"\\" in line:
        return False
    length = -1
    for name, values in attributes.items():
        if name in _UNCOMPARED:
            continue
        piece = b'"%b":["%b"]' % (name.encode(), b'","'.join(values))
        if piece not in line:
            return False
        length += len(piece) + 1
    return length == line.rindex(b'},"r":{') - line.index(b',"a":{') - 6


def _grounds(box: Mailbox) -> Attributes:
    if not box.refs or not box.listed or box.actions <= {"drift", "expire"}:
        return {}
    return {"mailboxGrounds": [f"{name} {value}" for name, value in sorted(box.refs.items())]}


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
        "passwords": sum(change.password for change in done),
    }
