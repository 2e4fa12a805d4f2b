"""The world outside a lab's province: its domains with their keys and zones, and the host that serves them."""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import jinja2
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

import files
import hosts
import machine
from hosts import Lab, Subnets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "plugins" / "filter"))
from mail_dns import dkim_record, dkim_selector, tlsa, txt

HOST = "outside"
DOMAIN = "ben-ngoai.example"  # a correspondent who does everything right: DANE, DKIM, DMARC, MTA-STS
FORGED = "co-quan-khac.example"  # an office that sends no mail from here and whose name others misuse
STS_ONLY = "tam-thoi.example"  # its zone is not signed: MTA-STS without DANE
BOGUS = "sai-chu-ky.example"  # its signatures do not fit the trust anchor that the province's hosts have
SILENT = "chua-khai-bao.example"  # says nothing about who may send for it, as most domains do
UNSIGNED = (STS_ONLY, SILENT)
PACKAGES = ("knot", "unbound", "postfix", "nginx-light", "pebble", "ssl-cert")
UNITS = ("knot", "unbound", "postfix", "nginx", "pebble")
MAIL_FOLDER = "/var/mail/outside"
# Made from the keys of the zones, so last.
RESOLVER = "etc/unbound/unbound.conf"


@dataclass(frozen=True)
class _File:
    """A file on the host: its text, who has it, its mode; a folder when the text is None."""

    text: str | None
    owner: str = "root"
    mode: int = 0o644


def folder(lab: Lab) -> Path:
    """Folder of the outside world's keys and certificates."""
    return lab.build / "outside"


def result(lab: Lab, addresses: list[str]) -> dict[str, Any]:
    """What lab.json says of the outside world: names, addresses, and where its keys and its mail lie."""
    return {
        "name": f"mail.{DOMAIN}",
        "domain": DOMAIN,
        "domains": {"correspondent": DOMAIN, "forged": FORGED, "sts_only": STS_ONLY, "silent": SILENT, "bogus": BOGUS},
        "addresses": {"v4": addresses[0], "v6": addresses[1]},
        "container": lab.container(HOST),
        "ssh_host": HOST,
        "maildir": f"{MAIL_FOLDER}/inbox",
        "ca_file": str(folder(lab) / "ca.pem"),
        "acme_directory": f"https://acme.{DOMAIN}:14000/dir",
        "dkim": {
            domain: {"selector": dkim_selector(path.read_text(encoding="ascii")), "key_file": str(path)}
            for domain in (DOMAIN, FORGED, STS_ONLY)
            for path in [folder(lab) / f"dkim-{domain}.pem"]
        },
    }


def ensure(
    lab: Lab, subnets: Subnets, province: Path, addresses: dict[str, list[str]], resolvers: list[str]
) -> list[dict[str, Any]]:
    """Make the host serve the world outside, and return its zones as the role unbound takes them.

    `addresses` are those of all hosts of the lab by name, this one included; names that are not of the zones are
    asked of `resolvers`. Keys and certificates stay what they are, and a daemon runs on when its files do.
    """
    policy = files.read_yaml(province / "directory" / "policy.yml", lab)
    domains = [str(policy["domain"]), *(str(entry["domain"]) for entry in policy.get("alias_domains") or [])]
    own = addresses[HOST]
    _ensure_keys(lab, domains, own)
    zones = _zones(lab, subnets, province, domains, addresses)
    _install(lab)
    _put(lab, "settings", _settings(lab, subnets, own, list(zones)), ("knot", "postfix", "nginx", "pebble"))
    _put(lab, "zones", {**_zone_files(zones), **_policies(lab, domains)})
    _inside(lab, "knotc", "zone-reload", failure="The zones outside could not be loaded")
    anchors = _anchors(lab, zones)
    text = _template(lab, RESOLVER, addresses=own, anchors=anchors, resolvers=resolvers)
    resolver = {RESOLVER: _File(text), "etc/resolv.conf": _File("nameserver 127.0.0.1\noptions trust-ad\n")}
    # A resolver that starts anew has forgotten the zones as they were before; Postfix has a copy of resolv.conf.
    _put(lab, "resolver", resolver, ("unbound", "postfix"))
    _inside(lab, "unbound-control", "reload", failure="The resolver outside could not be emptied")
    # The bogus zone's signatures are sound: the province's hosts are given the anchor of another zone's key.
    anchors[BOGUS] = [line.replace(DOMAIN, BOGUS) for line in anchors[DOMAIN]]
    return [
        {"name": zone, "addresses": own, **({"trust_anchors": keys} if keys else {"insecure": True})}
        for zone, keys in anchors.items()
    ]


