"""What a province publishes in DNS for its mail, and what is really published."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from ansible.errors import AnsibleFilterError
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

# --- keys ------------------------------------------------------------------------------------


def _public_key(pem: str) -> bytes:
    """DER SubjectPublicKeyInfo of a PEM private key."""
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except (ValueError, TypeError) as error:
        raise AnsibleFilterError(
            "A DKIM key is not a private key in PEM without a passphrase: playbooks/secrets.yml makes one."
        ) from error
    if not isinstance(key, RSAPrivateKey):
        raise AnsibleFilterError("A DKIM key is not an RSA key: playbooks/secrets.yml makes one.")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.DER, form)


def dkim_selector(pem: str) -> str:
    """Return the selector of a DKIM key: `ht` and the first 8 hex digits of its public key's SHA-256.

    `pem` is an RSA private key, PKCS#8 PEM. AnsibleFilterError when it is not.
    """
    return "ht" + hashlib.sha256(_public_key(pem)).hexdigest()[:8]


def dkim_record(pem: str) -> str:
    """Return the text of the TXT record at SELECTOR._domainkey for a DKIM key (RFC 6376 section 3.6.1).

    `pem` is an RSA private key, PKCS#8 PEM. AnsibleFilterError when it is not.
    """
    return f"v=DKIM1; k=rsa; p={base64.b64encode(_public_key(pem)).decode()}"


def dkim_keys(domains: Iterable[str], pem: str) -> list[dict[str, str]]:
    """Return the signing table of `domains` with one key: rows of domain, selector and key (the PEM itself)."""
    selector = dkim_selector(pem)
    return [{"domain": domain, "selector": selector, "key": pem} for domain in domains]


def tlsa(certificate: str) -> str:
    """Return `3 1 1 DIGEST`, the data of the TLSA record of a PEM certificate's key (RFC 7672 section 3.1).

    Only the first certificate of a chain counts. AnsibleFilterError when there is none.
    """
    try:
        key = x509.load_pem_x509_certificate(certificate.encode()).public_key()
    except ValueError as error:
        raise AnsibleFilterError("A host's certificate is not readable as PEM: run playbooks/site.yml.") from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return f"3 1 1 {hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()}"


def txt(text: str) -> str:
    """Return the data of a TXT record in a zone file: quoted strings of at most 255 octets each (RFC 1035 3.3.14)."""
    octets = text.encode()
    parts = [octets[start : start + 255].decode() for start in range(0, len(octets), 255)]
    return " ".join('"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"' for part in parts)


# --- what is to be published -----------------------------------------------------------------

# Service, port and priority of what mail programs look for (RFC 6186, RFC 8314: TLS from the first octet is preferred).
SERVICES = (("submissions", 465, 0), ("submission", 587, 10), ("imaps", 993, 0), ("pop3s", 995, 10), ("sieve", 4190, 0))
NOT_OFFERED = ("imap", "pop3")


def mail_zones(domains: Sequence[str], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each of a province's `domains`, the main one first, what it must publish for its mail.

    `settings`: `exchangers` (name, addresses and certificate, a PEM, of each), `service_name`, `service_addresses`,
    `dkim_keys` (PEMs), `spf_more` (terms), `dmarc_policy`, `reports` (address), `policy_addresses` (of the web server
    with the MTA-STS policies; none are published when empty), `sts_mode`, `more_tlsa` (data), `caa` (issuers).
    A row has `domain`, `policy` (text of the MTA-STS policy, or empty) and `records`: name (full, without the dot),
    type, data as in a zone file, and why. AnsibleFilterError for a key or certificate that is none.
    """
    policy = "".join(
        f"{line}\r\n"
        for line in (
            "version: STSv1",
            f"mode: {settings['sts_mode']}",
            *(f"mx: {host['name']}" for host in settings["exchangers"]),
            "max_age: 604800",
        )
    )
    found = []
    for domain in domains:
        records = _domain_records(domain, settings, policy)
        if domain == domains[0]:
            records = _host_records(settings) + records
            # Where reports on another domain go, that must be agreed to (RFC 7489 section 7.1).
            records += [
                _record(
                    f"{other}._report._dmarc.{domain}", "TXT", txt("v=DMARC1"), "reports on other domains come here"
                )
                for other in domains[1:]
            ]
        found.append({"domain": domain, "policy": policy if settings["policy_addresses"] else "", "records": records})
    return found


