"""Read a province's directory files here, plan and apply them on the host that runs slapd."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from ansible import constants as C
from ansible.errors import AnsibleActionFail, AnsibleError
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu.plan import Change, Entry, Plan, as_text, counts
from hopthu.schema import load
from hopthu.state import build

_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # without those that look alike on paper
_DIFF_ENTRIES = 50
_PENDING = ".pending.yml"


def initial_password() -> str:
    """Return a random password: 20 of 31 letters, 99 bits, in groups that can be typed."""
    groups = ["".join(secrets.choice(_LETTERS) for _ in range(5)) for _ in range(4)]
    return "-".join(groups)


def ssha512(password: str) -> str:
    """Return the salted SHA-512 hash that slapd's pw-sha2 verifies.

    A fast hash is enough for a long random password that must be changed at first use.
    """
    salt = os.urandom(16)
    digest = hashlib.sha512(password.encode() + salt).digest()
    return "{SSHA512}" + base64.b64encode(digest + salt).decode()


def write_durably(path: Path, data: bytes) -> None:
    """Write a file that only its owner reads: whole or not at all, and on disk on return."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Slips:
    """Initial passwords on their way to people: encrypted files in one folder.

    A file is called TIME.pending.yml until all its mailboxes exist, then TIME.yml. What an
    interrupted run has left pending is taken over by the next, so nobody gets a second password.
    """

    def __init__(self, folder: Path, vault: Any) -> None:
        self.folder = folder
        self.vault = vault
        self.leftover = sorted(folder.glob(f"*{_PENDING}")) if folder.is_dir() else []
        self.pending: Path | None = None

    def prepare(self, new: list[str], addresses: dict[str, str]) -> dict[str, str]:
        """Write the slips of the ids in `new`; return their passwords, id to password.

        `addresses` maps every id of the files to its address. Raises AnsibleActionFail without a
        vault secret, before anything is written.
        """
        if not new and not self.leftover:
            return {}
        if not self.vault.secrets:
            raise AnsibleActionFail(
                "the slips with initial passwords need a vault secret to encrypt them: "
                "run with --vault-password-file or --ask-vault-pass"
            )
        passwords = {identity: password for identity, password in self._left_over().items() if identity in addresses}
        for identity in new:
            passwords.setdefault(identity, initial_password())
        if passwords:
            slips = [
                {"id": identity, "address": addresses[identity], "password": password}
                for identity, password in sorted(passwords.items())
            ]
            text = yaml.safe_dump({"slips": slips}, allow_unicode=True, sort_keys=False)
            time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
            self.pending = self.folder / f"{time}{_PENDING}"
            write_durably(self.pending, self.vault.encrypt(text))
        for path in self.leftover:
            path.unlink()
        return passwords

    def finish(self) -> Path | None:
        """Give the pending file its final name, now that all its mailboxes exist."""
        if self.pending is None:
            return None
        final = self.pending.with_name(self.pending.name.replace(_PENDING, ".yml"))
        self.pending.rename(final)
        sync_folder(self.folder)
        return final

    def _left_over(self) -> dict[str, str]:
        """Return the passwords of files that an interrupted run has left."""
        found: dict[str, str] = {}
        for path in self.leftover:
            try:
                slips = yaml.safe_load(self.vault.decrypt(path.read_bytes()))["slips"]
                found.update({slip["id"]: slip["password"] for slip in slips})
            except (AnsibleError, yaml.YAMLError, KeyError, TypeError):
                raise AnsibleActionFail(
                    f"{path} cannot be decrypted with this run's vault secret: use the one of the interrupted run"
                ) from None
        return found


