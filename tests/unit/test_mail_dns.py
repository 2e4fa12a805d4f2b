"""What a province publishes in DNS for its mail, and how a difference is told."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import dns.rdata
import dns.zone
import mail_dns
import pytest
from ansible.errors import AnsibleFilterError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

MAIN, ALIAS = "tinh.gov.vn", "tinh-cu.gov.vn"
PRIVATE = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@cache
def key(number: int) -> str:
    """An RSA key, PEM; the same one for the same number."""
    return rsa.generate_private_key(65537, 2048 + 8 * number).private_bytes(*PRIVATE).decode()


@cache
def certificate(host: str) -> tuple[str, str]:
    """A host's certificate, PEM, and the SHA-256 of its key in hex."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = builder.serial_number(1).not_valid_before(datetime.now(UTC))
    signed = builder.not_valid_after(datetime.now(UTC) + timedelta(days=1)).sign(private, hashes.SHA256())
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashlib.sha256(private.public_key().public_bytes(*form)).hexdigest()
    return signed.public_bytes(serialization.Encoding.PEM).decode(), digest


def settings(**changed: Any) -> dict[str, Any]:
    """Settings of a province with two mail exchangers."""
    hosts = {"mail1": ["192.0.2.1", "2001:db8::1"], "mail2": ["192.0.2.2"]}
    plain: dict[str, Any] = {
        "exchangers": [
            {"name": f"{host}.{MAIN}", "addresses": addresses, "certificate": certificate(host)[0]}
            for host, addresses in hosts.items()
        ],
        "service_name": f"mail.{MAIN}",
        "service_addresses": ["192.0.2.1", "2001:db8::1"],
        "dkim_keys": [key(0)],
        "spf_more": [],
        "dmarc_policy": "reject",
        "reports": f"postmaster@{MAIN}",
        "policy_addresses": ["192.0.2.80"],
        "sts_mode": "enforce",
        "more_tlsa": [],
        "caa": [],
    }
    return plain | changed


def zones(**changed: Any) -> dict[str, dict[str, Any]]:
    """What the province publishes, by domain."""
    return {zone["domain"]: zone for zone in mail_dns.mail_zones([MAIN, ALIAS], settings(**changed))}


def data(zone: dict[str, Any], name: str, kind: str) -> list[str]:
    """Data of the records of one name and type; name without the domain, or @."""
    full = zone["domain"] if name == "@" else f"{name}.{zone['domain']}"
    return [r["data"] for r in zone["records"] if (r["name"], r["type"]) == (full, kind)]


def published(zone: dict[str, Any]) -> dict[tuple[str, str], list[str]]:
    """Answers of a DNS that has exactly the zone's records, in the form that dnspython gives."""
    found: dict[tuple[str, str], list[str]] = {question: [] for question in mail_dns.questions(zone)}
    for record in zone["records"]:
        rdata = dns.rdata.from_text("IN", record["type"], record["data"])
        found[record["name"], record["type"]].append(rdata.to_text())
    return found


def test_selector_and_record_come_from_the_public_key() -> None:
    public = serialization.load_pem_private_key(key(0).encode(), None).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert mail_dns.dkim_selector(key(0)) == "ht" + hashlib.sha256(der).hexdigest()[:8]
    assert mail_dns.dkim_record(key(0)) == f"v=DKIM1; k=rsa; p={base64.b64encode(der).decode()}"
    rows = mail_dns.dkim_keys([MAIN, ALIAS], key(0))
    assert [(row["domain"], row["selector"], row["key"]) for row in rows] == [
        (domain, mail_dns.dkim_selector(key(0)), key(0)) for domain in (MAIN, ALIAS)
    ]


@pytest.mark.parametrize(
    "pem", ["", "no key", ec.generate_private_key(ec.SECP256R1()).private_bytes(*PRIVATE).decode()]
)
def test_what_is_no_dkim_key_is_refused(pem: str) -> None:
    with pytest.raises(AnsibleFilterError, match=r"DKIM key is not .*playbooks/secrets.yml"):
        mail_dns.dkim_record(pem)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="certificate is not readable"):
        mail_dns.tlsa("-----BEGIN CERTIFICATE-----\nnone\n-----END CERTIFICATE-----\n")


