#!/usr/bin/python3
"""mail-rehearse: prove that the backups can be restored. For root; mail_backup/rehearse.py says how."""

import sys

sys.path.insert(0, "/usr/local/lib/mail-backup")

from mail_backup import rehearse

if __name__ == "__main__":
    sys.exit(rehearse.main())