# --- keys and certificates -------------------------------------------------------------------


_AUTHORITY: list[tuple[x509.ExtensionType, bool]] = [
    (x509.BasicConstraints(ca=True, path_length=0), True),
    (x509.KeyUsage(False, False, False, False, False, True, True, False, False), True),
]


def _pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def _ensure_keys(lab: Lab, domains: list[str], addresses: list[str]) -> None:
    """Make what is missing of the DKIM keys and the certificates; the server's serves the province's policies too."""
    target = folder(lab)
    target.mkdir(mode=0o700, exist_ok=True)
    for domain in (DOMAIN, FORGED, STS_ONLY):
        if not (target / f"dkim-{domain}.pem").exists():
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            files.write_private(target / f"dkim-{domain}.pem", _pem(key))
    names = [f"mail.{DOMAIN}", f"acme.{DOMAIN}", *(f"mail.{domain}" for domain in (FORGED, STS_ONLY))]
    _ensure_certificates(target, names + [f"mta-sts.{domain}" for domain in (DOMAIN, STS_ONLY, *domains)], addresses)


def _ensure_certificates(target: Path, names: list[str], addresses: list[str]) -> None:
    """Make the outside authority, its server's certificate and one of an authority that nobody trusts."""
    wanted = x509.SubjectAlternativeName(
        [x509.DNSName(name) for name in names] + [x509.IPAddress(ip_address(address)) for address in addresses]
    )
    present = target / "server.pem"
    if present.exists():
        certificate = x509.load_pem_x509_certificate(present.read_bytes())
        if certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == wanted:
            return
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "CA of the world outside the lab")])
    root = _certificate(issuer, issuer, authority, authority, _AUTHORITY)
    (target / "ca.pem").write_bytes(root)
    for name, signer in (("server", authority), ("wrong", ec.generate_private_key(ec.SECP256R1()))):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        issued = _certificate(subject, issuer, key, signer, [(wanted, False)])
        files.write_private(target / f"{name}-key.pem", _pem(key))
        (target / f"{name}.pem").write_bytes(issued)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extensions: list[tuple[x509.ExtensionType, bool]],
) -> bytes:
    """A certificate for ten years, PEM."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=3650))
    identifiers: list[tuple[x509.ExtensionType, bool]] = [
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False),
    ]
    for extension, critical in [*extensions, *identifiers]:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


# --- zones -----------------------------------------------------------------------------------


def _zones(
    lab: Lab, subnets: Subnets, province: Path, domains: list[str], addresses: dict[str, list[str]]
) -> dict[str, list[str]]:
    """Every zone that the world outside serves → its records besides SOA and NS."""
    own = addresses[HOST]
    zones = {domain: _correspondent(lab, domain, own) for domain in (DOMAIN, FORGED, STS_ONLY)}
    zones[DOMAIN] += _addresses("ns", own) + _addresses("acme", own) + _addresses("client", subnets.gateway)
    zones[BOGUS] = _addresses("@", own) + _addresses("mail", own) + ["@ MX 10 mail"]
    zones[SILENT] = [*_addresses("mail", own), "@ MX 10 mail"]
    for domain in domains:
        printed = lab.build / "dns" / f"{domain}.zone"
        zones[domain] = (
            printed.read_text(encoding="utf-8").splitlines()
            if printed.exists()
            else _province(lab, domain, domains[0], province, addresses)
        )
    return zones | _reverse(subnets, addresses, domains[0])


def _zone_files(zones: dict[str, list[str]]) -> dict[str, _File]:
    found = {"var/lib/knot/zones": _File(None, "knot", 0o755)}
    for zone, records in zones.items():
        head = [f"$ORIGIN {zone}.", "$TTL 5", f"@ SOA ns.{DOMAIN}. hostmaster.{DOMAIN}. 1 3600 600 604800 5"]
        text = "\n".join([*head, f"@ NS ns.{DOMAIN}.", *records])
        found[f"var/lib/knot/zones/{zone}.zone"] = _File(f"{text}\n", "knot")
    return found


def _policies(lab: Lab, domains: list[str]) -> dict[str, _File]:
    """The MTA-STS policies (RFC 8461 section 3.2) of the correspondents, and of the province once it has one."""
    texts = {
        domain: f"version: STSv1\nmode: enforce\nmx: mail.{domain}\nmax_age: 604800\n" for domain in (DOMAIN, STS_ONLY)
    }
    for domain in domains:
        printed = lab.build / "dns" / f"{domain}.mta-sts.txt"
        if printed.exists():
            texts[domain] = printed.read_text(encoding="ascii")
    return {f"srv/policies/mta-sts.{domain}.txt": _File(text) for domain, text in texts.items()}


def _addresses(name: str, addresses: list[str]) -> list[str]:
    return [f"{name} {'AAAA' if ':' in address else 'A'} {address}" for address in addresses]


def _correspondent(lab: Lab, domain: str, own: list[str]) -> list[str]:
    """Records of a domain outside: its mail exchanger and what receivers check of its mail."""
    key = (folder(lab) / f"dkim-{domain}.pem").read_text(encoding="ascii")
    senders = " ".join(f"ip{6 if ':' in address else 4}:{address}" for address in own)
    records = [
        "@ MX 10 mail",
        *_addresses("mail", own),
        f"@ TXT {txt('v=spf1 -all' if domain == FORGED else f'v=spf1 {senders} -all')}",
        f"{dkim_selector(key)}._domainkey TXT {txt(dkim_record(key))}",
        f"_dmarc TXT {txt('v=DMARC1; p=reject; adkim=s; aspf=s')}",
    ]
    if domain != STS_ONLY:
        certificate = (folder(lab) / "server.pem").read_text(encoding="ascii")
        records.append(f"_25._tcp.mail TLSA {tlsa(certificate)}")
    if domain != FORGED:
        records += [*_addresses("mta-sts", own), f"_mta-sts TXT {txt('v=STSv1; id=20260101;')}"]
        records.append(f"_smtp._tls TXT {txt(f'v=TLSRPTv1; rua=mailto:tls@{domain}')}")
    return records


def _province(lab: Lab, domain: str, main: str, province: Path, addresses: dict[str, list[str]]) -> list[str]:
    """What a province's domain has before its administrators publish their records: where its mail goes."""
    membership = files.groups(files.province_tree(province, lab))
    records = [f"@ MX 10 {host}.{main}." for host, groups in membership.items() if "mx" in groups]
    if domain == main:
        service = next((host for host, groups in membership.items() if "directory" in groups), next(iter(membership)))
        for host in membership:
            records += _addresses(host, addresses[host])
        records += _addresses("mail", addresses[service])
    return records