def test_main_domain() -> None:
    zone = zones()[MAIN]
    assert data(zone, "@", "MX") == [f"10 mail1.{MAIN}.", f"10 mail2.{MAIN}."]
    assert data(zone, "@", "TXT") == ['"v=spf1 ip4:192.0.2.1 ip6:2001:db8::1 ip4:192.0.2.2 -all"']
    assert data(zone, "_dmarc", "TXT") == [f'"v=DMARC1; p=reject; rua=mailto:postmaster@{MAIN}"']
    assert data(zone, "mail1", "AAAA") == ["2001:db8::1"]
    assert data(zone, "mail", "A") == ["192.0.2.1"]
    assert data(zone, "_25._tcp.mail2", "TLSA") == [f"3 1 1 {certificate('mail2')[1]}"]
    assert data(zone, "_submissions._tcp", "SRV") == [f"0 1 465 mail.{MAIN}."]
    assert data(zone, "_imap._tcp", "SRV") == ["0 0 0 ."]
    assert data(zone, "mail1", "CAA") == ['0 issue ";"']
    assert data(zone, f"{ALIAS}._report._dmarc", "TXT") == ['"v=DMARC1"']
    assert len(data(zone, f"{mail_dns.dkim_selector(key(0))}._domainkey", "TXT")) == 1


def test_alias_domain_leads_to_the_same_hosts() -> None:
    zone = zones()[ALIAS]
    assert data(zone, "@", "MX") == [f"10 mail1.{MAIN}.", f"10 mail2.{MAIN}."]
    assert data(zone, "@", "TXT") == data(zones()[MAIN], "@", "TXT")
    assert data(zone, f"{mail_dns.dkim_selector(key(0))}._domainkey", "TXT")
    assert {record["name"] for record in zone["records"] if record["type"] in ("TLSA", "CAA")} == set()
    assert all(record["name"].endswith(ALIAS) for record in zone["records"])


def test_rollover_publishes_every_key() -> None:
    zone = zones(dkim_keys=[key(0), key(1), key(2)], more_tlsa=["3 1 1 " + "ab" * 32])[MAIN]
    for number in range(3):
        assert data(zone, f"{mail_dns.dkim_selector(key(number))}._domainkey", "TXT")
    assert data(zone, "_25._tcp.mail1", "TLSA")[1:] == ["3 1 1 " + "ab" * 32]


def test_settings_reach_the_records() -> None:
    zone = zones(spf_more=["include:spf.example"], dmarc_policy="none", caa=["letsencrypt.org"])[MAIN]
    assert data(zone, "@", "TXT")[0].endswith(' include:spf.example -all"')
    assert "p=none" in data(zone, "_dmarc", "TXT")[0]
    assert data(zone, "mail", "CAA") == ['0 issue "letsencrypt.org"']


def test_policy_and_its_id_change_together() -> None:
    first, second = zones()[MAIN], zones(sts_mode="testing")[MAIN]
    assert first["policy"].splitlines() == [
        "version: STSv1",
        "mode: enforce",
        f"mx: mail1.{MAIN}",
        f"mx: mail2.{MAIN}",
        "max_age: 604800",
    ]
    assert data(first, "_mta-sts", "TXT") == data(zones()[MAIN], "_mta-sts", "TXT")
    assert data(first, "_mta-sts", "TXT") != data(second, "_mta-sts", "TXT")


def test_without_a_web_server_there_is_no_policy() -> None:
    zone = zones(policy_addresses=[])[MAIN]
    assert zone["policy"] == ""
    assert not [record for record in zone["records"] if "mta-sts" in record["name"]]


