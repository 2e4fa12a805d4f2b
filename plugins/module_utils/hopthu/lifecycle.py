"""What happens to each mailbox, in the words of the office, and whether its grounds carry it. Pure.

A `Mailbox` has two sides: what stands in LDAP (`live`) and what the files declare (`want`). `classify` names the
difference (`actions`), `refuse` finds the changes that must not happen. `plan.py` makes rows and steps of the rest.
Times are generalizedTime in UTC, "YYYYMMDDHHMMSSZ", which compares as text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple

Attributes = dict[str, list[str]]

_ACCOUNT = ("mail", "mailLocalAddress", "mailboxState", "mailboxClass")
_MAILBOX = (*_ACCOUNT, "mailboxQuota", "businessCategory", "mailboxInternal", "userCertificate;binary")
DECLARED = {
    "unit": (
        *("ou", *_MAILBOX, "mailboxUnitCode", "mailboxParent", "mailboxHead", "mailboxDelegate", "mailboxSuccessor"),
    ),
    "person": (
        *("cn", "sn", "givenName", "mailboxMiddleName", "title", "departmentNumber", *_MAILBOX, "pwdPolicySubentry"),
    ),
    "application": (
        *("cn", *_ACCOUNT, "departmentNumber", "applicationHost", "applicationSender", "pwdPolicySubentry"),
    ),
}
"""What the files say of a mailbox. `mailLocalAddress` holds temporary aliases besides."""
DERIVED = ("mailboxActsFor", "mailboxAgent", "mailboxPointer")
"""What follows from other mailboxes; so do the temporary aliases."""
BOOKKEEPING = (
    *("mailboxStateSince", "mailboxRetainUntil", "mailboxFormerAddress", "mailboxGrounds", "mailboxDigest"),
    *("mailboxSessionsSince", "mailboxSlip"),
)
"""Written with changes, never compared."""
WEIGHT = (
    *("purge", "leave", "dissolve", "disconnect", "return", "join", "found", "connect", "hand-over"),
    *("suspend", "resume", "legacy", "move", "rename", "delegate", "reset", "update", "drift", "expire"),
)
"""The actions, the weightiest first."""
PASSWORD = frozenset({"join", "found", "connect", "return", "reset", "hand-over"})
"""Actions that give a mailbox a new initial password."""
_NO_GROUNDS = frozenset({"drift", "expire"})
_GONE = frozenset({"left", "dissolved"})
# How a mailbox of each kind begins and ends, the state at its end, and how it begins once more.
_ENDS = {
    "unit": ("found", "dissolve", "dissolved", "found"),
    "person": ("join", "leave", "left", "return"),
    "application": ("connect", "disconnect", "left", "connect"),
}
# Attributes that an entry of the kit's first version, which has no digest, cannot have.
_SINCE_DIGEST = frozenset(
    {"mailboxParent", "mailboxHead", "mailboxDelegate", "mailboxSuccessor", "mailboxMiddleName", "pwdPolicySubentry"}
)
# What a weightier action includes, so that its grounds are enough.
_PART_OF = {
    "move": {"departmentNumber", "title", "mail", "mailLocalAddress", "cn", "sn", "givenName", "mailboxMiddleName"},
    "rename": {"mail", "mailLocalAddress", "cn", "sn", "givenName", "mailboxMiddleName", "ou", "mailboxUnitCode"},
}
# What the operator decides, in policy.yml for everybody or for one: no clause has grounds for it.
_OPERATORS = frozenset({"mailboxQuota", "pwdPolicySubentry"})
_EMPTY = hashlib.sha256(b"").hexdigest()[:32]
_NAMES = frozenset({"mail", "cn", "sn", "givenName", "mailboxMiddleName", "ou"})


@dataclass(frozen=True)
class Rules:
    """What of policy.yml the engine goes by; days are whole days, `removal_limit` is a share (0 to 1)."""

    domain: str
    alias_days: int = 180
    block_days: int = 365
    retention_days: int = 180
    backup_days: int = 373
    pointer: str = "none"
    removal_limit: float = 0.1
    required_refs: Mapping[str, Collection[str]] = field(default_factory=dict)
    eligibility: Mapping[str, Collection[str]] = field(default_factory=dict)
    delegates: Mapping[str, Any] = field(default_factory=dict)


class Former(NamedTuple):
    """An address that a mailbox had: a temporary alias until the first time, if any; given to nobody else until the
    second."""

    alias_until: str | None
    blocked_until: str

    def text(self, address: str) -> str:
        """Return the value of mailboxFormerAddress."""
        return f"{address} {self.alias_until or '-'} {self.blocked_until}"

    def alias(self, now: str) -> bool:
        """Tell whether mail to the address is still taken."""
        return self.alias_until is not None and self.alias_until >= now

    def blocked(self, now: str) -> bool:
        """Tell whether nobody else may have the address."""
        return self.blocked_until > now or self.alias(now)


def former_addresses(attributes: Attributes) -> dict[str, Former]:
    """Read mailboxFormerAddress; a value that somebody has spoilt by hand says nothing."""
    parts = [value.split(" ") for value in attributes.get("mailboxFormerAddress", ())]
    return {part[0]: Former(None if part[1] == "-" else part[1], part[2]) for part in parts if len(part) == 3}


@dataclass(slots=True, eq=False)
class Mailbox:
    """One mailbox as it stands in LDAP (`live`, all attributes) and as it shall be (`want`, declared ones only).

    `had` is the declared part of `live`, `former` its former addresses. `want` None: its entry goes.
    """

    kind: str
    id: str
    dn: str
    live: Attributes | None
    want: Attributes | None = None
    refs: dict[str, str] = field(default_factory=dict)
    line: str = ""
    listed: bool = True
    by_hand: bool = False
    had: Attributes = field(default_factory=dict)
    former: dict[str, Former] = field(default_factory=dict)
    actions: set[str] = field(default_factory=set)
    only_drift: bool = False
    free_update: bool = False
    refused: str | None = None
    passed_on: set[str] = field(default_factory=set)

    @property
    def effective(self) -> Attributes | None:
        """The declared attributes after the plan: of a refused change those before it. None: no such mailbox."""
        if self.refused is None:
            return self.want
        return self.had if self.live is not None else None

    @property
    def parking(self) -> str:
        """How an address begins that only keeps the place of this mailbox's own."""
        return f"moving.{self.id.lower()}"


