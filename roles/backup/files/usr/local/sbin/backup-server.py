#!/usr/bin/python3
"""backup-server: keep the repository: serve, look, check, prune, copy. For its units; `status` for everybody."""

import sys

sys.path.insert(0, "/usr/local/lib/mail-backup")

from mail_backup.server import main

if __name__ == "__main__":
    sys.exit(main())
