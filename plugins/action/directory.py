"""Read a province's directory files here, plan and apply them on the host that runs slapd."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from hopthu import export, report, state
from hopthu.controller import commit, operator
from hopthu.durable import replaced
from hopthu.slips import Holder, Slips, SlipsRefused, check_certificates

_SESSION = ("base", "uri", "bind_dn", "password_file", "peers", "ca_file")
_HOST_FOLDER = "/var/lib/hopthu/directory"


class ActionModule(ActionBase):
    """The task `directory`; its options are documented in the module of the same name."""

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Do the step that the task names."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        del tmp
        text, path, paths = {"type": "str"}, {"type": "path"}, {"type": "list", "elements": "path"}
        _spec, args = self.validate_argument_spec(
            {
                "step": {"type": "str", "required": True, "choices": ["validate", "plan", "apply", "export"]},
                "path": {"type": "path", "required": True},
                "base": text,
                "uri": {"type": "str", "default": "ldapi:///"},
                "bind_dn": text,
                "password_file": path,
                "peers": {"type": "list", "elements": "str", "default": []},
                "ca_file": path,
                "slips_path": path,
                "slips_certificates": paths,
                "plan_file": path,
                "plan_sha256": text,
                "removals": {"type": "int"},
                "resets": {"type": "list", "elements": "dict"},
                "export_to": path,
                "export_form": {"type": "str", "choices": ["yml", "csv", "json"], "default": "yml"},
            },
            required_if=[
                ("step", "validate", ["slips_certificates"]),
                ("step", "plan", ["base", "bind_dn", "password_file", "slips_path", "plan_file"]),
                (
                    "step",
                    "apply",
                    [
                        *("base", "bind_dn", "password_file", "slips_path", "slips_certificates"),
                        *("plan_file", "plan_sha256"),
                    ],
                ),
                ("step", "export", ["base", "bind_dn", "password_file", "export_to"]),
            ],
        )
        self._args: dict[str, Any] = args
        self._variables = task_vars or {}
        try:
            result.update(getattr(self, f"_{args['step']}")())
        except (SlipsRefused, export.ExportRefused) as refusal:
            raise AnsibleActionFail(str(refusal)) from None
        return result

    # --- steps ----------------------------------------------------------------------------------

    def _validate(self) -> dict[str, Any]:
        """Read and check the files, and that slips can be encrypted."""
        _desired, about = self._desired()
        if not about.get("failed"):
            check_certificates([Path(name) for name in self._args["slips_certificates"]])
        return about

    def _plan(self) -> dict[str, Any]:
        """Read and check the files, let the host compare them with the live tree, and write down what it found."""
        args = self._args
        slips = Slips(Path(args["slips_path"]), [], self._loader._vault)
        desired, about = self._desired()
        if about.get("failed"):
            return about
        with _temporary_folder() as folder:
            temporary = self._make_tmp_path()
            host_folder = temporary if self._task.check_mode else _HOST_FOLDER
            sent = self._send(desired, f"{temporary}/desired.jsonl")
            files = {"desired_file": sent, "plan_file": f"{host_folder}/plan.jsonl"}
            if args["resets"]:
                resets = folder / "resets.json"
                resets.write_text(json.dumps(_resets(args["resets"])), encoding="utf-8")
                files["resets_file"] = self._send(resets, f"{temporary}/resets.json")
            options = {"removals": args["removals"], "issued": slips.interrupted()}
            answer = self._module({**files, **options, "mode": "plan"})
            if answer.get("failed"):
                return answer
            fetched = folder / "plan.jsonl"
            self._connection.fetch_file(files["plan_file"], str(fetched))
            self._remove_tmp_path(temporary)
            header = report.write(fetched, Path(args["plan_file"]))
            work = header["counts"]["total"] > 0 or bool(slips.interrupted())
            if work and not self._task.check_mode:
                # Like plan.json: names and addresses, which only the operator reads.
                with fetched.open("rb") as source, replaced(_working_copy(args["plan_file"])) as copy:
                    shutil.copyfileobj(source, copy)
            result = {
                **about,
                **_only(answer, "live_unread"),
                "counts": header["counts"],
                "changed": header["counts"]["total"] > 0,
                "lines": report.lines(fetched),
                "refused": report.refused(fetched),
                "hand_overs": header["hand_overs"],
                "plan_file": args["plan_file"],
                "plan_sha256": _sha256(fetched),
                "work": work,
            }
            if self._task.diff:
                result["diff"] = report.diff(fetched)
        if header["stop"]:
            result.update(failed=True, changed=False, msg=header["stop"])
        return result

    def _apply(self) -> dict[str, Any]:
        """Write the slips, then let the host carry out the very plan that was shown."""
        args = self._args
        if self._task.check_mode:
            return {"skipped": True, "msg": "check mode: the plan is made, not applied"}
        certificates = [Path(name) for name in args["slips_certificates"]]
        check_certificates(certificates)
        slips = Slips(Path(args["slips_path"]), certificates, self._loader._vault)
        plan = _working_copy(args["plan_file"])
        if not plan.is_file() or _sha256(plan) != args["plan_sha256"]:
            raise AnsibleActionFail(f"{plan} is not the plan that this run has made: run again")
        header = report.header(plan)
        issued = {run: [Holder(**holder) for holder in holders] for run, holders in header["issued"].items()}
        finished = slips.recover(issued)
        result: dict[str, Any] = {"changed": bool(finished), "slips_files": [str(path) for path in finished]}
        if header["counts"]["total"]:
            passwords = any(True for _holder in report.holders(plan))
            with _temporary_folder() as folder:
                secret = folder / "secrets.json"
                key = slips.begin(report.holders(plan)).hex() if passwords else ""
                secret.write_text(json.dumps({"key": key, "run": slips.run}), encoding="utf-8")
                temporary = self._make_tmp_path()
                answer = self._module(
                    {
                        "mode": "apply",
                        "plan_file": f"{_HOST_FOLDER}/plan.jsonl",
                        "plan_sha256": args["plan_sha256"],
                        "secrets_file": self._send(secret, f"{temporary}/secrets.json"),
                        "decision": {"by": operator(), "commit": commit(Path(args["path"]))},
                    }
                )
                self._remove_tmp_path(temporary)
            if answer.get("failed"):
                return {**result, **answer}
            result.update(changed=True, **_only(answer, "filled", "behind"))
            if answer["behind"]:
                # It takes it over when it comes back: no failure.
                result["warnings"] = [f"{peer} does not have yet what was written" for peer in answer["behind"]]
            if passwords:
                result["slips_files"].append(str(slips.finish()))
        report.mark_applied(Path(args["plan_file"]))
        plan.unlink()
        return result

    def _export(self) -> dict[str, Any]:
        """Write the live tree back into files."""
        args = self._args
        reading, failure = self._read(None)
        if failure:
            return failure
        with _temporary_folder() as folder:
            temporary = self._make_tmp_path()
            answer = self._module({"mode": "export", "export_file": f"{temporary}/export.jsonl"})
            if answer.get("failed"):
                return answer
            fetched = folder / "export.jsonl"
            self._connection.fetch_file(f"{temporary}/export.jsonl", str(fetched))
            self._remove_tmp_path(temporary)
            with fetched.open(encoding="utf-8") as lines:
                written = export.write(lines, reading.policy, Path(args["export_to"]), args["export_form"])
        return {"changed": True, **_about(reading), "files": [str(path) for path in written]}

    # --- helpers --------------------------------------------------------------------------------

    def _desired(self) -> tuple[Path, dict[str, Any]]:
        """Return the file of what shall be, and what to say of it; with problems, the failed result.

        The checks before a playbook and the plan want the same of the same files: within one run of Ansible, whose
        temporary folder nobody else sees, they are read once.
        """
        desired = Path(C.DEFAULT_LOCAL_TMP) / f"directory-{_sha256_of_folder(Path(self._args['path']))}.jsonl"
        known = desired.with_suffix(".about")
        if known.exists():
            found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
            return desired, found
        with desired.open("wb") as out:
            reading, failure = self._read(out)
        about = failure or {"changed": False, **_about(reading)}
        if not failure:
            known.write_text(json.dumps(about), encoding="utf-8")
        return desired, about

    def _read(self, out: Any) -> tuple[state.Reading, dict[str, Any]]:
        """Read and check the folder of files; the second value is the failed result when there are problems."""
        folder = Path(self._args["path"])
        shown = os.path.relpath(folder)
        reading = state.read(folder, str(folder) if shown.startswith("..") else shown, out, date.today())
        if not reading.problems:
            return reading, {}
        lines = [str(problem) for problem in sorted(set(reading.problems))]
        return reading, {"failed": True, "msg": "\n".join(lines), "errors": lines}

    def _module(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run the module of the same name on the host."""
        session = {name: self._args[name] for name in _SESSION}
        given = {name: value for name, value in {**session, **arguments}.items() if value is not None}
        done: dict[str, Any] = self._execute_module(
            module_name="directory", module_args=given, task_vars=self._variables
        )
        done.pop("invocation", None)
        return done

    def _send(self, local: Path, remote: str) -> str:
        """Put a file on the host, where only its owner reads it; return its name there."""
        self._transfer_file(str(local), remote)
        self._remote_chmod([remote], "0600")
        return remote


def _about(reading: state.Reading) -> dict[str, Any]:
    return {
        "domain": reading.domain,
        "domains": list(reading.domains),
        "units": reading.units,
        "people": reading.people,
        "applications": reading.applications,
        **({"warnings": reading.warnings} if reading.warnings else {}),
    }


def _resets(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the resets without grounds that are empty."""
    return [{"id": item["id"], "refs": {name: ref for name, ref in item["refs"].items() if ref}} for item in given]


def _only(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: mapping[name] for name in names if name in mapping}


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Give a folder on the controller that only this user reads and that is gone afterwards."""
    folder = tempfile.mkdtemp(dir=C.DEFAULT_LOCAL_TMP)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder)


def _working_copy(plan_file: str) -> Path:
    """Return where the plan waits, between the two steps, as the host made it."""
    return Path(f"{plan_file}.work")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_folder(folder: Path) -> str:
    """Return a digest over the names and the content of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = "".join(f"{path.relative_to(folder)}\0{_sha256(path)}\n" for path in files)
    return hashlib.sha256(f"{folder.resolve()}\n{parts}".encode()).hexdigest()