def one(attributes: Mapping[str, list[str]] | None, name: str) -> str:
    """Return the first value of an attribute, or ""."""
    values = attributes.get(name) if attributes else None
    return values[0] if values else ""


def later(time: str, days: int) -> str:
    """Return the time so many days after `time`."""
    moved = datetime.strptime(time[:14], "%Y%m%d%H%M%S") + timedelta(days=days)
    return moved.strftime("%Y%m%d%H%M%SZ")


def addresses(attributes: Attributes | None) -> set[str]:
    """Return the address and the aliases."""
    return {*attributes.get("mail", ()), *attributes.get("mailLocalAddress", ())} if attributes else set()


def agents(attributes: Attributes | None) -> set[str]:
    """Return the ids of a unit's head and delegates, in lower case."""
    if not attributes:
        return set()
    people = {delegate_id(text).lower() for text in attributes.get("mailboxDelegate", ())}
    return (people | {head.lower() for head in attributes.get("mailboxHead", ())}) - {""}


def delegate_id(text: str) -> str:
    """Return the person of a value of mailboxDelegate, or "" when somebody has spoilt it by hand."""
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    return str(value.get("person", "")) if isinstance(value, dict) else ""


def differing(before: Attributes, after: Attributes, names: Iterable[str]) -> set[str]:
    """Return which of the attributes `names` have not the same set of values."""
    return {name for name in names if sorted(before.get(name, ())) != sorted(after.get(name, ()))}


def succeeded(attributes: Attributes | None) -> bool:
    """Tell whether the mailbox is that of a dissolved unit whose addresses another unit has taken over."""
    return one(attributes, "mailboxState") == "dissolved" and bool(one(attributes, "mailboxSuccessor"))


def digest(attributes: Attributes) -> str:
    """Return half a mailboxDigest: 32 hex digits over `attributes`, whatever the order of their values."""
    parts = [
        f"{name}\1" + (values[0] if len(values) == 1 else "\1".join(sorted(values)))
        for name, values in sorted(attributes.items())
        if values
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32] if parts else _EMPTY


