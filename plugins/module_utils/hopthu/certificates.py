"""Certificates of mailbox holders (S/MIME; HT-4.2g, N-TT39-4.1) between PEM files and LDAP. Runs on the controller."""

from __future__ import annotations

import base64
import textwrap
from collections.abc import Collection
from datetime import date
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from .files import short

ATTRIBUTE = "userCertificate;binary"
"""Holds DER; the engine handles it as base64, like all text."""


class CertificateRefused(ValueError):
    """Why a certificate cannot be taken; the message is one clear sentence."""


def read(path: Path, name: str, addresses: Collection[str], today: date) -> tuple[str, str]:
    """Return a certificate as base64 of its DER form, and a warning ("" for none) when its time is over.

    `path` is a PEM file, called `name` in sentences; `addresses` are those of the mailbox, in lower case.

    Raises CertificateRefused when it cannot be read, is no certificate, or is for none of the addresses.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        names = _addresses(certificate)
    except OSError as error:
        reason = (error.strerror or "unreadable").lower()
        raise CertificateRefused(f"{name} cannot be read ({reason}): put the certificate there") from None
    except (ValueError, x509.UnsupportedGeneralNameType, x509.DuplicateExtension):
        raise CertificateRefused(f"{name} is no X.509 certificate in PEM form: export it anew") from None
    if not names & set(addresses):
        held = ", ".join(sorted(map(short, names))) or "no address"
        raise CertificateRefused(f"{name} is a certificate of {held}, not of this mailbox: get one for its address")
    end = certificate.not_valid_after_utc.date()
    over = f"{name} has expired on {end}: replace it, or take it out" if end < today else ""
    return base64.b64encode(certificate.public_bytes(Encoding.DER)).decode(), over


def _addresses(certificate: x509.Certificate) -> set[str]:
    """Return the mail addresses that a certificate is for, in lower case (RFC 8550, 3)."""
    subject = certificate.subject.get_attributes_for_oid(x509.NameOID.EMAIL_ADDRESS)
    found = {str(attribute.value).lower() for attribute in subject}
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return found
    return found | {address.lower() for address in names.get_values_for_type(x509.RFC822Name)}


def pem(text: str) -> str:
    """Return the PEM form of what `read` gave."""
    return f"-----BEGIN CERTIFICATE-----\n{textwrap.fill(text, 64)}\n-----END CERTIFICATE-----\n"
