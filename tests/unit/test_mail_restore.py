"""What a restore brings back and what it leaves alone; what it makes of a directory; how bad input is told."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "roles/backup/files/usr/local/lib/mail-backup"))

from mail_backup import directory, hostfiles, restore, tree
from mail_backup.decisions import entries
from mail_backup.pick import Refused, chosen, lacking, matches, moment
from mail_backup.restore import Failed, literal, read_catalogue, see_room, tidy

BASE = "dc=x,dc=test"


def message(name: str, folder: str = "INBOX", **more: Any) -> dict[str, Any]:
    """A line of a catalogue."""
    place = "Maildir" if folder == "INBOX" else "Maildir/." + folder.replace("/", ".")
    found = {
        "folder": folder,
        "guid": name,
        "body": name,
        "message_id": f"<{name}@x>",
        "date": "",
        "subject": "Công văn",
    }
    return found | {"from": "a@x.test", "octets": 1, "received": 0, "file": f"{place}/cur/{name}:2,S"} | more


# --- what is lacking ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "present", "expected"),
    [
        ([message("a")], [], ["a"]),
        ([message("a")], [message("a")], []),
        # The other host of a pair, or a flag, gives a file another name.
        ([message("a")], [message("a", guid="other")], []),
        # Moved on since: not lost. Put into the bin: lost where it was.
        ([message("a")], [message("a", "Lưu trữ")], []),
        ([message("a")], [message("a", "Trash")], ["a"]),
        ([message("a", "Trash")], [message("a", "Trash")], []),
        # Two copies are two messages.
        ([message("a"), message("a")], [message("a")], ["a"]),
        ([message("a"), message("a", "B")], [message("a")], ["a"]),
        ([message("a"), message("a", "B")], [message("a"), message("a", "C")], []),
        # The same text sent twice.
        ([message("a"), message("b", body="a")], [message("a")], ["b"]),
        ([message("a"), message("b")], [message("new")], ["a", "b"]),
    ],
)
def test_what_is_lacking(wanted: list[Any], present: list[Any], expected: list[str]) -> None:
    assert [one["guid"] for one in lacking(wanted, present)] == expected


def test_what_is_chosen() -> None:
    known = [message("a"), message("b", "A"), message("c", "A/B"), message("d", "AB")]
    assert [one["guid"] for one in chosen(known, "A")] == ["b", "c"]
    assert [one["guid"] for one in chosen(known)] == ["a", "b", "c", "d"]
    for name in ("c", "<c@x>", " c@x "):
        assert [one["guid"] for one in chosen(known, message=name)] == ["c"]
    assert chosen(known, "A", "a") == []


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"sender": "A@X"}, True),
        ({"subject": "công VĂN"}, True),
        ({"subject": "tờ trình"}, False),
        ({"date": "2026-11-20"}, True),
        ({"date": "2026-11-21"}, False),
        ({"sender": "a@x", "date": "2026-11-21"}, False),
    ],
)
def test_what_is_found(asked: dict[str, str], found: bool) -> None:
    there = datetime(2026, 11, 20, 12).astimezone().timestamp()
    assert matches(message("a", received=there), **asked) is found
    assert matches(message("a", date="Fri, 20 Nov 2026 23:30:00 +0700"), date="2026-11-20")


def test_time() -> None:
    assert moment("2026-11-20") == datetime(2026, 11, 20, 23, 59, 59).astimezone()
    assert moment("2026-11-20 12:00") == datetime(2026, 11, 20, 12).astimezone()
    assert moment("2026-11-20T12:00:00+00:00").utcoffset() is not None
    with pytest.raises(Refused, match="is no time"):
        moment("yesterday")


# --- from the repository -----------------------------------------------------------------------------------------


def saved(home: Path, *messages: dict[str, Any]) -> None:
    """A home as it comes out of a snapshot: without tmp, perhaps without new."""
    for one in messages:
        path = home / one["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * one["octets"])


def test_only_what_is_wanted_is_left(tmp_path: Path) -> None:
    home = tmp_path / "id"
    wanted, other = message("a", "Lưu trữ"), message("b", "Khác")
    saved(home, wanted, other, message("c", "Lưu trữ"))
    tidy(home, [wanted], whole=False)
    left = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    assert left == [wanted["file"]]
    assert (home / "Maildir/.Lưu trữ/tmp").is_dir() and (home / "Maildir/new").is_dir()
    assert not (home / "Maildir/.Khác").exists()


def test_a_damaged_snapshot_is_seen(tmp_path: Path) -> None:
    home = tmp_path / "id"
    saved(home, message("a"))
    with pytest.raises(Failed, match="not in the snapshot"):
        tidy(home, [message("a"), message("b")], whole=True)
    with pytest.raises(Failed, match="not as large"):
        tidy(home, [message("a", octets=2)], whole=True)


def test_room(tmp_path: Path) -> None:
    see_room(tmp_path, 1)
    with pytest.raises(Refused, match="not enough space"):
        see_room(tmp_path, 1 << 60)


def test_scratch_goes(tmp_path: Path) -> None:
    (tmp_path / ".restore/mail/left").mkdir(parents=True)
    with restore.scratch(tmp_path, "mail") as folder:
        assert list(folder.iterdir()) == []
    assert not folder.exists()


def test_patterns_are_names() -> None:
    assert literal("/Maildir/.[Dự án] *?/cur/a:2,S") == "/Maildir/.\\[Dự án] \\*\\?/cur/a:2,S"


def test_catalogue() -> None:
    head, found = read_catalogue(b'{"id": "u"}\n{"guid": "a"}\n{"guid": "b"}\n')
    assert head["id"] == "u" and [one["guid"] for one in found] == ["a", "b"]


# --- directory ---------------------------------------------------------------------------------------------------

LDIF = f"""\
# a comment
dn: uid=a,ou=units,{BASE}
uid: a
mail: a@x.test
description:: VMawbmcg
 duG7iw==
