"""Action ``secrets``: make and rotate a province's secrets, in a file encrypted with Ansible Vault."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import AnsibleVaultError
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu import rotation
from hopthu.durable import replaced


class ActionModule(ActionBase):
    """Work on the secrets of ``specification`` in ``file``.

    ``step``:
      - ``make`` (default) adds a random value for each that the file does not hold, and changes none that it holds;
      - ``rotate`` does the next stage of a rotation of the groups ``rotate``; ``published`` says that the DNS has the
        next DKIM key. ``running`` are the fingerprints of the secrets that the hosts work with, by host: unless all are
        the file's, nothing is done;
      - ``fingerprint`` returns that of the variables of this host, without a file.

    Needs a vault password (``--vault-password-file`` or ``--ask-vault-pass``); the clear text exists in memory only.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"specification", "file", "step", "rotate", "published", "running"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``changed``, the names of the secrets ``made``, what was ``done`` and what comes ``next``."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self._task.args
        wanted = yaml.safe_load(Path(arguments["specification"]).read_text(encoding="utf-8"))["secrets"]
        step = arguments.get("step", "make")
        if step == "fingerprint":
            names = [*wanted, *rotation.accompanying(wanted)]
            values = {name: self._templar.template((task_vars or {}).get(name, "")) for name in names}
            result.update(changed=False, fingerprint=rotation.fingerprint(wanted, values))
            return result
        path = Path(arguments["file"])
        present = self._read(path)
        if step == "make":
            made = rotation.missing(wanted, present)
            self._write(path, present | made, bool(made))
            result.update(changed=bool(made), made=sorted(made), file=str(path))
            return result
        mine = rotation.fingerprint(wanted, present)
        late = [host for host, running in arguments["running"].items() if running != mine]
        try:
            if late:
                raise rotation.RotationRefused(
                    f"not yet at work with the secrets of {path}: {', '.join(late)}; run playbooks/site.yml first"
                )
            stage = rotation.rotate(wanted, present, arguments["rotate"], published=arguments["published"])
        except rotation.RotationRefused as refusal:
            result.update(failed=True, msg=f"{refusal}. Nothing has been changed.")
            return result
        self._write(path, stage.secrets, bool(stage.done))
        result.update(changed=bool(stage.done), done=stage.done, next=stage.next, file=str(path))
        return result

    def _read(self, path: Path) -> dict[str, str]:
        """Return the secrets that the file holds."""
        if not self._loader._vault.secrets:
            raise AnsibleError(
                "No vault password is given, and secrets are never written in clear: put a long password into a file "
                "outside the checkout and add --vault-password-file FILE, or add --ask-vault-pass."
            )
        if not path.exists():
            return {}
        try:
            held: dict[str, str] = yaml.safe_load(self._loader._vault.decrypt(path.read_bytes())) or {}
        except AnsibleVaultError as error:
            raise AnsibleError(
                f"{path} cannot be read with this vault password: give the one it was made with."
            ) from error
        return held

    def _write(self, path: Path, held: dict[str, str], changed: bool) -> None:
        """Replace the file in one step, encrypted."""
        if changed and not self._task.check_mode:
            text = self._loader._vault.encrypt(yaml.safe_dump(held, sort_keys=True).encode())
            with replaced(path) as file:
                file.write(text)
