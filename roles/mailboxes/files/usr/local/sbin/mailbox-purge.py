#!/usr/bin/python3
"""mailbox-purge: remove what purged mailboxes have left on this host, in the mail store and in the copy for backups.

    mailbox-purge             remove it, a line for each
    mailbox-purge --check     only tell

A mailbox goes only when it has a tombstone and no entry: an empty or unreachable directory deletes nothing.
0 when it is done, 1 when the directory does not let it be known, 3 when this host has not been set up yet.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/hopthu/mailboxes.json")
# Below the mail store's folder: hard links to the mail, and what a backup says of it.
COPIES, CATALOGUES = ".backup/mailboxes", ".backup/catalogue"
BATCH = 200  # names in one question to the directory
NOT_SET_UP = 3
IDENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as inventories/schema/common.schema.json has it


def homes(root: Path) -> dict[str, list[Path]]:
    """Return the folders and files that belong to a mailbox id."""
    found: dict[str, list[Path]] = {}
    for folder in (root, root / COPIES):
        for path in folder.iterdir() if folder.is_dir() else ():
            if IDENT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                found.setdefault(path.name, []).append(path)
    for path in (root / CATALOGUES).glob("*.jsonl"):
        if IDENT.fullmatch(path.stem):
            found.setdefault(path.stem, []).append(path)
    return found


def directory(settings: dict[str, Any]) -> Any:
    """Return a session with the directory, as Dovecot's own identity."""
    import ldap  # not on the controller, where this is tested

    connection = ldap.initialize(" ".join(settings["uris"]))
    connection.set_option(ldap.OPT_NETWORK_TIMEOUT, 10)
    connection.set_option(ldap.OPT_TIMEOUT, 60)
    connection.set_option(ldap.OPT_X_TLS_CACERTFILE, settings["tls_ca_file"])
    connection.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
    connection.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
    connection.simple_bind_s(settings["dn"], settings["password"])
    return connection


def named(connection: Any, where: str, about: str, names: set[str]) -> set[str]:
    """Return which of `names` (ids, in lower case) have an entry of the class `about` below `where`."""
    found = set()
    ordered = sorted(names)
    for start in range(0, len(ordered), BATCH):
        which = "".join(f"(uid={name})" for name in ordered[start : start + BATCH])
        rows = connection.search_s(where, 2, f"(&(objectClass={about})(|{which}))", ["uid"])
        found |= {values["uid"][0].decode().lower() for dn, values in rows if dn is not None}
    return found


def due(connection: Any, base: str, found: dict[str, list[Path]]) -> Iterator[tuple[str, list[Path]]]:
    """Yield the ids of purged mailboxes of which something is here, with what it is."""
    released = named(connection, f"ou=released,{base}", "hopThuReleased", {name.lower() for name in found})
    # A run that was killed between the two has left the tombstone and the mailbox; the next one removes the mailbox.
    released -= named(connection, base, "hopThuMailbox", released)
    yield from ((name, paths) for name, paths in sorted(found.items()) if name.lower() in released)


def main() -> int:
    """Entry point."""
    try:
        settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
        connection = directory(settings)
    except FileNotFoundError:
        print(f"mailbox-purge: {SETTINGS} is not there: run playbooks/site.yml first.", file=sys.stderr)
        return NOT_SET_UP
    except Exception as error:  # python-ldap's, which is imported late
        print(f"mailbox-purge: the directory does not answer ({error}): start slapd.", file=sys.stderr)
        return 1
    for identity, paths in due(connection, settings["base"], homes(Path(settings["mail_root"]))):
        for path in paths if "--check" not in sys.argv[1:] else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{identity}: content removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