def _reverse(subnets: Subnets, addresses: dict[str, list[str]], domain: str) -> dict[str, list[str]]:
    """The reverse zones of the lab's networks, on a boundary of whole octets and nibbles."""
    names = {name: f"{name}.{domain}." for name in addresses} | {HOST: f"mail.{DOMAIN}."}
    known = {address: names[name] for name, pair in addresses.items() for address in pair}
    known |= {address: f"client.{DOMAIN}." for address in subnets.gateway}
    zones: dict[str, list[str]] = {}
    for network, bits in ((subnets.v4, 8), (subnets.v6, 4)):
        zone = _reverse_zone(network, bits)
        zones[zone] = [
            f"{ip_address(address).reverse_pointer}. PTR {name}"
            for address, name in known.items()
            if ip_address(address) in network
        ]
    return zones


def _reverse_zone(network: IPv4Network | IPv6Network, bits: int) -> str:
    labels = network.network_address.reverse_pointer.split(".")
    return ".".join(labels[-(network.prefixlen // bits + 2) :])


# --- the host --------------------------------------------------------------------------------


def _inside(lab: Lab, *command: str, failure: str, stdin: bytes = b"") -> str:
    return hosts.podman("exec", "-i", lab.container(HOST), *command, failure=failure, stdin=stdin)


def _install(lab: Lab) -> None:
    query = ["podman", "exec", lab.container(HOST), "dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n"]
    listed = machine.attempt([*query, *PACKAGES]).stdout.splitlines()
    if all(f"{name} installed" in listed for name in PACKAGES):
        return
    failure = "What serves the world outside could not be installed"
    for words in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        _inside(lab, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *words, failure=failure)


def _template(lab: Lab, name: str, **values: Any) -> str:
    loader = jinja2.FileSystemLoader(lab.checkout / "lab" / "templates")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(f"{name}.j2").render(values) + "\n"


def _settings(lab: Lab, subnets: Subnets, own: list[str], zones: list[str]) -> dict[str, _File]:
    """The configuration of the daemons on the host, with their certificates, by path."""
    values = {
        "addresses": own,
        "clients": subnets.gateway,
        "domains": [DOMAIN, FORGED, STS_ONLY, SILENT],
        "zones": [{"name": zone, "signed": zone not in UNSIGNED} for zone in zones],
        "mail_folder": MAIL_FOLDER,
    }
    templates = lab.checkout / "lab" / "templates"
    names = [str(path.relative_to(templates).with_suffix("")) for path in sorted(templates.rglob("*.j2"))]
    found = {name: _File(_template(lab, name, **values)) for name in names if name != RESOLVER}
    for name in ("ca.pem", "server.pem", "wrong.pem"):
        found[f"etc/ssl/outside/{name}"] = _File((folder(lab) / name).read_text(encoding="ascii"))
    for name in ("server-key.pem", "wrong-key.pem"):
        key = (folder(lab) / name).read_text(encoding="ascii")
        found[f"etc/ssl/outside/{name}"] = _File(key, "ssl-cert", 0o640)
    found[MAIL_FOLDER[1:]] = _File(None, "mail", 0o755)
    return found


def _put(lab: Lab, name: str, tree: dict[str, _File], units: tuple[str, ...] = ()) -> None:
    """Put files on the host; when one of them differs from the last time, restart `units`, which start at any rate."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path, file in tree.items():
            entry = tarfile.TarInfo(path)
            entry.mode, entry.gname = file.mode, file.owner
            entry.uname = "root" if file.owner == "ssl-cert" else file.owner
            content = (file.text or "").encode()
            entry.size = len(content)
            if file.text is None:
                entry.type = tarfile.DIRTYPE
            tar.addfile(entry, io.BytesIO(content))
    data = stream.getvalue()
    mark, digest = f"/var/lib/{name}.digest", hashlib.sha256(data).hexdigest()
    run = [f"systemctl enable -q {' '.join(units)}", f"systemctl $verb {' '.join(units)}"] if units else []
    script = [
        "set -e",
        "tar -xf - -C / --same-owner",
        f'verb=start; [ "$(cat {mark} 2>/dev/null)" = {digest} ] || {{ verb=restart; systemctl daemon-reload; }}',
        *run,
        f"echo {digest} >{mark}",
    ]
    failure = f"The {name} of the world outside could not be put in place"
    _inside(lab, "sh", "-c", "\n".join(script), failure=failure, stdin=data)


def _anchors(lab: Lab, zones: Iterable[str]) -> dict[str, list[str]]:
    """Zone → the DS records of its key with SHA-256, which every validator knows; none for one that is not signed."""
    anchors: dict[str, list[str]] = {zone: [] for zone in zones}
    signed = " ".join(zone for zone in anchors if zone not in UNSIGNED)
    script = f"for zone in {signed}; do keymgr $zone ds || exit; done"
    for line in _inside(lab, "sh", "-c", script, failure="The keys of the zones could not be read").splitlines():
        words = line.split()
        if words[4] == "2":
            anchors[words[0].rstrip(".")].append(f"{words[0]} DS {' '.join(words[2:])}")
    return anchors