@pytest.mark.parametrize("domain", [MAIN, ALIAS])
def test_text_is_a_zone_file(domain: str) -> None:
    zone = zones()[domain]
    head = f"$ORIGIN {domain}.\n@ 60 IN SOA ns hostmaster 1 1 1 1 1\n@ 60 IN NS ns.elsewhere.example.\n"
    read = dns.zone.from_text(head + mail_dns.zone_text(zone, 300), origin=f"{domain}.", relativize=False)
    records = {(str(name).rstrip("."), ttl) for name, ttl, rdata in read.iterate_rdatas() if ttl == 300}
    assert records == {(record["name"], 300) for record in zone["records"]}
    key_text = read.get_rdataset(f"{mail_dns.dkim_selector(key(0))}._domainkey.{domain}.", "TXT")
    assert key_text is not None
    assert b"".join(key_text[0].strings).decode() == mail_dns.dkim_record(key(0))


@pytest.mark.parametrize("domain", [MAIN, ALIAS])
def test_what_is_published_as_printed_is_right(domain: str) -> None:
    zone = zones()[domain]
    assert mail_dns.differences(zone, published(zone)) == ([], [])


def test_another_spelling_is_right() -> None:
    zone = zones()[MAIN]
    answers = published(zone)
    answers[MAIN, "MX"] = [text.upper() for text in answers[MAIN, "MX"]]
    answers[f"_dmarc.{MAIN}", "TXT"] = [f'"v=DMARC1;p=reject;" "rua=mailto:postmaster@{MAIN};"']
    answers[f"mail1.{MAIN}", "AAAA"] = ["2001:0db8:0:0::1"]
    # Other TXT records stand beside SPF in every real zone.
    answers[MAIN, "TXT"] = [*answers[MAIN, "TXT"], '"site-verification=1"']
    assert mail_dns.differences(zone, answers) == ([], [])


@pytest.mark.parametrize(
    ("name", "kind", "answer", "sentence"),
    [
        (MAIN, "MX", None, f"{MAIN} MX 10 mail1.{MAIN}. is missing: add it."),
        (MAIN, "TXT", None, f"{MAIN} TXT v=spf1 ip4:192.0.2.1 ip6:2001:db8::1 ip4:192.0.2.2 -all is missing: add it."),
        (f"mail1.{MAIN}", "A", ["192.0.2.9"], f"mail1.{MAIN} A 192.0.2.9 is published and not the kit's: remove it."),
        (
            f"mail2.{MAIN}",
            "AAAA",
            ["2001:db8::9"],
            f"mail2.{MAIN} AAAA 2001:db8::9 is published and not the kit's: remove it.",
        ),
        (
            MAIN,
            "MX",
            [f"10 mail1.{MAIN}.", f"10 mail2.{MAIN}.", "5 mx.other.example."],
            f"{MAIN} MX 5 mx.other.example. is none of the province's mail exchangers, and mail goes there past its"
            " filters: remove it.",
        ),
        (
            f"_dmarc.{MAIN}",
            "TXT",
            ['"v=DMARC1; p=none"'],
            f"_dmarc.{MAIN} TXT is v=DMARC1; p=none and must be v=DMARC1; p=reject; rua=mailto:postmaster@{MAIN}.",
        ),
        (
            f"mail2.{MAIN}",
            "TXT",
            ['"v=spf1 a -all"', '"v=spf1 +all"'],
            f"mail2.{MAIN} has 2 TXT records of v=spf1, and receivers then take none: keep only v=spf1 a -all.",
        ),
    ],
)
def test_a_difference_is_one_sentence(name: str, kind: str, answer: list[str] | None, sentence: str) -> None:
    zone = zones()[MAIN]
    wrong, tidy = mail_dns.differences(zone, published(zone) | {(name, kind): answer or []})
    assert sentence in wrong
    assert all(line.startswith(f"{name} ") for line in wrong)
    assert tidy == []


def test_a_key_too_many_is_only_untidy() -> None:
    zone = zones()[MAIN]
    name = f"_25._tcp.mail1.{MAIN}"
    answers = published(zone)
    answers[name, "TLSA"] += ["3 1 1 " + "AB" * 28 + " " + "AB" * 4]
    wrong, tidy = mail_dns.differences(zone, answers)
    assert wrong == []
    assert len(tidy) == 1 and tidy[0].startswith(f"{name} TLSA 3 1 1 abab")
