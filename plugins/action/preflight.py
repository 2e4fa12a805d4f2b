"""Action ``preflight``: find wrong variables and missing secrets before anything is changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu.variables import Specification, inventory_problems, missing_values, topology_problems


class ActionModule(ActionBase):
    """Compare the inventory with what the kit knows.

    Arguments: ``specification`` (inventories/argument_specs.yml), ``roles`` (folder of the roles), ``wiring``
    (the file that joins them). Fails with one sentence for each problem; changes nothing.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"specification", "roles", "wiring"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``failed`` with all problems in ``msg``, or nothing but the result of the base class."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        arguments = self._task.args
        known = Specification.read(
            Path(arguments["specification"]), Path(arguments["roles"]), Path(arguments["wiring"])
        )
        sources = [path for path in map(Path, variables["ansible_inventory_sources"]) if path.is_file()]
        if not sources:
            result.update(failed=True, msg="No inventory file is given: add -i inventories/PROVINCE/hosts.yml.")
            return result
        problems = [line for source in sources for line in inventory_problems(source, known)]
        hosts = {name: variables["hostvars"][name] for name in variables["groups"]["all"]}
        problems += missing_values(known, hosts, sources[0])
        if not problems:
            addresses = {name: values["host_addresses"] for name, values in hosts.items()}
            service = next(iter(hosts.values()))["mail_service_addresses"]
            problems += topology_problems(variables["groups"], addresses, service, sources[0])
        if problems:
            result.update(failed=True, msg="\n".join([*problems, "Nothing has been changed."]))
        return result
