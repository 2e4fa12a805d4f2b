"""Initial passwords: their strength, their hash, and slips that survive a crash."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import stat
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible.parsing.vault import VaultLib, VaultSecret


def _plugin() -> ModuleType:
    path = Path(__file__).parents[2] / "plugins" / "action" / "directory.py"
    spec = importlib.util.spec_from_file_location("directory_action", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


directory = _plugin()
ADDRESSES = {"p1": "an@daklak.gov.vn", "p2": "binh@daklak.gov.vn"}


def vault(secret: str = "one") -> VaultLib:
    return VaultLib([("default", VaultSecret(secret.encode()))])


def slips_of(path: Path) -> list[dict[str, Any]]:
    content = yaml.safe_load(vault().decrypt(path.read_bytes()))
    assert list(content) == ["slips"]
    slips: list[dict[str, Any]] = content["slips"]
    return slips


def test_passwords_are_long_random_and_without_doubtful_letters() -> None:
    passwords = {directory.initial_password() for _number in range(500)}
    assert len(passwords) == 500
    for password in passwords:
        assert re.fullmatch("([a-hjkmnp-z2-9]{5}-){3}[a-hjkmnp-z2-9]{5}", password)


def test_the_hash_is_salted_sha512() -> None:
    first, second = directory.ssha512("mật khẩu"), directory.ssha512("mật khẩu")
    assert first != second
    for hashed in (first, second):
        raw = base64.b64decode(hashed.removeprefix("{SSHA512}"))
        digest, salt = raw[:64], raw[64:]
        assert len(salt) == 16
        assert hashlib.sha512("mật khẩu".encode() + salt).digest() == digest


def test_slips_are_encrypted_private_and_named_when_done(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "slips"
    slips = directory.Slips(folder, vault())
    passwords = slips.prepare(["p2", "p1"], ADDRESSES)
    (pending,) = folder.iterdir()
    assert pending.name.endswith(".pending.yml")
    assert pending.read_bytes().startswith(b"$ANSIBLE_VAULT;")
    final = slips.finish()
    assert list(folder.iterdir()) == [final]
    assert re.fullmatch(r"\d{8}T\d{12}Z\.yml", final.name)
    assert stat.S_IMODE(final.stat().st_mode) == 0o600
    assert slips_of(final) == [
        {"id": identity, "address": ADDRESSES[identity], "password": passwords[identity]} for identity in ("p1", "p2")
    ]


def test_nothing_new_writes_nothing_and_needs_no_vault(tmp_path: Path) -> None:
    slips = directory.Slips(tmp_path / "slips", VaultLib([]))
    assert slips.prepare([], ADDRESSES) == {}
    assert slips.finish() is None
    assert not (tmp_path / "slips").exists()


@pytest.mark.parametrize("secrets", [[], None])
def test_without_a_vault_secret_nothing_is_written(tmp_path: Path, secrets: Any) -> None:
    slips = directory.Slips(tmp_path / "slips", VaultLib(secrets))
    with pytest.raises(AnsibleActionFail, match="vault secret"):
        slips.prepare(["p1"], ADDRESSES)
    assert not (tmp_path / "slips").exists()


def test_an_interrupted_run_is_taken_over(tmp_path: Path) -> None:
    first = directory.Slips(tmp_path, vault()).prepare(["p1", "p2", "p3"], {**ADDRESSES, "p3": "c@x"})
    # p1 was made before the crash; p2 was not and has a new address; p3 has left the files.
    second = directory.Slips(tmp_path, vault())
    moved = {**ADDRESSES, "p2": "binh2@daklak.gov.vn", "p4": "d@daklak.gov.vn"}
    passwords = second.prepare(["p2", "p4"], moved)
    assert passwords["p1"] == first["p1"]
    assert passwords["p2"] == first["p2"]
    assert passwords["p4"] not in first.values()
    final = second.finish()
    assert list(tmp_path.iterdir()) == [final]
    assert [(slip["id"], slip["address"]) for slip in slips_of(final)] == [
        ("p1", "an@daklak.gov.vn"),
        ("p2", "binh2@daklak.gov.vn"),
        ("p4", "d@daklak.gov.vn"),
    ]


def test_a_crash_before_the_last_rename_is_finished_without_new_mailboxes(tmp_path: Path) -> None:
    first = directory.Slips(tmp_path, vault()).prepare(["p1"], ADDRESSES)
    second = directory.Slips(tmp_path, vault())
    assert second.prepare([], ADDRESSES) == first
    final = second.finish()
    assert list(tmp_path.iterdir()) == [final]
    assert slips_of(final)[0]["password"] == first["p1"]


def test_finished_slips_are_never_used_again(tmp_path: Path) -> None:
    slips = directory.Slips(tmp_path, vault())
    first = slips.prepare(["p1"], ADDRESSES)
    slips.finish()
    assert directory.Slips(tmp_path, vault()).prepare(["p1"], ADDRESSES)["p1"] != first["p1"]


def test_leftovers_of_another_secret_stop_the_run_and_stay(tmp_path: Path) -> None:
    directory.Slips(tmp_path, vault()).prepare(["p1"], ADDRESSES)
    with pytest.raises(AnsibleActionFail, match=r"pending\.yml cannot be decrypted"):
        directory.Slips(tmp_path, vault("two")).prepare(["p1"], ADDRESSES)
    assert len(list(tmp_path.iterdir())) == 1