def classify(box: Mailbox, rules: Rules, now: str, heir_waits: bool) -> None:
    """Fill in `actions`, and `want` where the files say nothing of the mailbox.

    A mailbox that is no longer in the files has left, if the policy asks for no grounds. `heir_waits`: it is that of a
    unit with aliases at its successor's, which end before its entry may go.
    """
    first, last, end, _again = _ENDS[box.kind]
    if box.live is None:
        box.actions = {first}
        return
    if box.by_hand:
        box.actions = {first, "drift"} if box.listed and one(box.want, "mailboxState") not in _GONE else {"drift"}
        box.want = box.want if first in box.actions else None
        return
    had = box.had
    want = box.want = box.want if box.want is not None else {**had, "mailboxState": [end]}
    before, after = one(had, "mailboxState"), one(want, "mailboxState")
    if before == after == end:
        until = one(box.live, "mailboxRetainUntil")
        if until and until < now and not heir_waits:
            box.actions, box.want = {"purge"}, None
            return
    names = differing(had, want, DECLARED[box.kind])
    if not names:
        return
    written = one(box.live, "mailboxDigest")[:32]
    if written and digest(had) != written:
        if digest(want) == written:
            box.actions, box.only_drift = {"drift"}, True
            return
        box.actions.add("drift")
    if before != after:
        if after == end:
            box.actions.add(last)
            return
        box.actions.add(_state_action(box.kind, before, after))
    _name_rest(box, names - {"mailboxState"}, rules, new=not written)


def _state_action(kind: str, before: str, after: str) -> str:
    if before in _GONE:
        return _ENDS[kind][3]
    return {"suspended": "suspend", "legacy": "legacy"}.get(after, "resume")


def _name_rest(box: Mailbox, names: set[str], rules: Rules, *, new: bool) -> None:
    """Name what changes besides the state; `new`: the entry is of the kit's first version."""
    had, want = box.had, box.want or {}
    if new:
        free = {name for name in names & _SINCE_DIGEST if not had.get(name)}
        names = names - free
        box.free_update = bool(free)
    if box.kind == "application":
        if names:
            box.actions.add("update")
        return
    if "departmentNumber" in names:
        box.actions.add("move")
        names = names - _PART_OF["move"]
    elif names & _NAMES:
        box.actions.add("rename")
        names = names - _PART_OF["rename"]
    if "mailboxHead" in names and one(had, "mailboxHead") and one(want, "mailboxHead"):
        box.actions.add("hand-over")
    elif names & {"mailboxHead", "mailboxDelegate"}:
        box.actions.add("delegate")
    names = names - {"mailboxHead", "mailboxDelegate"}
    if names & _OPERATORS:
        box.free_update, names = True, names - _OPERATORS
    if names == {"mailLocalAddress"}:
        lost = set(had.get("mailLocalAddress", ())) ^ set(want.get("mailLocalAddress", ()))
        if not any(address.endswith("@" + rules.domain) for address in lost):
            # Another domain's addresses come and go with policy.yml, for everybody.
            gained = set(want.get("mailLocalAddress", ())) & lost
            box.actions.add("update" if gained else "expire")
            box.free_update = True
            return
    if names:
        box.free_update = False
    if names or box.free_update:
        box.actions.add("update")


# --- what must not happen ----------------------------------------------------------------------------------------


