"""Initial passwords, made from one random key for a whole run; the hashes by which slapd knows a password."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

KEY_OCTETS = 32

_SCHEME = b"{SSHA512}"
_LETTERS = b"abcdefghjkmnpqrstuvwxyz23456789"  # without those that look alike on paper
# Octet → letter; the eight octets that are left over would make some letters more frequent, and are dropped.
_LETTER = bytes(_LETTERS[octet % len(_LETTERS)] for octet in range(256))
_UNEVEN = bytes(range(256 - 256 % len(_LETTERS), 256))


def initial_password(key: bytes, identity: str) -> str:
    """Return the initial password of a mailbox id: 20 of 31 letters, 99 bits, in groups that can be typed.

    The same key and id give the same password on the controller, which prints it, and on the host, which hashes
    it; the key is random for each run and forgotten once the slips are finished.
    """
    octets = hashlib.blake2b(identity.encode(), key=key, digest_size=64).digest()
    text = octets.translate(_LETTER, _UNEVEN).decode()
    return f"{text[:5]}-{text[5:10]}-{text[10:15]}-{text[15:20]}"


def ssha512(password: str) -> str:
    """Return the salted SHA-512 hash that slapd's pw-sha2 verifies.

    A fast hash is enough for a long random password that must be changed at first use.
    """
    salt = os.urandom(16)
    digest = hashlib.sha512(password.encode() + salt).digest()
    return _SCHEME.decode() + base64.b64encode(digest + salt).decode()


def accepted(given: str | list[str]) -> list[str]:
    """Return the passwords that an identity shall have, each once, without empty ones; `given` is one or a list."""
    return [word for word in dict.fromkeys([given] if isinstance(given, str) else given) if word]


def differences(stored: list[bytes], words: list[str]) -> tuple[list[str], list[bytes]]:
    """Compare the hashes that an entry holds with the passwords that it shall take, and no others.

    Return the passwords that no hash is of, and the hashes to be removed: those of other passwords, of a kind that
    `ssha512` does not make, and second ones of the same password.
    """
    missing, unwanted = list(words), []
    for hashed in stored:
        word = next((word for word in missing if _is_of(hashed, word)), None)
        if word is None:
            unwanted.append(hashed)
        else:
            missing.remove(word)
    return missing, unwanted


def _is_of(hashed: bytes, word: str) -> bool:
    scheme, raw = hashed[: len(_SCHEME)], hashed[len(_SCHEME) :]
    if scheme != _SCHEME:
        return False
    try:
        octets = base64.b64decode(raw, validate=True)
    except ValueError:
        return False
    return hmac.compare_digest(hashlib.sha512(word.encode() + octets[64:]).digest(), octets[:64])
