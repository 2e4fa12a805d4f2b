#!/usr/bin/python3
"""slapd-watch: kills a slapd that takes connections and answers none, so that systemd starts it anew.

Its clients would wait for it: the kernel takes their connections, and what they have asked is never answered. With its
end their connections end too, and they turn to the peer. A slapd that is down is systemd's matter.
"""

import subprocess
import sys
import time

import ldap

UNIT = "slapd.service"
EVERY = 1  # seconds
ANSWER = 2  # seconds that an answer may take
SILENCES = 2  # so many in a row are enough
START = 30  # seconds that a slapd is left alone after it was started


def answers():
    """Tell whether slapd gives its root entry in time; also True when there is none that takes connections."""
    session = ldap.initialize("ldapi:///")
    session.set_option(ldap.OPT_NETWORK_TIMEOUT, ANSWER)
    session.set_option(ldap.OPT_TIMEOUT, ANSWER)
    try:
        session.search_ext_s("", ldap.SCOPE_BASE, attrlist=["1.1"], timeout=ANSWER)
    except ldap.TIMEOUT:
        return False
    except ldap.LDAPError:
        return True
    finally:
        session.unbind_ext()
    return True


def settled():
    """Tell whether slapd's unit runs, and has done so for a while."""
    names = ["ActiveState", "ActiveEnterTimestampMonotonic"]
    command = ["systemctl", "show", *(f"--property={name}" for name in names), UNIT]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    state = dict(item.split("=", 1) for item in shown)
    since = int(state["ActiveEnterTimestampMonotonic"]) / 1e6
    return state["ActiveState"] == "active" and time.clock_gettime(time.CLOCK_MONOTONIC) - since > START


def main():
    """Watch for ever."""
    silences = 0
    while True:
        time.sleep(EVERY)
        silences = 0 if answers() else silences + 1
        if silences < SILENCES or not settled():
            continue
        text = f"slapd takes connections and has not answered for {SILENCES * ANSWER} s: it is killed and starts anew"
        print(text, flush=True)
        subprocess.run(["systemctl", "kill", "--signal=KILL", UNIT], check=True)
        silences = 0


if __name__ == "__main__":
    sys.exit(main())
