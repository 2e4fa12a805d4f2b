"""Say, with an entry of the decision log, who runs the playbook and from which commit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu.controller import commit, operator


class ActionModule(ActionBase):
    """The task `decision`; its options are documented in the module of the same name."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Add what only the controller knows, and let the host write."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        given = dict(self._task.args)
        folder = Path(str(given.pop("path")))
        given |= {"by": operator(), "commit": commit(folder)}
        done: dict[str, Any] = self._execute_module(module_name="decision", module_args=given, task_vars=task_vars)
        return {**result, **done}
