"""Initial passwords: made from one random key for a whole run, and their hashes for slapd."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os

KEY_OCTETS = 32

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look alike on paper


def initial_password(key: bytes, identity: str) -> str:
    """Return the initial password of a mailbox id: 20 of 31 letters, 99 bits, in groups that can be typed.

    The same key and id give the same password on the controller, which prints it, and on the host, which hashes
    it; the key is random for each run and forgotten once the slips are finished.
    """
    number = int.from_bytes(hmac.digest(key, identity.encode(), "sha256"))
    letters = ""
    for _ in range(20):
        number, index = divmod(number, len(_LETTERS))
        letters += _LETTERS[index]
    return "-".join(letters[start : start + 5] for start in range(0, 20, 5))


def ssha512(password: str) -> str:
    """Return the salted SHA-512 hash that slapd's pw-sha2 verifies.

    A fast hash is enough for a long random password that must be changed at first use.
    """
    salt = os.urandom(16)
    digest = hashlib.sha512(password.encode() + salt).digest()
    return "{SSHA512}" + base64.b64encode(digest + salt).decode()
