"""Initial passwords: their strength, their hash, and slips that survive a crash."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
import subprocess
from pathlib import Path

import pytest
from ansible.parsing.vault import VaultLib, VaultSecret

from hopthu.passwords import initial_password, ssha512
from hopthu.slips import Holder, Slips, SlipsRefused, check_certificates

AN = Holder("p1", "person", "an@daklak.gov.vn", "Lê <An>", "Sở Nội vụ")
BINH = Holder("p2", "person", "binh@daklak.gov.vn", "Trần Bình", "Sở Nội vụ")
OFFICE = Holder("dl-02", "unit", "sonoivu@daklak.gov.vn", "Sở Nội vụ", "Sở Nội vụ")


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operator")
    subject = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-subj", "/CN=operator"]
    files = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run(["openssl", "req", *subject, *files], check=True, capture_output=True)
    return folder


def vault(secret: str = "one") -> VaultLib:
    return VaultLib([("default", VaultSecret(secret.encode()))])


def slips_in(folder: Path, operator: Path, secret: str = "one") -> Slips:
    return Slips(folder / "slips", [operator / "cert.pem"], vault(secret))


def opened(path: Path, operator: Path) -> dict[str, str]:
    command = ["openssl", "cms", "-decrypt", "-binary", "-inform", "DER", "-inkey", operator / "key.pem", "-in", path]
    pages = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(re.findall(r'<section data-id="([^"]+)".*?<dd class="p">([^<]+)</dd>', pages, re.DOTALL))


def names(folder: Path) -> list[str]:
    return sorted(re.sub(r"^\w+?Z", "TIME", path.name) for path in (folder / "slips").iterdir())


def test_passwords_are_long_and_without_doubtful_letters() -> None:
    passwords = {initial_password(os.urandom(32), "p1") for _number in range(500)}
    assert len(passwords) == 500
    for password in passwords:
        assert re.fullmatch("([a-hjkmnp-z2-9]{5}-){3}[a-hjkmnp-z2-9]{5}", password)


def test_a_password_hangs_on_key_and_mailbox_and_on_nothing_else() -> None:
    key = os.urandom(32)
    assert initial_password(key, "p1") == initial_password(key, "p1")
    assert initial_password(key, "p1") != initial_password(key, "p2")


def test_the_hash_is_salted_sha512() -> None:
    first, second = ssha512("mật khẩu"), ssha512("mật khẩu")
    assert first != second
    for hashed in (first, second):
        raw = base64.b64decode(hashed.removeprefix("{SSHA512}"))
        digest, salt = raw[:64], raw[64:]
        assert len(salt) == 16
        assert hashlib.sha512("mật khẩu".encode() + salt).digest() == digest


@pytest.mark.requirement("DL-6.2")
def test_each_mailbox_has_a_page_that_only_the_operator_opens(tmp_path: Path, operator: Path) -> None:
    slips = slips_in(tmp_path, operator)
    key = slips.begin([AN, OFFICE])
    assert names(tmp_path) == ["TIME.pending.cms", "TIME.pending.yml"]
    path = slips.finish()
    assert names(tmp_path) == ["TIME.cms"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert initial_password(key, "p1").encode() not in path.read_bytes()
    assert opened(path, operator) == {name: initial_password(key, name) for name in ("p1", "dl-02")}


def test_without_a_vault_secret_nothing_is_written(tmp_path: Path, operator: Path) -> None:
    slips = Slips(tmp_path / "slips", [operator / "cert.pem"], VaultLib([]))
    with pytest.raises(SlipsRefused, match="--vault-password-file"):
        slips.begin([AN])
    assert not (tmp_path / "slips").exists()


def test_an_interrupted_run_keeps_the_pages_of_mailboxes_that_exist(tmp_path: Path, operator: Path) -> None:
    key = slips_in(tmp_path, operator).begin([AN, BINH])
    slips = slips_in(tmp_path, operator)
    [run] = slips.interrupted()
    [path] = slips.recover({run: [AN]})
    assert opened(path, operator) == {"p1": initial_password(key, "p1")}
    assert names(tmp_path) == ["TIME.cms"]
    assert slips.interrupted() == []


def test_an_interrupted_run_that_made_nothing_leaves_nothing(tmp_path: Path, operator: Path) -> None:
    slips_in(tmp_path, operator).begin([AN])
    slips = slips_in(tmp_path, operator)
    assert slips.recover({slips.interrupted()[0]: []}) == []
    assert names(tmp_path) == []


def test_another_vault_secret_is_refused_and_nothing_is_lost(tmp_path: Path, operator: Path) -> None:
    slips_in(tmp_path, operator).begin([AN])
    slips = slips_in(tmp_path, operator, "another")
    with pytest.raises(SlipsRefused, match="use the one of the interrupted run"):
        slips.recover({slips.interrupted()[0]: [AN]})
    assert names(tmp_path) == ["TIME.pending.cms", "TIME.pending.yml"]


@pytest.mark.parametrize(("content", "said"), [(None, "is missing"), ("nonsense", "is no certificate")])
def test_a_certificate_that_cannot_be_used_is_named(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "operator.pem"
    if content:
        path.write_text(content)
    with pytest.raises(SlipsRefused, match=f"operator.pem {said}"):
        check_certificates([path])


def test_a_good_certificate_passes(operator: Path) -> None:
    check_certificates([operator / "cert.pem"])
