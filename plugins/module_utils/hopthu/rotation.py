"""The secrets of a province: what is made, and how one takes the place of another without an outage. Pure.

A password or token: first a new one beside the old, which both are accepted (NAME, NAME_previous); when every host
works with the new one, the old one goes. The DKIM key: first the next one is published (NAME_next), then it signs and
the old one stays published for the mail that is under way (NAME_previous), then that one goes too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

TOKEN, KEY = "token", "rsa-2048"
ENTROPY = 24  # octets of a token
SITE = "run playbooks/site.yml, then this playbook again"

Specification = Mapping[str, Mapping[str, Any]]
"""Name of a secret to its kind (token when it has none), its group of rotation and its description."""


class RotationRefused(ValueError):
    """Why the next stage cannot be done yet; the message is one clear sentence."""


@dataclass(frozen=True)
class Stage:
    """What one call did: all secrets as they are now, one line for each that changed, what to run next."""

    secrets: dict[str, str]
    done: list[str]
    next: str


def make(kind: str) -> str:
    """Return a new secret of a kind: a token, or an RSA key of 2,048 bits (RFC 8301, 3.2) as PKCS#8 in PEM."""
    if kind == TOKEN:
        return secrets.token_urlsafe(ENTROPY)
    assert kind == KEY, kind
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def kind_of(specification: Specification, name: str) -> str:
    """Return the kind of a secret."""
    return str(specification[name].get("kind", TOKEN))


def missing(specification: Specification, present: Mapping[str, str]) -> dict[str, str]:
    """Return a new secret for each one that is not there."""
    return {name: make(kind_of(specification, name)) for name in specification if not present.get(name)}


def accompanying(specification: Specification) -> frozenset[str]:
    """Return the names that secrets have besides their own while they are rotated."""
    rotated = [name for name, entry in specification.items() if "rotate" in entry]
    return frozenset(
        [f"{name}_previous" for name in rotated]
        + [f"{name}_next" for name in rotated if kind_of(specification, name) == KEY]
    )


def fingerprint(specification: Specification, values: Mapping[str, Any]) -> str:
    """Return a digest that tells whether two places hold the same secrets, and nothing else of them.

    Every secret has 192 random bits, so it cannot be found by trying.
    """
    names = sorted([*specification, *accompanying(specification)])
    text = "\0".join(f"{name}\1{str(values.get(name) or '').strip()}" for name in names)
    return hmac.new(b"hopthu secrets", text.encode(), hashlib.sha256).hexdigest()


def rotate(
    specification: Specification, present: Mapping[str, str], groups: Collection[str], *, published: bool
) -> Stage:
    """Do the next stage of a rotation; begin one of `groups` when none is under way.

    `published` says that the DNS has the record of the next DKIM key.

    Raises RotationRefused when a secret is missing, no group of that name exists, or all that is under way waits for
    the DNS.
    """
    known = {str(entry["rotate"]) for entry in specification.values() if "rotate" in entry}
    if wrong := sorted(set(groups) - known):
        raise RotationRefused(f"rotate: there is no group {wrong[0]}: name some of {', '.join(sorted(known))}")
    if absent := [name for name in specification if not present.get(name)]:
        raise RotationRefused(f"{absent[0]} is missing: run playbooks/secrets.yml and playbooks/site.yml first")
    now, done = dict(present), []
    under_way = [name for name in accompanying(specification) if present.get(name)]
    if not under_way:
        for name, entry in specification.items():
            if entry.get("rotate") not in groups:
                continue
            if kind_of(specification, name) == KEY:
                now[f"{name}_next"] = make(KEY)
                done.append(f"{name}: the next one is made")
            else:
                now[f"{name}_previous"], now[name] = present[name], make(TOKEN)
                done.append(f"{name}: a new one is made, the previous one is still accepted")
    waiting = False
    for extra in sorted(under_way):
        name = extra.removesuffix("_previous").removesuffix("_next")
        if extra.endswith("_previous"):
            del now[extra]
            done.append(f"{name}: the previous one is dropped")
        elif published:
            now[f"{name}_previous"], now[name] = present[name], now.pop(extra)
            done.append(f"{name}: the next one signs, the previous one stays published")
        else:
            waiting = True
    if waiting and not done:
        raise RotationRefused(
            "the next DKIM key waits for the DNS: publish what playbooks/dns-records.yml prints and, when its --check "
            "finds it there, run this playbook again with -e dkim_published=true"
        )
    return Stage(now, done, _next(now, specification))


def _next(now: Mapping[str, str], specification: Specification) -> str:
    """Return what to run after a stage."""
    names = [name for name in accompanying(specification) if now.get(name)]
    if any(name.endswith("_next") for name in names):
        return (
            "run playbooks/site.yml, publish the DKIM record that playbooks/dns-records.yml prints and, when its "
            "--check finds it in the DNS, run this playbook again with -e dkim_published=true"
        )
    keys = [name for name in names if kind_of(specification, name.removesuffix("_previous")) == KEY]
    if keys:
        return (
            "run playbooks/site.yml and, a week later, when no mail is under way that the previous DKIM key has "
            "signed, this playbook again"
        )
    return SITE if names else "run playbooks/site.yml; then the rotation is finished"