class Refusals:
    """Finds the changes that must not happen, until no refusal entails another."""

    def __init__(
        self,
        boxes: list[Mailbox],
        units: Mapping[str, Mailbox],
        people: Mapping[str, Mailbox],
        released: Mapping[str, tuple[str, dict[str, Former]]],
        rules: Rules,
        now: str,
    ) -> None:
        """`units` and `people` by id in lower case; `people` at least those that change, have changed or act for a
        unit. `released`: id → (kind, former addresses) of the tombstones."""
        self.boxes, self.units, self.people = boxes, units, people
        self.rules, self.now, self.released = rules, now, released
        self.holders: dict[str, list[Mailbox]] = {}
        for box in boxes:
            for address in {*addresses(box.had), *box.former}:
                self.holders.setdefault(address, []).append(box)
        self.tombs: dict[str, list[tuple[str, str, Former]]] = {}
        for identity, (kind, former) in released.items():
            for address, until in former.items():
                self.tombs.setdefault(address, []).append((kind, identity, until))

    def run(self) -> None:
        """Set `refused` of every change that must not happen, and `passed_on` of units whose address another takes."""
        changing = [box for box in self.boxes if box.actions]
        for box in changing:
            box.refused = self._itself(box)
        again = True
        while again:
            again = False
            for box in changing:
                if box.refused is None and (reason := self._because_of_others(box)):
                    box.refused, again = reason, True
        for box in changing:
            if box.refused is None and box.kind == "unit":
                self._pass_on(box)

    def _itself(self, box: Mailbox) -> str | None:
        """Return why a change must not happen, whatever becomes of the others."""
        if (box.live is None or box.by_hand) and box.id.lower() in self.released:
            return f"the id {box.id} belonged to a purged mailbox and is never used again: give a new one at {box.line}"
        return self.grounds(box) or self._class(box) or self._delegates(box)

    def grounds(self, box: Mailbox) -> str | None:
        if box.actions <= _NO_GROUNDS:
            return None
        accompanied = self._with_unit(box)
        used = set((box.live or {}).get("mailboxGrounds", ()))
        for action in sorted(box.actions - _NO_GROUNDS, key=WEIGHT.index):
            if (action == "update" and box.free_update) or (accompanied and action in ("suspend", "resume")):
                continue
            needed = self.rules.required_refs.get(action, ())
            missing = [name for name in needed if not box.refs.get(name)]
            if missing and not box.listed:
                state = _ENDS[box.kind][2]
                documents = " and ".join(missing)
                return f"{box.id} is no longer in the files and {action} needs {documents}: put it back, state {state}"
            if missing:
                return f"{action} needs {' and '.join(missing)}: give it at {box.line}"
            for name in needed:
                if name != "approved_by" and f"{name} {box.refs[name]}" in used:
                    return (
                        f"{name} {box.refs[name]} was the grounds of an earlier change of this mailbox: "
                        f"give the document of this {action} at {box.line}"
                    )
        return None

    def _with_unit(self, box: Mailbox) -> bool:
        """Tell whether a person is suspended or resumed because his unit, or one above it, is (CT-10.2)."""
        if box.kind != "person" or not box.actions & {"suspend", "resume"}:
            return False
        seen: set[str] = set()
        unit = one(box.want, "departmentNumber").lower()
        action = "suspend" if "suspend" in box.actions else "resume"
        while unit and unit not in seen and unit in self.units:
            seen.add(unit)
            above = self.units[unit]
            state = one(above.effective, "mailboxState")
            if state == "suspended" if action == "suspend" else action in above.actions and not above.refused:
                return True
            unit = one(above.effective, "mailboxParent").lower()
        return False

    def _class(self, box: Mailbox) -> str | None:
        """BD-2.2, BD-2.3: who may have a mailbox."""
        if not box.actions & {"join", "found", "return"}:
            return None
        kind, name = (
            ("people", one(box.want, "businessCategory"))
            if box.kind == "person"
            else (*("units", one(box.want, "businessCategory")),)
        )
        if name in self.rules.eligibility.get("on_request", ()):
            if box.refs.get("commitment_ref"):
                return None
            return f"the class {name} gets a mailbox on request only: give commitment_ref at {box.line}"
        allowed = self.rules.eligibility.get(kind)
        if allowed is None or name in allowed:
            return None
        what = f"the class {name} is" if name else "a mailbox without a class is"
        return f"{what} not eligible: policy.yml allows {', '.join(allowed)} ({box.line})"

    def _delegates(self, box: Mailbox) -> str | None:
        """DL-9, LC-10.2, HT-7.2, CT-9.1: to how many and to whom a head may delegate, and on which document."""
        if not box.actions & {"found", "hand-over", "delegate"}:
            return None
        texts = (box.want or {}).get("mailboxDelegate", [])
        if sorted(texts) == sorted(box.had.get("mailboxDelegate", [])):
            return None
        rules = self.rules.delegates
        most = rules.get("max")
        if most is not None and len(texts) > most:
            return f"{len(texts)} delegates, and policy.yml allows {most}: remove some at {box.line}"
        for delegate in map(json.loads, texts):
            role, roles = delegate.get("role"), rules.get("roles")
            if roles is not None and role not in roles:
                allowed = ", ".join(roles)
                return f"policy.yml lets only {allowed} be delegates: correct {delegate['person']} at {box.line}"
            if rules.get("document_required") and not delegate.get("delegation_ref"):
                return f"the delegate {delegate['person']} has no delegation_ref: give it at {box.line}"
        return None

    def _because_of_others(self, box: Mailbox) -> str | None:
        """Return why a change must not happen as others stand: whom it names must be there, its addresses free."""
        want = box.want
        if want is None or box.only_drift:
            return None
        had = box.had
        for name in ("departmentNumber", "mailboxParent", "mailboxSuccessor"):
            unit = one(want, name)
            if unit and unit != one(had, name) and not self._there(self.units.get(unit.lower())):
                return f"the unit {unit} is not in the directory: see what is said of it"
        if box.kind == "unit":
            for person in sorted(agents(want) - agents(had)):
                if not self._there(self.people.get(person)):
                    return f"{person} is not in the directory and cannot act for the unit: see what is said of him"
        if accompanied := self._alone(box):
            return accompanied
        for address in sorted(addresses(want) - addresses(had)):
            if reason := self._taken(address, box):
                return reason
        return None

    def _alone(self, box: Mailbox) -> str | None:
        """A person goes with his unit only when the unit goes: else he needs grounds of his own."""
        if box.kind == "person" and box.actions & {"suspend", "resume"} and not self._with_unit(box):
            return self.grounds(box)
        return None

    @staticmethod
    def _there(box: Mailbox | None) -> bool:
        return box is not None and box.effective is not None

    def _taken(self, address: str, box: Mailbox) -> str | None:
        """Return why `box` may not have `address`."""
        for holder in self.holders.get(address, ()):
            if holder is box or holder.only_drift or (holder.by_hand and not holder.refused):
                continue
            both_units = holder.kind == box.kind == "unit"
            if address in addresses(holder.effective):
                gone = one(holder.effective, "mailboxState") in _GONE
                if both_units and not holder.listed and gone:
                    continue
                why = f"belongs to {holder.id}"
                if gone:
                    why += f", whose mail is kept until {day(self._kept_until(holder))} and the address longer"
                return f"{address} {why}: choose another address at {box.line}"
            until = self._given_up(address, holder)
            if until is not None and not both_units and until.blocked(self.now):
                last = max(until.blocked_until, until.alias_until or "")
                return (
                    f"{address} was an address of {holder.id} and stays blocked until {day(last)}: "
                    f"choose another address at {box.line}"
                )
        for kind, identity, until in self.tombs.get(address, ()):
            if until.blocked(self.now) and not kind == box.kind == "unit":
                return (
                    f"{address} was an address of {identity}, who left, and stays blocked until "
                    f"{day(until.blocked_until)}: choose another address at {box.line}"
                )
        return None

    def _kept_until(self, holder: Mailbox) -> str:
        return one(holder.live, "mailboxRetainUntil") or later(self.now, self.rules.retention_days)

    def _given_up(self, address: str, holder: Mailbox) -> Former | None:
        """Return how long an address that its holder no longer claims is kept from others."""
        if holder.want is None and not holder.refused:  # purged: what its tombstone will say
            since = one(holder.live, "mailboxStateSince") or self.now
            return holder.former.get(address) or Former(None, later(since, self.rules.block_days))
        return former_after(holder, self.rules, self.now).get(address)

    def _pass_on(self, box: Mailbox) -> None:
        """Let the units that had an address of `box` forget it; a dissolved one gets a parking address for it."""
        for address in addresses(box.want) - addresses(box.had):
            for holder in self.holders.get(address, ()):
                if holder is not box and holder.kind == "unit":
                    holder.passed_on.add(address)
                    claimed = holder.effective
                    if claimed is not None and address in addresses(claimed) and not holder.refused:
                        kept = [alias for alias in claimed.get("mailLocalAddress", []) if alias != address]
                        holder.want = {**claimed, "mailLocalAddress": kept}
                        if one(claimed, "mail") == address:
                            holder.want["mail"] = [f"{holder.parking}@{address.rpartition('@')[2]}"]


