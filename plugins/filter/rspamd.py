"""Filters of the rspamd role."""

from __future__ import annotations

import hashlib

DOCUMENTATION = r"""
name: rspamd_password
short_description: Hash of a password in the form of C(rspamadm pw)
description:
  - PBKDF2 with keyed BLAKE2b, 16000 rounds, as Rspamd's controller checks it. The salt is derived from the password,
    so that the same password gives the same line at each run, and no clear password has to be given to a command.
options:
  _input:
    description: The password.
    type: str
    required: true
"""

EXAMPLES = r"""
- ansible.builtin.debug:
    msg: password = "{{ rspamd_controller_password | rspamd_password }}";
"""

RETURN = r"""
_value:
  description: C($1$SALT$KEY).
  type: str
"""

ROUNDS = 16000
ALPHABET = "ybndrfg8ejkmcpqxot1uwisza345h769"


def rspamd_password(password: str) -> str:
    """Hash of a password as Rspamd's controller reads it, `$1$SALT$KEY`; the same at each call.

    A salt keeps equal passwords of several people apart and tables from being made beforehand. There is one password
    here, and a salt derived from it does the latter too, as long as the password itself is random.
    """
    salt = hashlib.blake2b(password.encode(), digest_size=20, person=b"hopthu rspamd").digest()
    return f"$1${_base32(salt)}${_base32(derived_key(password, salt))}"


def derived_key(password: str, salt: bytes) -> bytes:
    """Key of 32 octets that Rspamd derives from a password with a salt of 20."""
    # A key of BLAKE2b is at most 64 octets; Rspamd hashes a longer one first.
    key = password.encode()
    key = hashlib.blake2b(key).digest() if len(key) > 64 else key
    block = hashlib.blake2b(salt + (1).to_bytes(4, "big"), key=key).digest()
    result = int.from_bytes(block, "big")
    for _ in range(ROUNDS - 1):
        block = hashlib.blake2b(block, key=key).digest()
        result ^= int.from_bytes(block, "big")
    return result.to_bytes(64, "big")[:32]


def _base32(data: bytes) -> str:
    """Rspamd's base 32: five bits at a time, the lowest first."""
    number = int.from_bytes(data, "little")
    return "".join(ALPHABET[number >> bit & 31] for bit in range(0, 8 * len(data), 5))


class FilterModule:
    """The filters by name."""

    def filters(self) -> dict[str, object]:
        """Name → function."""
        return {"rspamd_password": rspamd_password}
