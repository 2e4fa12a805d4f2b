"""Run the kit's playbooks against a lab's hosts, with a province's files as they are or spoilt."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
RECAP = re.compile(r"^(\S+)\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """What a playbook run said and did."""

    status: int
    output: str

    @property
    def message(self) -> str:
        """The sentences of the last task that failed, on one line."""
        found = re.findall(r"^\s+msg: ?(.*?)(?=^\s{4}\w+:|^PLAY RECAP|^\S|\Z)", self.output, re.MULTILINE | re.DOTALL)
        return " ".join(found[-1].replace("|-", "").split()) if found else ""

    @property
    def changed(self) -> dict[str, int]:
        """Host → number of tasks that changed something."""
        return {host: int(changed) for host, _ok, changed, _unreachable, _failed in RECAP.findall(self.output)}


class Province:
    """A copy of the lab's inventory that a test may spoil."""

    def __init__(self, lab: dict[str, Any], folder: Path) -> None:
        """Copy hosts.yml, group_vars and directory of the lab into `folder`."""
        source = Path(lab["inventory"]).parent
        self.build = source.parent
        shutil.copytree(source, folder, dirs_exist_ok=True)
        self.hosts_file = folder / "hosts.yml"
        self.folder = folder

    def read(self, name: str) -> Any:
        """The content of one of the YAML files."""
        return yaml.safe_load((self.folder / name).read_text(encoding="utf-8"))

    def write(self, name: str, content: Any) -> None:
        """Replace one of the YAML files."""
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        (self.folder / name).write_text(text, encoding="utf-8")

    def run(self, playbook: str, *arguments: str, secrets: bool = True) -> Run:
        """Run playbooks/`playbook` with this inventory and the lab's secrets."""
        command = [Path(sys.executable).with_name("ansible-playbook"), "-i", self.hosts_file]
        command += ["--vault-password-file", self.build / "vault-password"]
        if secrets:
            command += ["-e", f"@{self.build / 'vault.yml'}"]
        # Molecule sets Ansible's settings for its own runs, colour among them.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {"ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        result = subprocess.run(
            [*command, *arguments, f"playbooks/{playbook}"],
            cwd=CHECKOUT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Run(result.returncode, result.stdout + result.stderr)


def plan() -> Any:
    """The last plan of playbooks/directory.yml."""
    return json.loads((CHECKOUT / "build" / "plan.json").read_text(encoding="utf-8"))