def day(time: str) -> str:
    """Return the date of a time, as people read it: "2026-11-21"."""
    return f"{time[:4]}-{time[4:6]}-{time[6:8]}"


def former_after(box: Mailbox, rules: Rules, now: str) -> dict[str, Former]:
    """Return a mailbox's former addresses after the plan.

    An address that it gives up stays blocked for others for `block_days`; the main one, and what has the same local
    part in another domain, stays its alias for `alias_days` first. What it takes back, what another unit takes over
    and what has been free for long is forgotten.
    """
    want = box.effective or {}
    heir = succeeded(want)  # its addresses are aliases of another: all of them count as given up, once
    keeps = set() if heir else addresses(want)
    former = {
        address: until
        for address, until in box.former.items()
        if address not in keeps and address not in box.passed_on and until.blocked(now)
    }
    if box.refused is not None or box.only_drift or box.by_hand or box.live is None or not box.actions:
        return former
    if heir and succeeded(box.had):
        keeps = addresses(want)
    old = one(box.had, "mail")
    local = old.partition("@")[0]
    renamed = old not in keeps
    for address in addresses(box.had) - keeps - box.passed_on - former.keys():
        if address.startswith(box.parking):
            continue
        alias = rules.alias_days and (
            (heir and not succeeded(box.had)) or (renamed and address.partition("@")[0] == local)
        )
        alias_until = later(now, rules.alias_days) if alias else None
        until = Former(alias_until, later(alias_until or now, rules.block_days))
        if until.blocked(now):
            former[address] = until
    return former
