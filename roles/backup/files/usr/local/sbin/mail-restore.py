#!/usr/bin/python3
"""mail-restore: bring back what a backup holds. For root; mail_backup/restoring.py says how."""

import sys

sys.path.insert(0, "/usr/local/lib/mail-backup")

from mail_backup import restoring

if __name__ == "__main__":
    sys.exit(restoring.main())
