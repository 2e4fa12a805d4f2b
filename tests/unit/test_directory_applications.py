"""Programs that submit mail (HT-4.2e), mailboxes that take mail from inside only, and certificates of their holders."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from directory_model import NOW, Tree, application, person, unit, words
from directory_samples import PEOPLE, POLICY, TODAY, UNITS, desired, problems_of, read_folder, write

from hopthu import export
from hopthu.lifecycle import later
from hopthu.plan import exported, make_reset_plan

ONE = """\
mail_applications:
  - id: qlvb
    name: Quản lý văn bản
    unit: u1
    addresses: [soyte, thong-bao, qlvb]
    hosts: [10.1.2.3, "2001:0db8::/32", 10.0.0.0/24]
    request_ref: 7/SYT
"""
TWO = """\
  - {id: motcua, name: Một cửa, unit: u1, addresses: [motcua], hosts: [10.1.2.4]}
"""


def folder_with(path: Path, applications: str, **files: str) -> Path:
    """A folder with the sample, some of it replaced, and these applications."""
    sources = {"policy": POLICY, "units": UNITS, "people": PEOPLE, "applications": applications, **files}
    write(path, {f"{name}.yml": text for name, text in sources.items()})
    return path


@pytest.mark.requirement("HT-4.2e")
def test_an_application_has_a_login_hosts_and_addresses_and_no_mailbox(tmp_path: Path) -> None:
    found = desired(folder_with(tmp_path, ONE))["qlvb"]
    assert found == {
        "cn": ["Quản lý văn bản"],
        "mail": ["qlvb@daklak.gov.vn"],
        "mailLocalAddress": ["thong-bao@daklak.gov.vn"],
        "mailboxState": ["active"],
        "mailboxClass": ["application"],
        "departmentNumber": ["u1"],
        "applicationHost": ["10.0.0.0/24", "10.1.2.3", "2001:db8::/32"],
        "applicationSender": ["qlvb@daklak.gov.vn", "soyte@daklak.gov.vn", "thong-bao@daklak.gov.vn"],
        "pwdPolicySubentry": ["cn=services,ou=policies,dc=daklak,dc=gov,dc=vn"],
    }


BAD = [
    ("unit: u1", "unit: u9", 'd/applications.yml:4: unit: there is no unit "u9": correct it or add it to units.yml'),
    ("10.1.2.3,", "10.1.2.300,", '6: hosts: "10.1.2.300" is no address or network, such as 10.1.2.3 or 10.1.2.0/24'),
    ("10.1.2.3,", "10.1.2.3/24,", '"10.1.2.3/24" is both a host and a network: write 10.1.2.3 or 10.1.2.0/24'),
    ("10.1.2.3,", "0.0.0.0/0,", '"0.0.0.0/0" is everywhere: name the hosts from which it logs in'),
    ("10.1.2.3,", "mail.vn,", 'hosts: "mail.vn" is no address or network, such as'),
    ("[10.1.2.3,", "[] #", "hosts: is empty: name the addresses or networks from which it logs in"),
    ("    hosts:", "    #", "hosts: is missing: name the addresses or networks from which it logs in"),
    (
        "thong-bao",
        "a@gmail.com",
        '5: addresses: "a@gmail.com" is outside the domains: use daklak.gov.vn, phuyen.gov.vn',
    ),
    ("thong-bao", "admin", 'addresses: "admin" is reserved in policy.yml: choose another name'),
    ("thong-bao", "soyte", "addresses: soyte@daklak.gov.vn stands twice in this record: keep one"),
    ("thong-bao", "motcua", "motcua@daklak.gov.vn is already an address of application qlvb"),
    ("id: qlvb", "id: uyen", "id: uyen@daklak.gov.vn is already an address of person p1"),
    ("id: qlvb", "id: motcua", '8: id: "motcua" is already the id at d/applications.yml:2: change one'),
    ("id: qlvb", "id: p1", 'id: "p1" is already the id at d/people.yml:'),
    ("id: qlvb", "id: QLVB", 'id: "QLVB" must be what stands before the @'),
    ("hosts:", "host:", "host: is not a known field: did you mean hosts?"),
    ("mail_applications:", "mail_apps:", "mail_apps: is unknown: the only root is mail_applications"),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD)
def test_each_mistake_is_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in ONE
    found = problems_of(tmp_path, applications=ONE.replace(old, new, 1) + TWO)
    assert [text for text in found if said in text], found
    assert len(found) <= 2


def test_who_is_no_longer_there_is_not_sent_as(tmp_path: Path) -> None:
    people = PEOPLE.replace("    aliases: [uyen]", "    aliases: [uyen]\n    state: left").replace("p1}", "p2}")
    units = UNITS.replace("    head: p1\n", "")
    found = problems_of(tmp_path, applications=ONE.replace("thong-bao", "uyen"), people=people, units=units)
    assert found == [
        "d/applications.yml:5: addresses: uyen@daklak.gov.vn is of p1, who is no longer there: name another"
    ]


def test_an_application_is_nobodys_head(tmp_path: Path) -> None:
    found = problems_of(tmp_path, applications=ONE, units=UNITS.replace("head: p1", "head: qlvb"))
    assert found == ['d/units.yml:10: head: there is no person "qlvb": correct it or add the person']


A1 = application("a1", "thong-bao", departmentNumber="u1")
U1 = unit("u1", "so1")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (application("a1", "thong-bao", departmentNumber="u1", applicationHost=["192.0.2.9"]), "update"),
        (application("a1", "thong-bao", departmentNumber="u1", cn="Tên mới"), "update"),
        (application("a1", "bao-tin", departmentNumber="u1"), "update"),
        (application("a1", "thong-bao", senders=["so1"], departmentNumber="u1"), "update"),
        (application("a1", "thong-bao", departmentNumber="u1", mailboxState="suspended"), "suspend"),
        (application("a1", "thong-bao", departmentNumber="u1", mailboxState="left"), "disconnect"),
        (None, "disconnect"),
    ],
)
def test_words(after: dict[str, object] | None, said: str) -> None:
    tree = Tree()
    assert words(tree.load(U1, A1)) == ["u1 found", "a1 connect"]
    tree.now = later(NOW, 1)
    lines = [U1, *([after] if after else [])]
    assert words(tree.load(*lines)) == [f"a1 {said}"]
    assert words(tree.plan(*lines)) == []
    assert tree.passwords == ["u1", "a1"]


@pytest.mark.requirement("HT-4.2e")
def test_from_its_beginning_to_its_end() -> None:
    tree = Tree(retention_days=20, block_days=60, required_refs={"connect": ["request_ref"]})
    plan = tree.load(U1, A1)
    assert words(plan) == ["u1 found", "REFUSED a1 connect"]
    asked = {**A1, "r": {"request_ref": "7/SYT"}}
    assert words(tree.load(U1, asked)) == ["a1 connect"]
    assert tree.entry("a1")["objectClass"] == ["hopThuApplication"]
    suspended = application("a1", "thong-bao", departmentNumber="u1", mailboxState="suspended")
    tree.load(U1, suspended)
    reset = make_reset_plan(
        tree.policy, [{"id": "a1", "refs": {"request_ref": "8/SYT"}}], tree.rows("ou=applications"),
        base="dc=x", loader="cn=loader", now=tree.now,
    )  # fmt: skip
    assert words(reset) == ["a1 reset"]
    assert reset.steps[0].password
    tree.load(U1)
    assert words(tree.load(U1, {**A1, "r": {"request_ref": "9/SYT"}})) == ["a1 connect"]
    assert tree.passwords == ["u1", "a1", "a1"]
    tree.load(U1)
    tree.now = later(tree.now, 21)
    assert words(tree.load(U1)) == ["a1 purge"]
    assert words(tree.plan(U1, person("p1", "thong-bao"))) == ["REFUSED p1 join"]
    assert words(tree.plan(U1, {**A1, "r": {"request_ref": "10/SYT"}})) == ["REFUSED a1 connect"]


def test_an_address_that_a_person_has_given_up_is_not_an_applications_own() -> None:
    tree = Tree()
    tree.load(U1, person("p1", "an"))
    tree.load(U1, person("p1", "an2"))
    assert words(tree.plan(U1, person("p1", "an2"), application("a1", "an", departmentNumber="u1"))) == [
        "REFUSED a1 connect"
    ]


def test_an_edit_by_hand_is_put_right() -> None:
    tree = Tree()
    tree.load(U1, A1)
    tree.entry("a1")["applicationHost"] = ["0.0.0.0/0"]
    assert words(tree.load(U1, A1)) == ["a1 drift"]
    assert tree.entry("a1")["applicationHost"] == ["192.0.2.1"]


# --- mailboxes for inside only


def test_internal_is_an_ordinary_change(tmp_path: Path) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    plain = desired(tmp_path)
    write(tmp_path, {"people.yml": PEOPLE.replace("    title:", "    internal: true\n    title:")})
    inside = desired(tmp_path)
    assert inside["p1"] == {**plain["p1"], "mailboxInternal": ["TRUE"]}
    assert inside["p2"] == plain["p2"]
    tree = Tree()
    tree.load(U1, person("p1", "an"))
    assert words(tree.load(U1, person("p1", "an", mailboxInternal="TRUE"))) == ["p1 update"]
    assert words(tree.load(U1, person("p1", "an"))) == ["p1 update"]
    assert "mailboxInternal" not in tree.entry("p1")


@pytest.mark.parametrize(("cell", "value"), [("true", ["TRUE"]), ("false", None), ("", None)])
def test_internal_in_csv(tmp_path: Path, cell: str, value: list[str] | None) -> None:
    rows = f"id,ho,ten,unit,internal\np1,Lê,An,u1,{cell}\np2,Lê,Ba,u1,\n"
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.csv": rows})
    assert desired(tmp_path)["p1"].get("mailboxInternal") == value


# --- certificates


def certificate(*names: str, subject: str = "", days: int = 30) -> bytes:
    """A self-signed certificate in PEM for mail addresses as alternative names, and one in its subject."""
    key = ec.generate_private_key(ec.SECP256R1())
    holder = [x509.NameAttribute(NameOID.COMMON_NAME, "Lê An")]
    holder += [x509.NameAttribute(NameOID.EMAIL_ADDRESS, subject)] if subject else []
    begin = datetime(TODAY.year, TODAY.month, TODAY.day, tzinfo=UTC) - timedelta(days=60)
    builder = x509.CertificateBuilder().subject_name(x509.Name(holder)).issuer_name(x509.Name(holder))
    builder = builder.public_key(key.public_key()).serial_number(7).not_valid_before(begin)
    builder = builder.not_valid_after(begin + timedelta(days=60 + days))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.RFC822Name(name) for name in names]), False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def with_certificates(folder: Path, listed: str, files: dict[str, bytes]) -> Path:
    """The sample, in which p1 (uyen@daklak.gov.vn is an alias) has certificates."""
    people = PEOPLE.replace("    title:", f"    certificate: {listed}\n    title:")
    write(folder, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": people, **files})
    return folder


@pytest.mark.requirement("HT-4.2g")
@pytest.mark.parametrize(
    "pem",
    [certificate("Uyen@daklak.gov.vn", "x@y.vn"), certificate(subject="uyen@daklak.gov.vn")],
    ids=["SAN", "subject"],
)
def test_a_certificate_comes_from_its_file_and_goes_back(tmp_path: Path, pem: bytes) -> None:
    folder = with_certificates(tmp_path, "certificates/uyen.pem", {"certificates/uyen.pem": pem})
    [text] = desired(folder)["p1"]["userCertificate;binary"]
    assert base64.b64decode(text) == x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    lines, reading = read_folder(folder)
    live = [json.dumps({"k": line["k"], "i": line["i"], "a": line["a"]}) for line in lines[1:]]
    for form in ("yml", "csv", "json"):
        target = tmp_path / form
        export.write(live, reading.policy, target, form)
        write(target, {"policy.yml": POLICY})
        assert desired(target) == {line["i"]: line["a"] for line in lines[1:]}


def test_several_are_kept_in_one_order(tmp_path: Path) -> None:
    pems = [certificate("uyen@daklak.gov.vn") for _ in range(3)]
    files = {f"{number}.pem": pem for number, pem in enumerate(pems)}
    first = desired(with_certificates(tmp_path, "[0.pem, 1.pem, 2.pem]", files))["p1"]
    second = desired(with_certificates(tmp_path, "[2.pem, 0.pem, 1.pem, 0.pem]", files))["p1"]
    assert first == second
    assert len(first["userCertificate;binary"]) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "an.pem cannot be read (no such file or directory): put the certificate there"),
        (b"nonsense", "an.pem is no X.509 certificate in PEM form: export it anew"),
        (
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "an.pem is no X.509 certificate in PEM form",
        ),
        (certificate("x@y.vn"), "an.pem is a certificate of x@y.vn, not of this mailbox: get one for its address"),
        (certificate(), "an.pem is a certificate of no address, not of this mailbox"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, said: str) -> None:
    with_certificates(tmp_path, "an.pem", {"an.pem": content} if content else {})
    [problem] = read_folder(tmp_path)[1].problems
    assert str(problem).startswith(f"d/people.yml:7: certificate: {said}")


def test_one_that_has_expired_is_a_warning(tmp_path: Path) -> None:
    folder = with_certificates(tmp_path, "an.pem", {"an.pem": certificate("uyen@daklak.gov.vn", days=-2)})
    _lines, reading = read_folder(folder)
    assert reading.problems == []
    assert reading.warnings == [
        "d/people.yml:7: certificate: an.pem has expired on 2026-11-19: replace it, or take it out"
    ]


def test_live_applications_and_certificates_export(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, ONE)
    lines, reading = read_folder(folder)
    tree = Tree(**lines[0]["policy"])
    tree.load(*({**line, "l": "x"} for line in lines[1:]))
    rows: Sequence[object] = [json.dumps(row) for row in exported(tree.mailboxes(), base="x", loader="y", now=NOW)]
    paths = export.write(map(str, rows), reading.policy, tmp_path / "out", "yml")
    text = paths[2].read_text(encoding="utf-8")
    assert "id: qlvb" in text and "addresses: [qlvb, soyte, thong-bao]" in text and 'request_ref: "7/SYT"' in text
