"""Comparison of two copies of the directory, without slapd."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "roles/openldap/files/usr/local/sbin"
A: dict[str, list[bytes]] = {"uid": [b"a"], "entryUUID": [b"1"], "pwdFailureTime": [b"20261126101542Z"]}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, with a stand-in for the LDAP library, which the controller need not have."""
    controls, simple = ModuleType("ldap.controls"), ModuleType("ldap.controls.simple")
    controls.SimplePagedResultsControl = object  # type: ignore[attr-defined]
    simple.ManageDSAITControl = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ldap", SimpleNamespace(controls=controls))
    monkeypatch.setitem(sys.modules, "ldap.controls", controls)
    monkeypatch.setitem(sys.modules, "ldap.controls.simple", simple)
    spec = spec_from_file_location("directory_compare", FOLDER / "directory-compare.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("here", "there", "differing"),
    [
        pytest.param({"uid=a": A}, {"UID=A": A}, [], id="case of a DN"),
        pytest.param({"uid=a": A}, {"uid=a": {**A, "contextCSN": [b"x"], "entryDN": [b"y"]}}, [], id="each one's own"),
        pytest.param({"uid=a": {"m": [b"1", b"2"]}}, {"uid=a": {"M": [b"2", b"1"]}}, [], id="values have no order"),
        pytest.param({"uid=a": A}, {"uid=a": {**A, "entryUUID": [b"2"]}}, ["uid=a"], id="another entry of the name"),
        pytest.param({"uid=a": A}, {"uid=a": {"uid": [b"a"], "entryUUID": [b"1"]}}, ["uid=a"], id="state of a lockout"),
        pytest.param({"uid=a": A}, {}, ["uid=a"], id="only here"),
        pytest.param({}, {"uid=a": A}, ["uid=a"], id="only there"),
        pytest.param({}, {}, [], id="nothing"),
    ],
)
def test_differences(compare: Any, here: dict[str, Any], there: dict[str, Any], differing: list[str]) -> None:
    found, number = compare.differences(iter(here.items()), iter(there.items()))
    assert (sorted(found), number) == (differing, len(here))


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param((b"1", b"2"), (b"1", b"2"), True, id="nothing moved"),
        pytest.param((b"1", b"2"), (b"3", b"2"), True, id="one side stands still"),
        pytest.param((b"1", None), (b"3", None), True, id="missing there all the time"),
        pytest.param((b"1", b"2"), (b"3", b"1"), False, id="under way"),
        pytest.param((b"1", b"2"), None, False, id="gone"),
    ],
)
def test_lasting(compare: Any, first: Any, second: Any, expected: bool) -> None:
    later = {"uid=a": second} if second else {}
    assert bool(compare.lasting({"uid=a": first}, later)) is expected


def test_a_line_names_attributes_and_no_values(compare: Any) -> None:
    said = compare.line("uid=a", A, {**A, "uid": [b"secret"], "cn": [b"more"]}, "ldaps://mail2")
    assert said == "different: uid=a: cn, uid"
    assert compare.line("uid=a", None, A, "ldaps://mail2") == "only on ldaps://mail2: uid=a"
    assert compare.line("uid=a", A, None, "ldaps://mail2") == "only on this host: uid=a"
