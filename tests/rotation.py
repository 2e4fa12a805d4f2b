"""Rotate a running lab's secrets (FOLDER, build/NAME) while mail is sent and read, and count what fails.

Two stages with site.yml after each, as docs/operations.md says it. The DKIM key is not among them: its stages wait for
the DNS. Exit code 1 when a login, a submission or a reading failed, or when a run did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(CHECKOUT / "tests" / "acceptance"))

from service import Service, letter  # noqa: E402 - its folder is named above

GROUPS = ["openldap", "valkey", "rspamd"]


class Traffic(threading.Thread):
    """One message after the other, from each unit to the next in turn, until it is told to stop.

    In turn, because a single login would come to its sending limit before the rotation ends.
    """

    def __init__(self, service: Service) -> None:
        super().__init__(daemon=True)
        self.service = service
        self.stop = threading.Event()
        self.passed = 0
        self.failures: list[str] = []

    def run(self) -> None:
        """Submit, wait for the arrival and delete; a failure is noted and the next message goes its way."""
        units = [self.service.unit(name.partition("@")[0]) for name in self.service.units]
        for sender, recipient in itertools.pairwise(itertools.cycle(units)):
            if self.stop.is_set():
                return
            try:
                message = letter(sender.address, recipient.address)
                identifier = sender.submit(message, recipient.address, self.service.address)
                recipient.take(identifier, seconds=60)
                self.passed += 1
            except BaseException as error:  # pytest's own failures, of `wait`, are no Exception
                self.failures.append(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}")
                time.sleep(1)


def playbook(folder: Path, name: str, *arguments: str) -> bool:
    """Run a playbook on the lab; whether it ended well."""
    command: list[str | Path] = [Path(sys.executable).with_name("ansible-playbook")]
    command += [
        "-i",
        folder / "inventory" / "hosts.yml",
        "--vault-password-file",
        folder / "vault-password",
        "-e",
        f"@{folder / 'vault.yml'}",
        *arguments,
    ]
    print(f"--- {name}", flush=True)
    return subprocess.run([*command, f"playbooks/{name}"], cwd=CHECKOUT, check=False).returncode == 0


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    service = Service(json.loads((folder / "lab.json").read_text(encoding="utf-8")))
    before = dict(service.secrets)
    traffic = Traffic(service)
    traffic.start()
    wishes = json.dumps({"secrets_file": str(folder / "vault.yml"), "rotate": GROUPS})
    good = all(
        playbook(folder, "secrets-rotate.yml", "-e", wishes) and playbook(folder, "site.yml") for _stage in range(2)
    )
    traffic.stop.set()
    traffic.join()
    after = Service(json.loads((folder / "lab.json").read_text(encoding="utf-8"))).secrets
    renewed = [name for name in before if before[name] != after.get(name)]
    left = [name for name in after if name.endswith("_previous")]
    print("\n".join(traffic.failures))
    print(f"{traffic.passed} messages passed, {len(traffic.failures)} failed; {len(renewed)} secrets renewed")
    return 0 if good and renewed and not left and traffic.passed and not traffic.failures else 1


if __name__ == "__main__":
    sys.exit(main())
