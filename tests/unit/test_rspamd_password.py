"""The hash of the password of the filter's page."""

from __future__ import annotations

import pytest
from rspamd import ALPHABET, derived_key, rspamd_password


def octets(text: str, size: int) -> bytes:
    """What Rspamd's base 32 stands for."""
    return sum(ALPHABET.index(letter) << 5 * place for place, letter in enumerate(text)).to_bytes(size, "little")


def test_key_is_the_one_that_rspamadm_derives() -> None:
    """Line made by `rspamadm pw -e -t pbkdf2 -p abcdefgh`, Rspamd 3.12.1."""
    line = "$1$6knbbm5rhd5tshe333a7rhuziocn9d5s$85fkenpdezgs3wm9qzc6sjbwx1k3ksnane33ocigjfh8d1af5xpb"
    salt, key = line.split("$")[2:]
    assert derived_key("abcdefgh", octets(salt, 20)) == octets(key, 32)


@pytest.mark.parametrize("password", ["abcdefgh", "Mật khẩu", "x" * 80])
def test_same_password_same_line(password: str) -> None:
    line = rspamd_password(password)
    kind, salt, key = line.split("$")[1:]
    assert line == rspamd_password(password)
    assert (kind, len(salt), len(key)) == ("1", 32, 52)
    assert octets(key, 32) == derived_key(password, octets(salt, 20))
