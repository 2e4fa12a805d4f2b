"""What two copies of a tree say of each other: how new each is, and what a host may do with its own. Pure.

A contextCSN has one value for each provider that ever wrote: 20261126101542.108344Z#000000#001#000000, time, count,
number of the provider (hexadecimal), modification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

Stamps = Mapping[str, str]
"""Number of a provider, three hexadecimal digits, to the newest change of its that a copy has."""

ABSENT, SILENT = "absent", "silent"


def stamps(values: Iterable[bytes]) -> dict[str, str]:
    """Return the newest change of each provider from the values of a contextCSN."""
    found: dict[str, str] = {}
    for value in values:
        csn = value.decode("ascii")
        number = csn.split("#")[2]
        found[number] = max(csn, found.get(number, ""))
    return found


def covers(mine: Stamps, theirs: Stamps) -> bool:
    """Tell whether a copy has all changes that another one had. One without any stamp is not whole yet."""
    return bool(mine) and all(mine.get(number, "") >= csn for number, csn in theirs.items())


def next_step(
    mine: Stamps | None, peers: Mapping[str, Stamps | str], *, writer: bool, alone: bool
) -> tuple[Literal["write", "copy", "wait", "refuse"], str]:
    """Say what a host may do with its copy of the tree, and why not more; with copy, from which peer.

    `mine` is None when the host has no tree, and empty while one is coming in. `peers` maps each peer to its stamps, or
    to ABSENT (it answers and has no tree) or SILENT. The writer is the one host that writes the fixed part of the tree;
    the others wait for it. `alone`: peers that are silent do not come back, and no tree of theirs is to be waited for.

    An empty host never makes a tree while a peer has one or may have one: its newer stamps would have the peer remove
    everything.
    """
    for peer, state in sorted(peers.items()):
        if isinstance(state, str):
            continue
        if not mine and state:
            return "copy", peer
        if not mine:
            return "wait", f"{peer} does not know the identity under which its tree is copied"
        if not covers(mine, state):
            return "wait", f"what {peer} has written has not come"
    if mine is not None and not mine:
        return "wait", "the tree has come in part, and no peer has the rest"
    if mine is None:
        if not writer:
            return "wait", "the host that makes the tree has not made it"
        silent = sorted(peer for peer, state in peers.items() if state == SILENT)
        if silent and not alone:
            return "refuse", f"this host has no tree, and {silent[0]}, which may have one, does not answer"
    return "write", ""