userPassword:: c2VjcmV0
entryCSN: 1

dn: cn=loader,ou=services,{BASE}
cn: loader
"""


def entry(identity: str, branch: str = "units", **more: str) -> tuple[str, dict[str, list[bytes]]]:
    """An entry of the tree."""
    return f"uid={identity},ou={branch},{BASE}", {name: [value.encode()] for name, value in more.items()}


def test_ldif() -> None:
    found = tree.tree(tree.parse(LDIF.splitlines()))
    attributes = found[f"uid=a,ou=units,{BASE}"][1]
    assert attributes["userPassword"] == [b"secret"] and attributes["mail"] == [b"a@x.test"]
    again = tree.tree(tree.parse("".join(tree.as_ldif(dn, one) for dn, one in found.values()).splitlines()))
    assert again == found
    with pytest.raises(ValueError, match="dn"):
        list(tree.parse(["uid: a"]))


def test_only_units_and_people_are_restored() -> None:
    found = tree.tree(tree.parse(LDIF.splitlines()))
    assert list(tree.below(found, BASE)) == [f"uid=a,ou=units,{BASE}"]
    assert tree.below(found, BASE, "uid=b,ou=units," + BASE) == {}


def test_steps_make_the_tree_what_it_was() -> None:
    then = tree.tree([entry("a", mail="a@x", title="Trưởng phòng"), entry("b", mail="b@x", userPassword="1")])
    now = tree.tree([entry("a", mail="a@y", entryCSN="9"), entry("c", mail="c@x")])
    steps = tree.steps(then, now, passwords=False, remove=False)
    assert [(step.do, step.dn.split(",")[0]) for step in steps] == [("add", "uid=b"), ("modify", "uid=a")]
    assert steps[0].attributes["userPassword"] == [b"1"]
    assert steps[1].attributes == {"mail": [b"a@x"], "title": ["Trưởng phòng".encode()]}
    assert str(steps[1]).endswith(": mail, title")
    removed = tree.steps(then, now, passwords=False, remove=True)
    assert removed[0].do == "delete" and removed[0].dn.startswith("uid=c,")


def test_a_password_that_was_changed_since_stays() -> None:
    then, now = (tree.tree([entry("a", userPassword=word)]) for word in ("old", "new"))
    assert tree.steps(then, now, passwords=False, remove=False) == []
    assert tree.steps(then, now, passwords=True, remove=False)[0].attributes == {"userpassword": [b"old"]}
    assert "old" not in str(tree.steps(then, now, passwords=True, remove=False)[0])


def test_configuration_names_the_database() -> None:
    config = directory.unfolded(
        "dn: olcDatabase={2}mdb\nolcSuffix: dc=x,dc=te\n st\nolcDbDirectory: /var/lib/ldap/mail\n"
    )
    assert directory.folder_of(config, BASE) == Path("/var/lib/ldap/mail")
    with pytest.raises(Refused, match="no database"):
        directory.folder_of(config, "dc=y")


def test_grounds() -> None:
    opening, closing = entries(BASE, "an", " CV 12 ", {"action": "restore", "what": "message"}, "c0ffee")
    assert opening[1]["decisionBy"] == ["an"] and '"grounds": "CV 12"' in opening[1]["decisionChange"][0]
    assert closing[0].split(",")[0] == opening[0].split(",")[0] + "-done"
    with pytest.raises(Refused, match="No grounds"):
        entries(BASE, "an", "  ", {"action": "restore"}, "")


# --- files of a host ---------------------------------------------------------------------------------------------


def test_files_of_a_host(tmp_path: Path) -> None:
    scratch, root = tmp_path / "scratch", tmp_path / "root"
    for top, text in ((scratch, "then"), (root, "now")):
        (top / "etc").mkdir(parents=True)
        (top / "etc/same").write_text("same")
        (top / "etc/changed").write_text(text)
    (scratch / "etc/gone").write_text("x")
    (scratch / "etc/link").symlink_to("same")
    nodes = [
        {"path": f"/etc/{name}", "type": kind}
        for name, kind in (("same", "file"), ("changed", "file"), ("gone", "file"), ("link", "symlink"))
    ]
    assert hostfiles.differing(nodes, scratch, root) == ["/etc/changed", "/etc/gone", "/etc/link"]


def test_what_a_new_host_has_of_its_own_stays() -> None:
    assert hostfiles.is_left("/etc/passwd", "") and hostfiles.is_left("/etc/ldap/slapd.d/cn=config.ldif", "")
    assert not hostfiles.is_left("/etc/passwd", "/etc/passwd") and not hostfiles.is_left("/etc/ssl/hopthu/key.pem", "")


def test_owners_are_names() -> None:
    assert hostfiles.owner({"path": "/x", "user": "root", "group": "root", "uid": 5, "gid": 5}) == (0, 0)
    with pytest.raises(Refused, match="nobody-here"):
        hostfiles.owner({"path": "/x", "user": "nobody-here", "group": "root", "uid": os.getuid(), "gid": 0})
