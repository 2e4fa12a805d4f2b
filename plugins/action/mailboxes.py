"""Keep the receipts of hand-overs here while the mail store follows the directory."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu.durable import replaced, sync
from hopthu.mailboxes import hand_overs, receipt

_PENDING = ".pending.yml"
_TITLE = "# Biên bản bàn giao hộp thư đơn vị: hand-over of a unit's mailbox (DL-9, LC-10.3, HT-7.4)\n"


class ActionModule(ActionBase):
    """The task `mailboxes`; its options are documented in the module of the same name.

    Before the directory is changed, `count` writes for each hand-over TIME-UNIT.pending.yml: who, on which grounds,
    what is in the mailbox. Afterwards `follow` makes TIME-UNIT.yml of it, with what is there then. A run that was
    killed in between leaves the pending file, and the next one finishes it.
    """

    _VALID_ARGS = frozenset({"step", "plan_file", "receipts_path"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do the step that the task names."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        _spec, args = self.validate_argument_spec(
            {
                "step": {"type": "str", "required": True, "choices": ["count", "follow"]},
                "plan_file": {"type": "path"},
                "receipts_path": {"type": "path", "required": True},
            },
            required_if=[("step", "count", ["plan_file"])],
        )
        self._variables = task_vars or {}
        self._host = str(self._task.delegate_to or self._variables["inventory_hostname"])
        folder = Path(args["receipts_path"])
        if args["step"] == "count":
            result.update(self._count(folder, Path(args["plan_file"])))
        else:
            result.update(self._follow(folder))
        return result

    def _count(self, folder: Path, plan_file: Path) -> dict[str, Any]:
        """Write a pending receipt for each hand-over of the plan."""
        try:
            with plan_file.open(encoding="utf-8") as plan:
                due = {row["unit"]: row for row in hand_overs(plan)}
        except OSError as error:
            raise AnsibleActionFail(f"{plan_file} cannot be read ({error.strerror}): plan first.") from None
        if not due or self._task.check_mode:
            return {"changed": bool(due), "receipts": []}
        done = self._module({"step": "count", "units": sorted(due)})
        if done.get("failed"):
            return done
        missing = sorted(due.keys() - done["counted"].keys())
        if missing:
            raise AnsibleActionFail(
                f"The directory has no open mailbox of {', '.join(missing)}, which the plan hands over: run again."
            )
        now = datetime.now(UTC)
        written = []
        earlier = [path for path, pending in self._pending(folder) if pending["unit"] in due]
        for unit, row in sorted(due.items()):
            path = folder / f"{now:%Y%m%dT%H%M%SZ}-{unit}{_PENDING}"
            pending = {
                **row,
                "host": self._host,
                "time": now.isoformat(timespec="seconds"),
                "folders": done["counted"][unit]["folders"],
            }
            _write(path, pending)
            written.append(str(path))
        for path in earlier:  # of a run that never came to the hand-over
            path.unlink()
        return {"changed": True, "receipts": written}

    def _follow(self, folder: Path) -> dict[str, Any]:
        """Let the host follow the directory, and finish the receipts."""
        pending = [] if self._task.check_mode else self._pending(folder)
        people = {row[side] for _path, row in pending for side in ("from", "to") if row[side]}
        result = self._module(
            {"step": "follow", "units": sorted({row["unit"] for _path, row in pending}), "people": sorted(people)}
        )
        counted = result.pop("counted", {})
        if result.get("failed"):
            return result
        result["receipts"] = []
        faults = []
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for path, row in pending:
            unit = counted.get(row["unit"])
            if unit and unit["head"] == row["to"]:
                final = path.with_name(path.name.removesuffix(_PENDING) + ".yml")
                content, lost = receipt(row, unit, now)
                _write(final, content)
                result["receipts"].append(str(final))
                if lost:
                    faults.append(f"{unit['address']}: {content['verdict']}, see {final}")
            else:
                self._display.warning(f"{path.name}: the hand-over did not take place, the receipt is dropped")
            path.unlink()
            sync(folder)
        result["changed"] = result["changed"] or bool(pending)
        if faults:
            text = "Messages went while a mailbox was handed over; look who was still logged in: "
            result.update(failed=True, msg=text + "; ".join(faults))
        return result

    def _pending(self, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Return the receipts of this host that wait, oldest first."""
        found = []
        for path in sorted(folder.glob(f"*{_PENDING}")) if folder.is_dir() else []:
            try:
                row = yaml.safe_load(path.read_text(encoding="utf-8"))
                complete = row.keys() >= {"unit", "from", "to", "grounds", "host", "time", "folders"}
            except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
                complete = False
            if not complete:
                raise AnsibleActionFail(
                    f"{path} is not a receipt that this kit has written: move it away and run again."
                )
            if row["host"] == self._host:
                found.append((path, row))
        return found

    def _module(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run the module of the same name on the host."""
        done: dict[str, Any] = self._execute_module(
            module_name="mailboxes", module_args=arguments, task_vars=self._variables
        )
        done.pop("invocation", None)
        return done


def _write(path: Path, content: dict[str, Any]) -> None:
    """Write a receipt: whole or not at all, and on disk on return."""
    with replaced(path) as file:
        file.write((_TITLE + yaml.safe_dump(content, allow_unicode=True, sort_keys=False)).encode())
