"""Filter that makes Corosync's key."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

# Corosync takes 128 to 4,096 octets.
OCTETS = 256


def corosync_key(secret: str) -> str:
    """Return the key file's text for a secret: as random as the secret, long enough for Corosync.

    >>> corosync_key("abc") == corosync_key("abc") != corosync_key("abd")
    True
    """
    return hashlib.shake_256(b"hopthu corosync key\0" + secret.encode()).hexdigest(OCTETS // 2)


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"corosync_key": corosync_key}
