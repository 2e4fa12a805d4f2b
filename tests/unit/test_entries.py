"""Comparison of LDAP entries: what slapd rewrites is no difference, what an operator changed is one."""

from __future__ import annotations

import pytest

from hopthu.entries import Attributes, Change, as_text, canonical_dn, changes, insert

OVERLAY = "olcOverlay=unique,olcDatabase={2}mdb,cn=config"


@pytest.mark.parametrize(
    ("dn", "same_as"),
    [
        ("olcOverlay={1}unique,olcDatabase={2}mdb,cn=config", OVERLAY),
        ("cn={4}hopthu,cn=schema,cn=config", "cn=hopthu,cn=schema,cn=config"),
        ("cn=module{0},cn=config", "cn=module,cn=config"),
        ("OU=Units,dc=daklak", "ou=units, dc=daklak"),
    ],
)
def test_numbers_and_case_do_not_make_another_entry(dn: str, same_as: str) -> None:
    assert canonical_dn(dn) == canonical_dn(same_as)


def test_the_number_tells_databases_apart() -> None:
    assert canonical_dn("olcDatabase={1}mdb,cn=config") != canonical_dn("olcDatabase={2}mdb,cn=config")


@pytest.mark.parametrize(
    ("live", "wanted", "expected"),
    [
        pytest.param({"olcUniqueURI": [b"b", b"a"]}, {"olcUniqueURI": [b"a", b"b"]}, None, id="sets have no order"),
        pytest.param({"olcAccess": [b"{0}to a", b"{1}to b"]}, {"olcAccess": [b"to a", b"to b"]}, None, id="numbered"),
        pytest.param(
            {"olcAccess": [b"{0}to b", b"{1}to a"]},
            {"olcAccess": [b"to a", b"to b"]},
            {"olcAccess": [b"to a", b"to b"]},
            id="ACLs in another order",
        ),
        pytest.param({"olcX": [b"to  a\n by b"]}, {"olcX": [b"to a by b"]}, None, id="white space"),
        pytest.param({"olcX": [b"1"]}, {"olcX": [b"2"]}, {"olcX": [b"2"]}, id="changed by hand"),
        pytest.param({"olcX": [b"1"], "olcY": [b"1"]}, {"olcX": [b"1"]}, {"olcY": []}, id="no longer wanted"),
        pytest.param({"olcX": [b"1"]}, {"olcX": [b"1"], "olcY": [b"2"]}, {"olcY": [b"2"]}, id="new attribute"),
        pytest.param({"OLCX": [b"1"]}, {"olcX": [b"1"]}, None, id="attribute names have no case"),
        pytest.param({"olcX": [b"1"], "userPassword": [b"{A}"]}, {"olcX": [b"1"]}, None, id="passwords stay"),
        pytest.param({"olcX": [b"1"], "olcSerial": [b"7"]}, {"olcX": [b"1"], "olcSerial": [b"0"]}, None, id="initial"),
        pytest.param(
            {"objectClass": [b"a"], "olcX": [b"1"]},
            {"objectClass": [b"A", b"b"], "olcX": [b"1"]},
            {"objectClass": [b"a", b"b"]},
            id="another object class",
        ),
        pytest.param({"anything": [b"1"]}, {}, None, id="an entry that only has to be there"),
    ],
)
def test_modify(live: Attributes, wanted: Attributes, expected: Attributes | None) -> None:
    fixed: Attributes = {"objectClass": [b"olcOverlayConfig"], "olcOverlay": [b"unique"]}
    present: Attributes = fixed | {"objectClass": [b"OlcOverlayConfig", b"olcConfig"]} | live
    found = changes({OVERLAY: present}, [(OVERLAY, fixed | wanted)], initial=["olcSerial"])
    assert [change.after for change in found] == ([] if expected is None else [expected])


def test_add_comes_in_the_order_of_the_text_and_strangers_stay() -> None:
    wanted: list[tuple[str, Attributes]] = [("ou=a,dc=x", {"ou": [b"a"]}), ("cn=b,ou=a,dc=x", {"cn": [b"b"]})]
    found = changes({"ou=stranger,dc=x": {"ou": [b"stranger"]}}, wanted)
    assert [(change.action, change.dn) for change in found] == [("add", "ou=a,dc=x"), ("add", "cn=b,ou=a,dc=x")]


def test_after_the_changes_nothing_is_left() -> None:
    wanted: list[tuple[str, Attributes]] = [(OVERLAY, {"olcOverlay": [b"unique"], "olcX": [b"b", b"a"]})]
    live: dict[str, Attributes] = {OVERLAY: {"olcOverlay": [b"{0}unique"], "olcX": [b"c"], "olcY": [b"1"]}}
    for change in changes(live, wanted):
        live[change.dn] = {k: v for k, v in (live[change.dn] | change.after).items() if v}
    assert changes(live, wanted) == []


def test_a_diff_hides_passwords() -> None:
    change = Change("modify", "cn=admin", {"userPassword": [b"old"]}, {"userPassword": [b"new"], "cn": [b"admin"]})
    text = as_text(change, "before", frozenset({"userpassword"})) + as_text(
        change, "after", frozenset({"userpassword"})
    )
    assert "old" not in text
    assert "new" not in text
    assert "cn: admin" in text


SYNC = 'rid=001 binddn="cn=a" credentials="{secret:replicator}" timeout=60'


@pytest.mark.parametrize(
    ("password", "inserted"), [("plain", 'credentials="plain"'), ('a"b\\c', r'credentials="a\"b\\c"')]
)
def test_a_password_of_the_configuration_is_compared_and_never_shown(password: str, inserted: str) -> None:
    text = insert(SYNC, {"replicator": password})
    assert inserted in text
    live: dict[str, Attributes] = {OVERLAY: {"olcX": [b"{0}" + text.encode()]}}
    assert changes(live, [(OVERLAY, {"olcX": [text.encode()]})]) == []
    other = insert(SYNC, {"replicator": "other"})
    (change,) = changes(live, [(OVERLAY, {"olcX": [other.encode()]})])
    for side in ("before", "after"):
        shown = as_text(change, side, frozenset())
        assert "timeout=60" in shown
        assert not {"plain", "other", "b\\c"} & set(shown.split('"')), shown
        assert "credentials=(hidden)" in shown


def test_an_unknown_secret_is_an_error() -> None:
    with pytest.raises(KeyError):
        insert(SYNC, {})


def test_what_goes_is_written_first_and_the_rest_in_the_order_of_the_text() -> None:
    live: dict[str, Attributes] = {OVERLAY: {"olcGone": [b"1"]}}
    (change,) = changes(live, [(OVERLAY, {"olcSyncrepl": [b"1"], "olcMultiProvider": [b"TRUE"]})])
    assert list(change.after) == ["olcGone", "olcSyncrepl", "olcMultiProvider"]
