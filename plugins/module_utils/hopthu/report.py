"""The plan for people and scripts: build/plan.json, lines in the words of the office, a diff. Runs on the controller.

A plan comes from the host as a file of lines (`plan.py`): a header, the changes, the steps. It is read line by line
and never held as a whole, for it may have 100,000 changes. It holds neither passwords nor hashes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .durable import replaced
from .slips import Holder

WORDS = {
    "join": "tiếp nhận",
    "found": "thành lập",
    "move": "điều chuyển",
    "rename": "đổi tên",
    "update": "cập nhật",
    "suspend": "tạm ngừng",
    "resume": "khôi phục",
    "return": "trở lại",
    "legacy": "chỉ nhận thư",
    "leave": "thôi sử dụng",
    "dissolve": "giải thể",
    "purge": "xóa hẳn",
    "hand-over": "bàn giao",
    "delegate": "ủy quyền",
    "reset": "cấp lại mật khẩu",
    "drift": "sửa sai lệch",
    "expire": "hết hạn",
    "connect": "kết nối",
    "disconnect": "ngắt kết nối",
}
"""The actions of a plan, with the word of the regulations."""

_LINES = 60
_DIFF = 50
_ROW = ("action", "also", "kind", "id", "address", "before", "after", "refs", "refused", "drift", "line")
# Room for "true": the file is marked as applied in place, whatever its size.
_UNAPPLIED, _APPLIED = b'{"applied": false', b'{"applied": true '


def header(plan: Path) -> dict[str, Any]:
    """Return the first line of a plan: counts, serial, stop, issued, hand_overs."""
    with plan.open("rb") as file:
        found: dict[str, Any] = json.loads(file.readline())
        return found


def changes(plan: Path) -> Iterator[dict[str, Any]]:
    """Yield the changes of a plan in its order."""
    with plan.open("rb") as file:
        file.readline()
        for line in file:
            if line.startswith(b'{"step"'):
                return
            yield json.loads(line)


def holders(plan: Path) -> Iterator[Holder]:
    """Yield who gets an initial password by a plan."""
    for change in changes(plan):
        if change["password"] and not change["refused"]:
            yield Holder(change["id"], change["kind"], change["address"], change["name"], change["unit"])


def write(plan: Path, target: Path) -> dict[str, Any]:
    """Write plan.json for people and scripts; return the header."""
    top = header(plan)
    with replaced(target) as file:
        file.write(_UNAPPLIED + b', "counts": ' + json.dumps(top["counts"]).encode() + b', "changes": [')
        separator = b"\n"
        for change in changes(plan):
            row = {name: change[name] for name in _ROW}
            file.write(separator + json.dumps(row, ensure_ascii=False).encode())
            separator = b",\n"
        file.write(b"\n]}\n")
    return top


def mark_applied(target: Path) -> None:
    """Say in plan.json that the plan was carried out."""
    with target.open("r+b") as file:
        if file.read(len(_UNAPPLIED)) == _UNAPPLIED:
            file.seek(0)
            file.write(_APPLIED)


def line(change: dict[str, Any]) -> str:
    """Return one change in the words of the office.

    >>> line({"action": "join", "also": [], "kind": "person", "id": "p1", "name": "Lê An", "address": "an@x.gov.vn",
    ...       "before": None, "after": {"mail": ["an@x.gov.vn"]}, "refs": {"decision_ref": "12/QĐ"}, "refused": None})
    'join (tiếp nhận) person p1 Lê An <an@x.gov.vn> [decision_ref 12/QĐ]'
    """
    words = " and ".join(f"{word} ({WORDS[word]})" for word in [change["action"], *change["also"]])
    text = f"{words} {change['kind']} {change['id']} {change['name']} <{change['address']}>"
    before, after = change["before"] or {}, change["after"] or {}
    if before and after:
        shown = [name for name in ("mail", "departmentNumber", "mailboxHead") if before.get(name) != after.get(name)]
        text += "".join(f", {_LABEL[name]} {_value(before, name)} → {_value(after, name)}" for name in shown)
    if change["refs"]:
        text += " [" + ", ".join(f"{name} {value}" for name, value in sorted(change["refs"].items())) + "]"
    return f"REFUSED {text}: {change['refused']}" if change["refused"] else text


_LABEL = {"mail": "address", "departmentNumber": "unit", "mailboxHead": "head"}


def _value(attributes: dict[str, list[str]], name: str) -> str:
    return ", ".join(attributes.get(name, [])) or "none"


def lines(plan: Path) -> list[str]:
    """Return the first changes in the words of the office and, where there are more, how many."""
    total = header(plan)["counts"]
    shown = [line(change) for change in islice(changes(plan), _LINES)]
    more = total["total"] + total["refused"] - len(shown)
    return [*shown, f"… and {more} more, all of them in the plan file"] if more > 0 else shown


def refused(plan: Path) -> list[str]:
    """Return the first refused changes with their reasons."""
    found = (change for change in changes(plan) if change["refused"])
    return [line(change) for change in islice(found, _LINES)]


def diff(plan: Path) -> list[dict[str, str]]:
    """Return before and after per mailbox in Ansible's form, for at most 50 of them."""
    total = header(plan)["counts"]
    accepted = (change for change in changes(plan) if not change["refused"])
    shown = [_diff(change) for change in islice(accepted, _DIFF)]
    more = total["total"] - len(shown)
    if more > 0:
        shown.append({"prepared": f"… and {more} more mailboxes, all of them in the plan file\n"})
    return shown


def _diff(change: dict[str, Any]) -> dict[str, str]:
    title = f"{change['kind']} {change['id']}"
    return {
        "before_header": title,
        "after_header": title,
        "before": _text(change["before"]),
        "after": _text(change["after"]),
    }


def _text(attributes: dict[str, list[str]] | None) -> str:
    found = sorted((attributes or {}).items())
    return "".join(f"{name}: {value}\n" for name, values in found for value in sorted(values))
