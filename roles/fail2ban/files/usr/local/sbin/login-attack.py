#!/usr/bin/python3
"""login-attack ADDRESS JAIL FAILURES: raise the alarm that an address is shut out, and lift the locks that it caused.

The directory locks a login after so many wrong passwords, whoever typed them. When those who are not shut out could
not have caused the lock by themselves, it goes, on every provider at once: they learn from each other a moment later.
"""

import ast
import ipaddress
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import ldap
import ldap.filter
from systemd import journal

SETTINGS = Path("/etc/fail2ban/lift.json")
RAISED = Path("/run/fail2ban/alarms")
# As in filter.d/hopthu-dovecot.conf; logins that do not exist have no lock.
DOVECOT = re.compile(
    r"auth\((?P<login>[^,()<>]+),(?P<address>[^,]+),sasl:[a-z0-9-]+\)<[^<>]*>: ldap(?:-first)?: Password mismatch"
)
SLAPD = re.compile(r"login failed: address=(?P<address>\S+) dn=(?P<dn>'.*'|\".*\")$")
# What had reached the daemons when the ban came is still counted by the directory: look again after these seconds.
AGAIN = (0, 3, 3, 4, 5, 5, 10, 30)
# So many attackers at once: the lock is what protects the login.
ATTACKERS = 20


def source(address):
    """The network that is shut out with an address: an IPv4 address itself, an IPv6 address's /64."""
    parsed = ipaddress.ip_address(address.removeprefix("::ffff:"))
    return ipaddress.ip_network((parsed, 64 if parsed.version == 6 else 32), strict=False)


def within(network, networks):
    """Whether a network lies in one of `networks`, or one of them in it."""
    return any(network.version == other.version and network.overlaps(other) for other in networks)


def alarm(address, jail, failures):
    """Raise the alarm, once per source and hour."""
    RAISED.mkdir(mode=0o700, exist_ok=True)
    note = RAISED / str(source(address)).replace("/", "_")
    if note.exists() and time.time() - note.stat().st_mtime < 3600:
        return
    note.touch()
    text = f"{address} is shut out: {failures} logins failed ({jail})"
    # Outside of fail2ban's confinement, which sends no mail.
    command = ["systemd-run", "--quiet", "--collect", "/usr/local/sbin/alarm", "login-attack", text]
    subprocess.run(command, check=True)


def banned():
    """The networks that are shut out now."""
    found = []
    for name in "banned4", "banned6":
        answer = subprocess.run(["nft", "-j", "list", "set", "inet", "fail2ban", name], check=True, capture_output=True)
        for item in json.loads(answer.stdout)["nftables"]:
            for element in item.get("set", {}).get("elem", []):
                value = element["elem"]["val"] if isinstance(element, dict) and "elem" in element else element
                if isinstance(value, dict) and "prefix" in value:
                    value = f"{value['prefix']['addr']}/{value['prefix']['len']}"
                if isinstance(value, str):
                    found.append(ipaddress.ip_network(value))
    return found


def recent_failures(seconds, trusted):
    """Failed logins of the last `seconds`: list of (name, source), name: ("mail", login) or ("dn", name in LDAP).

    trusted: networks. What Dovecot asks slapd for a client comes from there; its own line names the client.
    """
    reader = journal.Reader()
    reader.add_match(_SYSTEMD_UNIT="dovecot.service")
    reader.add_disjunction()
    reader.add_match(_SYSTEMD_UNIT="ldap-logins.service")
    reader.seek_realtime(time.time() - seconds)
    found = []
    for entry in reader:
        text = str(entry.get("MESSAGE", ""))
        if line := DOVECOT.match(text):
            found.append((("mail", line["login"]), source(line["address"])))
        # The address itself: an attacker may share a /64 with a host of ours.
        elif (line := SLAPD.match(text)) and not within(
            ipaddress.ip_network(line["address"].removeprefix("::ffff:")), trusted
        ):
            found.append((("dn", ast.literal_eval(line["dn"])), source(line["address"])))
    return found


def to_lift(failures, attacker, shut_out, limit):
    """Names among `failures` (name, source) that `attacker` failed with and whose lock is not deserved otherwise.

    shut_out: networks; limit: failures after which the directory locks.
    """
    names = {name for name, where in failures if where == attacker}
    for name in sorted(names):
        sources = [where for other, where in failures if other == name]
        outside = [where for where in sources if not within(where, shut_out)]
        if len(outside) < limit and len(set(sources) - set(outside)) <= ATTACKERS:
            yield name


def lift(name, settings):
    """Take the lock from a login, on every provider that has one."""
    for uri in settings["uris"]:
        directory = ldap.initialize(uri)
        directory.set_option(ldap.OPT_X_TLS_CACERTFILE, settings["ca"])
        directory.set_option(ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_DEMAND)
        directory.set_option(ldap.OPT_X_TLS_NEWCTX, 0)
        directory.set_option(ldap.OPT_NETWORK_TIMEOUT, 5)
        directory.timeout = 5
        directory.simple_bind_s(settings["dn"], settings["password"])
        wanted = ["pwdAccountLockedTime", "pwdFailureTime"]
        kind, value = name
        if kind == "mail":
            where = settings["base"], ldap.SCOPE_SUBTREE, ldap.filter.filter_format("(mail=%s)", [value])
        else:
            where = value, ldap.SCOPE_BASE, "(pwdFailureTime=*)"
        try:
            answer = directory.search_s(*where, wanted)
        except (ldap.NO_SUCH_OBJECT, ldap.INVALID_DN_SYNTAX):
            answer = []
        for dn, values in answer:
            if "pwdAccountLockedTime" in values:
                directory.modify_s(dn, [(ldap.MOD_DELETE, "pwdAccountLockedTime", None)])
                print(f"the lock of {dn} is lifted: it came from addresses that are shut out", flush=True)
        directory.unbind_s()


def main():
    """Do what a ban asks for; the second part goes on behind fail2ban's back, which waits for this one."""
    if sys.argv[1] != "--lift":
        address, jail, failures = sys.argv[1:]
        alarm(address, jail, failures)
        log = journal.stream("login-attack")
        subprocess.Popen([sys.argv[0], "--lift", address], stdout=log, stderr=log, start_new_session=True)
        return
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    attacker = source(sys.argv[2])
    trusted = [ipaddress.ip_network(network) for network in settings["trusted"]]
    for seconds in AGAIN if settings["uris"] else ():
        time.sleep(seconds)
        failures = recent_failures(settings["seconds"], trusted)
        for name in to_lift(failures, attacker, banned(), settings["failures"]):
            lift(name, settings)


if __name__ == "__main__":
    main()
