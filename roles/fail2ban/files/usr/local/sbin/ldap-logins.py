#!/usr/bin/python3
"""Write one line for each failed LDAP login, with the address that it came from.

slapd tells the address when a connection begins and the failure when an operation ends; between the two may lie hours
and any number of other lines. Its lines begin with the number of the connection, which no client can choose.
"""

import re
import time

from systemd import journal

LINE = re.compile(
    r"conn=(?P<conn>\d+) (?:"
    r"fd=\d+ ACCEPT from IP=(?P<address>\S+):\d+ \(|"
    r"fd=\d+ (?P<closed>closed)|"
    r'op=\d+ BIND dn="(?P<dn>.*)" method=\d+$|'
    r"op=\d+ RESULT tag=97 (?P<failed>err=49) )"
)
# Connections that began before this program did are looked up that far back; slapd ends idle ones sooner.
BACK = 3600


def failures(lines):
    """Yield (address, dn) for each line of slapd that tells a failed login.

    lines: (process, text) in the order of the log, process: slapd's, for the numbers begin anew with it.
    """
    addresses, names = {}, {}
    for process, text in lines:
        found = LINE.match(text.strip())
        if not found:
            continue
        key = process, found["conn"]
        if found["address"]:
            addresses[key] = found["address"].strip("[]")
        elif found["closed"]:
            addresses.pop(key, None)
            names.pop(key, None)
        elif found["dn"] is not None:
            names[key] = found["dn"]
        elif key in addresses:
            yield addresses[key], names.get(key, "")


def slapd_lines(started, fresh):
    """Yield slapd's lines for ever; `fresh` gets True once they are newer than `started` (seconds since the epoch)."""
    reader = journal.Reader()
    reader.add_match(_SYSTEMD_UNIT="slapd.service")
    reader.seek_realtime(started - BACK)
    while True:
        for entry in reader:
            fresh.append(entry["__REALTIME_TIMESTAMP"].timestamp() >= started)
            del fresh[:-1]
            yield entry.get("_PID"), str(entry.get("MESSAGE", ""))
        reader.wait(5)


def main():
    """Follow the journal."""
    fresh = [False]
    for address, dn in failures(slapd_lines(time.time(), fresh)):
        if fresh[-1]:
            print(f"login failed: address={address} dn={ascii(dn)}", flush=True)


if __name__ == "__main__":
    main()
