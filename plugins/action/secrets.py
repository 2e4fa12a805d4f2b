"""Action ``secrets``: make the secrets that are missing, into a file encrypted with Ansible Vault."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import AnsibleVaultError
from ansible.plugins.action import ActionBase

ENTROPY_BYTES = 24


class ActionModule(ActionBase):
    """Add to ``file`` a random value for each secret of ``specification`` that it does not hold.

    What the file holds already is never changed. Needs a vault password (``--vault-password-file`` or
    ``--ask-vault-pass``); the clear text exists in memory only.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"specification", "file"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``changed`` and the names of the secrets made, never their values."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        path = Path(self._task.args["file"])
        wanted = yaml.safe_load(Path(self._task.args["specification"]).read_text(encoding="utf-8"))["secrets"]
        vault = self._loader._vault
        if not vault.secrets:
            raise AnsibleError(
                "No vault password is given, and secrets are never written in clear: put a long password into a file "
                "outside the checkout and add --vault-password-file FILE, or add --ask-vault-pass."
            )
        present: dict[str, str] = {}
        if path.exists():
            try:
                present = yaml.safe_load(vault.decrypt(path.read_bytes())) or {}
            except AnsibleVaultError as error:
                raise AnsibleError(
                    f"{path} cannot be read with this vault password: give the one it was made with."
                ) from error
        made = [name for name in wanted if not present.get(name)]
        if made and not self._task.check_mode:
            present.update({name: secrets.token_urlsafe(ENTROPY_BYTES) for name in made})
            text = vault.encrypt(yaml.safe_dump(present, sort_keys=True).encode())
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(path.name + ".new")
            descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(path)
        result.update(changed=bool(made), made=made, file=str(path))
        return result
