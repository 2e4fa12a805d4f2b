#!/usr/bin/python3
"""mail-journal: what Postfix has accepted, on both hosts before the 250. For root."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, "/usr/local/lib/mail-journal")

SETTINGS = Path("/etc/mail-journal/settings.json")
ALARMS = Path("/run/mail-journal/alarm")


def raise_alarms() -> None:
    """Raise the alarms that the daemon, which may not, has laid down."""
    for path in sorted(ALARMS.iterdir()):
        text = path.read_text(encoding="utf-8", errors="replace")
        path.unlink()
        subprocess.run(["/usr/local/sbin/alarm", path.name, text], check=True)


def main() -> int:
    """Entry point; 1 when a replay left something for later, 2 when it was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("daemon", help="take what Postfix accepts")
    commands.add_parser("check", help="see that settings and program can be read")
    commands.add_parser("alarms", help="raise the alarms that the daemon asks for")
    commands.add_parser("status", help="the daemon's state, as JSON")
    lists = commands.add_parser("list", help="entries: metadata only, one JSON object a line")
    lists.add_argument("--alone", action="store_const", const="alone", dest="which", help="on this host alone")
    lists.add_argument("--unsettled", action="store_const", const="unsettled", dest="which", help="not yet safe")
    commands.add_parser("settle", help="at a takeover: note what is in its mailbox here")
    drops = commands.add_parser(
        "drop-replayed", help="before Postfix starts: delete from the queue what the peer replayed"
    )
    drops.add_argument("--wait", type=float, default=15, metavar="SECONDS", help="for the peer to tell")
    asks = commands.add_parser(
        "is-replayed", help="exit code 0 when a replay has brought this message back, 1 when not"
    )
    asks.add_argument("id", help="the message's X-Journal-Id")
    replays = commands.add_parser("replay", help="bring back what a lost host took with it")
    replays.add_argument("--lost", required=True, help="full name of the lost host")
    replays.add_argument("--rebuilt", action="store_true", help="it answers, for it was made anew")
    replays.add_argument("--dry-run", action="store_true", help="only tell")
    arguments = parser.parse_args()
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    if arguments.command in ("daemon", "check"):
        from mail_journal import daemon

        if arguments.command == "daemon":
            daemon.main(settings)
        return 0
    if arguments.command == "alarms":
        raise_alarms()
        return 0
    from mail_journal import replay

    try:
        if arguments.command == "list":
            for line in replay.listing(arguments.which or "all"):
                print(json.dumps(line))
        elif arguments.command == "status":
            print(json.dumps(replay.request(do="status")))
        elif arguments.command == "drop-replayed":
            print(f"{replay.drop_replayed(settings, arguments.wait)} messages had been brought back by the peer")
        elif arguments.command == "is-replayed":
            return 0 if replay.is_replayed(arguments.id) else 1
        elif arguments.command == "settle":
            print(json.dumps(replay.settle(settings)))
        else:
            result = replay.replay(settings, arguments.lost, rebuilt=arguments.rebuilt, dry=arguments.dry_run)
            print(json.dumps(result))
            return 1 if result["failed"] else 0
    except replay.Refused as refusal:
        print(f"Refused: {refusal}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