def exchangers(hosts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return name, addresses and certificate (PEM) of each mail exchanger, from its variables of dns_records."""
    return [
        {
            "name": host["dns_records_name"],
            "addresses": list(host["dns_records_addresses"]),
            "certificate": base64.b64decode(host["__dns_records_certificate"]["content"]).decode(),
        }
        for host in hosts
    ]


def _record(name: str, kind: str, data: str, why: str) -> dict[str, str]:
    return {"name": name, "type": kind, "data": data, "why": why}


def _address_records(name: str, addresses: Iterable[str], why: str) -> list[dict[str, str]]:
    return [_record(name, "AAAA" if ":" in address else "A", address, why) for address in addresses]


def _host_records(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """Records of the hosts themselves, which stand in the main domain."""
    records = []
    authorities = [f'0 issue "{issuer}"' for issuer in settings["caa"]] or ['0 issue ";"']
    names = [settings["service_name"]]
    for host in settings["exchangers"]:
        name = host["name"]
        names += [name] if name not in names else []
        records += _address_records(name, host["addresses"], "mail exchanger")
        records.append(_record(name, "TXT", txt("v=spf1 a -all"), "bounces come from this name"))
        tlsa_data = dict.fromkeys([tlsa(host["certificate"]), *settings["more_tlsa"]])
        records += [_record(f"_25._tcp.{name}", "TLSA", data, "its key, for DANE (RFC 7672)") for data in tlsa_data]
    records += _address_records(settings["service_name"], settings["service_addresses"], "where officials connect")
    return records + [_record(name, "CAA", data, "who may certify it") for name in names for data in authorities]


def _domain_records(domain: str, settings: Mapping[str, Any], policy: str) -> list[dict[str, str]]:
    exchangers = settings["exchangers"]
    records = [_record(domain, "MX", f"10 {host['name']}.", "where mail goes") for host in exchangers]
    senders = [
        f"ip{6 if ':' in address else 4}:{address}"
        for address in dict.fromkeys(address for host in exchangers for address in host["addresses"])
    ]
    spf = " ".join(["v=spf1", *senders, *settings["spf_more"], "-all"])
    records.append(_record(domain, "TXT", txt(spf), "which hosts send mail of this domain, and no others (RFC 7208)"))
    for pem in settings["dkim_keys"]:
        name = f"{dkim_selector(pem)}._domainkey.{domain}"
        records.append(_record(name, "TXT", txt(dkim_record(pem)), "key that signs (RFC 6376)"))
    dmarc = f"v=DMARC1; p={settings['dmarc_policy']}; rua=mailto:{settings['reports']}"
    records.append(_record(f"_dmarc.{domain}", "TXT", txt(dmarc), "what receivers do with forged mail (RFC 7489)"))
    if settings["policy_addresses"]:
        identifier = hashlib.sha256(policy.encode()).hexdigest()[:16]
        records.append(
            _record(f"_mta-sts.{domain}", "TXT", txt(f"v=STSv1; id={identifier}"), "changes with the policy")
        )
        records += _address_records(f"mta-sts.{domain}", settings["policy_addresses"], "serves the policy (RFC 8461)")
    reports = txt(f"v=TLSRPTv1; rua=mailto:{settings['reports']}")
    records.append(_record(f"_smtp._tls.{domain}", "TXT", reports, "where failures of TLS are told (RFC 8460)"))
    for service, port, priority in SERVICES:
        data = f"{priority} 1 {port} {settings['service_name']}."
        records.append(_record(f"_{service}._tcp.{domain}", "SRV", data, "for mail programs"))
    return records + [_record(f"_{name}._tcp.{domain}", "SRV", "0 0 0 .", "not without TLS") for name in NOT_OFFERED]


def zone_text(zone: Mapping[str, Any], ttl: int = 3600) -> str:
    """Return a row of `mail_zones` as lines of a zone file with full names; `ttl` in seconds."""
    lines = [f"; Mail of {zone['domain']}: made by playbooks/dns-records.yml, to be pasted into the zone."]
    why = ""
    for record in zone["records"]:
        if record["why"] != why:
            why = record["why"]
            lines.append(f"; {why}")
        lines.append(f"{record['name']}. {ttl} IN {record['type']} {record['data']}")
    return "\n".join([*lines, ""])


# --- what is published -----------------------------------------------------------------------

# Kinds of TXT records that share a name with others, by how they begin.
VERSIONS = ("v=spf1", "v=DKIM1", "v=DMARC1", "v=STSv1", "v=TLSRPTv1")


def questions(zone: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what must be asked to judge a row of `mail_zones`: name and type, each once."""
    asked = dict.fromkeys((record["name"], record["type"]) for record in zone["records"])
    hosts = dict.fromkeys(name for name, kind in asked if kind in ("A", "AAAA"))
    return list(asked | {(name, kind): None for name in hosts for kind in ("A", "AAAA")})


def differences(
    zone: Mapping[str, Any], published: Mapping[tuple[str, str], Sequence[str]]
) -> tuple[list[str], list[str]]:
    """Return what is wrong and what is only to be tidied in the published records of a row of `mail_zones`.

    `published` has the answer to each of the row's `questions`: data as in a zone file. Every finding is one sentence.
    A mail exchanger that is not the province's own is among what is wrong (DL-10).
    """
    wrong: list[str] = []
    tidy: list[str] = []
    for name, kind in questions(zone):
        wanted = {_plain(kind, r["data"]) for r in zone["records"] if (r["name"], r["type"]) == (name, kind)}
        present = [_plain(kind, data) for data in published.get((name, kind), [])]
        if kind == "TXT":
            version = next(word for word in VERSIONS if next(iter(wanted)).startswith(word))
            present = [text for text in present if text.startswith(version) or "._domainkey." in name]
        missing, extra = sorted(wanted - set(present)), sorted(set(present) - wanted)
        if kind == "TXT" and len(present) > 1:
            wrong.append(
                f"{name} has {len(present)} TXT records of {version}, and receivers then take none: keep only"
                f" {_shown(next(iter(wanted)))}."
            )
        elif kind == "TXT" and missing and extra:
            wrong.append(f"{name} TXT is {_shown(extra[0])} and must be {_shown(missing[0])}.")
        elif kind == "MX":
            wrong += [f"{name} MX {data} is missing: add it." for data in missing]
            wrong += [
                f"{name} MX {data} is none of the province's mail exchangers, and mail goes there past its filters:"
                " remove it."
                for data in extra
            ]
        else:
            wrong += [f"{name} {kind} {_shown(data)} is missing: add it." for data in missing]
            # More keys than are used harm nobody; a rollover needs them for a while.
            (tidy if kind == "TLSA" else wrong).extend(
                f"{name} {kind} {_shown(data)} is published and not the kit's: remove it." for data in extra
            )
    return wrong, tidy


def _plain(kind: str, data: str) -> str:
    """Data of a record in one form: strings joined, spaces single, letters small where DNS does not tell them apart."""
    if kind == "TXT":
        joined = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', data)) if '"' in data else data
        return re.sub(r"\s*;\s*", "; ", joined.replace('\\"', '"').replace("\\\\", "\\")).strip(" ;")
    if kind in ("A", "AAAA"):
        return str(ip_address(data))
    if kind == "TLSA":
        words = data.lower().split()
        return " ".join([*words[:3], "".join(words[3:])])
    return " ".join(data.lower().split())


def _shown(data: str) -> str:
    return data if len(data) <= 90 else f"{data[:60]} … {data[-20:]}"


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {
            "dkim_keys": dkim_keys,
            "dkim_record": dkim_record,
            "dkim_selector": dkim_selector,
            "exchangers": exchangers,
            "mail_zones": mail_zones,
            "zone_text": zone_text,
        }
