"""What the role has written for the programs: where the repositories are, what belongs into them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIENT = Path("/etc/mail-backup/settings.json")
SERVER = Path("/etc/mail-backup/server.json")


@dataclass(frozen=True)
class Repository:
    """A restic repository. Secrets are in files that root alone reads; none is ever an argument or printed."""

    name: str  # for people: the host that keeps it
    shown: str  # restic's URL or a path, without a password
    password_file: str  # the key
    location_file: str = ""  # what is shown, with the password; none where it needs none
    environment_file: str = ""  # lines NAME=VALUE that restic needs besides, such as an S3 key
    ca_file: str = ""  # the authority of its certificate; the host's own when empty
    pruned: bool = False  # a further one: whether the kit removes old snapshots there
    options: tuple[str, ...] = ()  # restic's --option values, such as sftp.command

    @classmethod
    def read(cls, content: dict[str, Any]) -> Repository:
        """Make one of what settings.json says; raises TypeError for an unknown or missing field."""
        return cls(**{**content, "options": tuple(content.get("options", ()))})


@dataclass(frozen=True)
class Settings:
    """/etc/mail-backup/settings.json of a host that is backed up; meta/argument_specs.yml of the role explains it."""

    domain: str  # restic's --host of the tags mail and directory
    host: str  # the inventory's name of this host: restic's --host of the tag host
    repository: Repository
    mail_root: str = ""  # empty where no mail is kept
    base_dn: str = ""  # suffix of the directory; empty where slapd does not run
    target: str = "holder.target"  # active on the one host that backs up mail and directory
    files: tuple[str, ...] = ()  # what the tag host has; what does not exist is left out
    upload_kib: int = 0  # KiB/s; 0 is no limit
    download_kib: int = 0
    lock_seconds: int = 900  # how long a run waits for another one that holds the repository
    max_age_hours: dict[str, float] = field(default_factory=dict)  # tag → age of its newest snapshot that is an alarm
    state: str = "/var/lib/mail-backup"
    cache: str = "/var/cache/mail-backup"

    @property
    def tree(self) -> Path:
        """The link tree, on the mail store's own file system."""
        return Path(self.mail_root, ".backup")


@dataclass(frozen=True)
class Server:
    """/etc/mail-backup/server.json of the host that keeps the repository."""

    domain: str
    repository: Repository  # straight on the disk
    folder: str  # the repository's path
    keep: dict[str, str] = field(default_factory=dict)  # restic's --keep-NAME → duration; kinds of `within` only
    tags: dict[str, list[str]] = field(default_factory=dict)  # tag → the --host values that must have it
    max_age_hours: dict[str, float] = field(default_factory=dict)
    reserve_octets: int = 0  # what must stay free on the disk
    max_octets: int = 0  # what the repository may take; 0 is no limit
    check_part: str = "1/28"  # how much of all packs a check reads: one of so many parts, another each day
    stale_hours: float = 2
    further: tuple[Repository, ...] = ()  # copies are made there
    upload_kib: int = 0
    user: str = "restic-rest-server"
    state: str = "/var/lib/backup-server"
    cache: str = "/var/cache/backup-server"


def load(path: Path = CLIENT) -> Settings:
    """Read a client's settings; OSError, ValueError, KeyError or TypeError say what is wrong with the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["repository"] = Repository.read(content["repository"])
    content["files"] = tuple(content.get("files", ()))
    return Settings(**content)


def load_server(path: Path = SERVER) -> Server:
    """Read the repository host's settings; raises as `load` does."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["repository"] = Repository.read(content["repository"])
    content["further"] = tuple(map(Repository.read, content.get("further", ())))
    return Server(**content)
