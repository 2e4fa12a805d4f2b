#!/usr/bin/python3
"""mail-backup: back up this host, see what came of it. For root."""

import sys

sys.path.insert(0, "/usr/local/lib/mail-backup")

from mail_backup.commands import main

if __name__ == "__main__":
    sys.exit(main())
