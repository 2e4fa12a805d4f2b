#!/usr/bin/python
"""Tell whether running units have read their files since they last changed."""

from __future__ import annotations

DOCUMENTATION = r"""
module: unit_current
short_description: Tell whether running units have read their files since they last changed
description:
  - Reports C(changed) when a file is newer than the last start or reload of its unit, and so notifies
    the handler that reloads it. A notification given by the task that writes the file would be lost when
    the run is killed before its handlers; this state is not.
  - Writes nothing itself. A unit that is not running is not stale; starting it is another task's business.
options:
  units:
    description:
      - Name of each systemd unit, and the files, or folders whose files count, that it reads.
        What does not exist does not count.
    type: dict
    required: true
author: Hộp Thư
"""

EXAMPLES = r"""
- name: Notice when Dovecot runs with older files
  unit_current:
    units:
      dovecot.service: [/etc/dovecot, /etc/ssl/hopthu/cert.pem]
  notify: Reload Dovecot
"""

RETURN = r"""
stale:
  description: Units that run with older files, and the files; empty for a unit that systemd must read anew.
  type: dict
  returned: always
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

TIMESTAMP = "%a %Y-%m-%d %H:%M:%S.%f UTC"


def last_read(module, unit):
    """Return (is it running, must systemd reread the unit, seconds since the epoch of its last start or reload)."""
    wanted = "ActiveState,NeedDaemonReload,StateChangeTimestamp"
    # The clock's own time, like that of the files: one taken from the time since the boot moves when the clock is set.
    command = ["systemctl", "show", unit, "--timestamp=us+utc", "--property", wanted]
    _rc, out, _err = module.run_command(command, check_rc=True)
    values = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    changed = values.get("StateChangeTimestamp")
    started = datetime.strptime(changed, TIMESTAMP).replace(tzinfo=UTC).timestamp() if changed else 0
    return values.get("ActiveState") == "active", values.get("NeedDaemonReload") == "yes", started


def change_times(paths):
    """Yield (file, time of its last change): ctime, which a copy that keeps the old mtime cannot fool."""
    for path in map(Path, paths):
        # What Python keeps of a module that somebody has run is no file that the unit was given.
        files = [p for p in path.rglob("*") if p.is_file() and p.suffix != ".pyc"] if path.is_dir() else [path]
        for file in files:
            if file.exists():
                yield str(file), os.stat(file).st_ctime


def main():
    """Module entry point."""
    module = AnsibleModule(
        argument_spec={"units": {"type": "dict", "required": True}},
        supports_check_mode=True,
    )
    stale = {}
    for unit, files in module.params["units"].items():
        running, reread, started = last_read(module, unit)
        newer = sorted(file for file, changed in change_times(files) if changed > started)
        if running and (newer or reread):
            stale[unit] = newer
    module.exit_json(changed=bool(stale), stale=stale)


if __name__ == "__main__":
    main()
