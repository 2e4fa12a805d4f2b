"""Run the kit's playbooks against a lab's hosts, with a province's files as they are or spoilt."""

from __future__ import annotations

import csv
import io
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
        self.build = Path(lab["credentials_file"]).parent
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

    def start(self, playbook: str, *arguments: str, secrets: bool = True) -> subprocess.Popen[str]:
        """Start playbooks/`playbook` with this inventory and the lab's secrets, in a process group of its own."""
        command = [Path(sys.executable).with_name("ansible-playbook"), "-i", self.hosts_file]
        command += ["--vault-password-file", self.build / "vault-password"]
        if secrets:
            command += ["-e", f"@{self.build / 'vault.yml'}"]
        # Molecule sets Ansible's settings for its own runs, colour among them.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        environment |= {"ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        return subprocess.Popen(
            [*command, *arguments, f"playbooks/{playbook}"],
            cwd=CHECKOUT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, playbook: str, *arguments: str, secrets: bool = True) -> Run:
        """Run a playbook as `start` does, to its end."""
        process = self.start(playbook, *arguments, secrets=secrets)
        output = process.communicate()[0]
        return Run(process.returncode, output)


def run_play(lab: dict[str, Any], folder: Path, play: dict[str, Any], *arguments: str) -> Run:
    """Run a play of the test's own, made in `folder`, with the lab's inventory and secrets and the kit's wiring."""
    folder.mkdir(parents=True, exist_ok=True)
    wiring = folder / "group_vars"
    if not wiring.exists():
        wiring.symlink_to(CHECKOUT / "playbooks" / "group_vars")
    path = folder / "play.yml"
    path.write_text(yaml.safe_dump([{"gather_facts": False, **play}]), encoding="utf-8")
    province = Province(lab, folder / "inventory")
    return province.run(os.path.relpath(path, CHECKOUT / "playbooks"), *arguments)


def plan() -> Any:
    """The last plan of playbooks/directory.yml."""
    return json.loads((CHECKOUT / "build" / "plan.json").read_text(encoding="utf-8"))


class Files(Province):
    """The directory files of a province as lists that a test changes, whatever form its people have."""

    def __init__(self, lab: dict[str, Any], folder: Path) -> None:
        super().__init__(lab, folder)
        directory = folder / "directory"
        self.policy: dict[str, Any] = self.read("directory/policy.yml")
        self.units: list[dict[str, Any]] = self.read("directory/units.yml")["mail_units"]
        self.people: list[dict[str, Any]] = []
        self._sources = sorted([*directory.glob("people.*"), *directory.glob("people/*.yml")])
        for path in self._sources:
            self.people += _people(path)

    def grounds(self, number: str) -> dict[str, str]:
        """Every kind of document, none used before: what any policy may ask for."""
        names = ["decision_ref", "order_ref", "request_ref", "legal_act_ref", "commitment_ref"]
        return {name: f"{number}/{name}" for name in names} | {"approved_by": "Chánh Văn phòng"}

    def save(self) -> None:
        """Write the files, the people in one people.yml."""
        for path in self._sources:
            path.unlink()
        for folder in {path.parent for path in self._sources if path.parent.name == "people"}:
            folder.rmdir()
        self._sources = []
        self.write("directory/policy.yml", self.policy)
        self.write("directory/units.yml", {"mail_units": self.units})
        self.write("directory/people.yml", {"mail_people": self.people})

    def apply(self, *arguments: str, playbook: str = "directory.yml") -> Run:
        """Write the files and load them."""
        self.save()
        return self.run(playbook, *arguments)

    def slips(self) -> dict[str, str]:
        """Mailbox id → its newest initial password, as the operator reads them."""
        found: dict[str, str] = {}
        command = ["openssl", "cms", "-decrypt", "-binary", "-inform", "DER", "-inkey", self.build / "operator-key.pem"]
        for path in sorted((self.build / "slips").glob("*.cms")):
            pages = subprocess.run([*command, "-in", path], check=True, capture_output=True, text=True).stdout
            found.update(re.findall(r'<section data-id="([^"]+)".*?<dd class="p">([^<]+)</dd>', pages, re.DOTALL))
        return found


def _people(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        people = [{name: value for name, value in row.items() if value} for row in rows]
        return [row | ({"aliases": row["aliases"].split(";")} if "aliases" in row else {}) for row in people]
    people = yaml.safe_load(path.read_text(encoding="utf-8"))["mail_people"]
    unit = {"unit": path.stem} if path.parent.name == "people" else {}
    return [unit | person for person in people]