class ActionModule(ActionBase):
    """The task `directory`; its options are documented in the module of the same name."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Validate; then, unless told otherwise, plan, write slips, and apply."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        text = {"type": "str"}
        path = {"type": "path"}
        _spec, args = self.validate_argument_spec(
            {
                "path": {"type": "path", "required": True},
                "validate_only": {"type": "bool", "default": False},
                "base": text,
                "uri": {"type": "str", "default": "ldapi:///"},
                "bind_dn": text,
                "password_file": path,
                "slips_path": path,
                "plan_file": path,
            },
            required_if=[
                (
                    "validate_only",
                    False,
                    ["base", "bind_dn", "password_file", "slips_path", "plan_file"],
                )
            ],
        )
        folder = Path(args["path"])
        shown = os.path.relpath(folder)
        directory, problems = load(folder, str(folder) if shown.startswith("..") else shown)
        entries = build(directory, problems)
        if problems:
            lines = [str(problem) for problem in sorted(set(problems))]
            result.update(failed=True, msg="\n".join(lines), errors=lines)
            return result
        result.update(
            changed=False,
            domain=directory.policy.domain,
            domains=list(directory.policy.domains),
            units=len(directory.units),
            people=len(directory.people),
        )
        if args["validate_only"]:
            return result
        try:
            return self._bring(entries, args, task_vars or {}, result)
        finally:
            self._remove_tmp_path(self._connection._shell.tmpdir)

    def _bring(
        self,
        entries: list[Entry],
        args: dict[str, Any],
        task_vars: dict[str, Any],
        result: dict[str, Any],
    ) -> dict[str, Any]:
        """Plan on the host, write slips here, apply on the host."""
        if self._connection._shell.tmpdir is None:
            self._make_tmp_path()
        remote = self._connection._shell.tmpdir
        names = ("desired_file", "plan_file", "hashes_file")
        files = {name: self._connection._shell.join_path(remote, name) for name in names}
        session = {name: args[name] for name in ("base", "uri", "bind_dn", "password_file")}

        self._send(files["desired_file"], [asdict(entry) for entry in entries])
        planned = self._module({**session, "mode": "plan", **_only(files, "desired_file", "plan_file")}, task_vars)
        if planned.get("failed"):
            return {**result, **planned}
        if "live_unread" in planned:
            self._display.warning(f"The live tree was taken as empty for this check: {planned['live_unread']}")
        plan = Plan.from_json(self._fetch(files["plan_file"]))
        write_plan(Path(args["plan_file"]), plan, applied=False)
        result.update(
            changed=bool(plan.changes),
            counts=planned["counts"],
            plan_file=args["plan_file"],
            **_only(planned, "live_unread"),
        )
        if self._task.diff:
            result["diff"] = diff(plan)
        if self._task.check_mode:
            return result

        slips = Slips(Path(args["slips_path"]), self._loader._vault)
        new = [change.id for change in plan.changes if change.action == "add"]
        addresses = {entry.id: entry.attributes["mail"][0] for entry in entries}
        passwords = slips.prepare(new, addresses)
        if plan.changes:
            hashes = {identity: ssha512(passwords[identity]) for identity in new}
            self._send(files["hashes_file"], hashes)
            applied = self._module({**session, "mode": "apply", **_only(files, "plan_file", "hashes_file")}, task_vars)
            if applied.get("failed"):
                return {**result, **applied}
            write_plan(Path(args["plan_file"]), plan, applied=True)
        slips_file = slips.finish()
        if slips_file:
            result["slips_file"] = str(slips_file)
        return result

    def _module(self, arguments: dict[str, Any], task_vars: dict[str, Any]) -> dict[str, Any]:
        """Run the module of the same name on the host."""
        done: dict[str, Any] = self._execute_module(module_name="directory", module_args=arguments, task_vars=task_vars)
        done.pop("invocation", None)
        return done

    def _send(self, path: str, value: Any) -> None:
        """Put JSON into a file on the host that only its owner reads."""
        self._transfer_data(path, json.dumps(value, ensure_ascii=False).encode())
        self._remote_chmod([path], "0600")

    def _fetch(self, path: str) -> Any:
        """Read a JSON file of the host."""
        folder = tempfile.mkdtemp(dir=C.DEFAULT_LOCAL_TMP)
        try:
            local = Path(folder) / "plan"
            self._connection.fetch_file(path, str(local))
            return json.loads(local.read_text(encoding="utf-8"))
        finally:
            shutil.rmtree(folder)


def _only(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: mapping[name] for name in names if name in mapping}


def write_plan(path: Path, plan: Plan, *, applied: bool) -> None:
    """Write the plan for people and scripts; it never holds a password or a hash."""
    rows = [
        {
            "action": change.action,
            "kind": change.kind,
            "id": change.id,
            "address": (change.after or change.before or {}).get("mail", [""])[0],
            "before": change.before,
            "after": change.after,
            "refs": change.refs,
            "refused": None,
        }
        for change in plan.changes
    ]
    value = {"applied": applied, "counts": counts(plan.changes), "changes": rows}
    write_durably(path, (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode())


def diff(plan: Plan) -> list[dict[str, str]]:
    """Return before and after per mailbox, for at most 50 of them."""
    shown = [_diff(change) for change in plan.changes[:_DIFF_ENTRIES]]
    more = len(plan.changes) - len(shown)
    if more:
        shown.append({"prepared": f"… and {more} more mailboxes, all of them in the plan file\n"})
    return shown


def _diff(change: Change) -> dict[str, str]:
    header = f"{change.kind} {change.id}"
    return {
        "before_header": header,
        "after_header": header,
        "before": as_text(change.kind, change.before),
        "after": as_text(change.kind, change.after),
    }
