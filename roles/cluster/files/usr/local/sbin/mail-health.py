#!/usr/bin/python3
"""Look every two seconds at what users need of this host, tell the cluster, and mend what hangs.

The probes are in /etc/mail-health.json. A host that fails one of them for long enough is red, one whose probes all
answer is green: the node attribute #health-mail, by which Pacemaker moves the service. /run/mail-health/status.json
says what was found.
"""

import contextlib
import ctypes
import imaplib
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

SETTINGS = Path("/etc/mail-health.json")
STATUS = Path("/run/mail-health/status.json")
# The least time, in seconds, and number of failures in a row until a probe counts as failed: a daemon that systemd
# starts anew after a second moves nothing.
FAILED_SECONDS, FAILED_TIMES = 4, 2
# After so many good answers in a row it is well again.
GOOD_TIMES = 3
# Mended after so many seconds; on the host that holds the service later, when nobody has taken it over meanwhile.
MEND_SECONDS, MEND_HOLDER_SECONDS, MEND_AGAIN_SECONDS = 15, 40, 300
MENDED_STATES = ("active", "activating", "reloading", "failed")
# How long a unit may take to stop before it is killed, in seconds.
STOP_SECONDS = 15
# Between two looks at the cluster; before the first one a host that starts has time to join.
CLUSTER_SECONDS, JOIN_SECONDS = 5, 40
REASSERT_SECONDS = 60
CLOCK_SECONDS = 600
LDAP_SESSION_SECONDS = 30


# What a probe and a disk have when the settings do not say it.
PROBE = {"address": "127.0.0.1", "tls": "none", "seconds": 2}
DISK = {"min_mib": 0, "min_percent": 0}


class ProbeFailed(Exception):
    """What a daemon answered instead of what it should; the message is one clause without secrets."""


# --- judgement: pure, times in seconds of one clock ------------------------------------------


class Verdict:
    """Whether a probe counts as failed, from its single results.

    It begins as failed: a host must have shown that it can serve before the service comes to it.
    """

    def __init__(self):
        self.failed = True
        self.since = None  # when the first of the failures in a row began
        self.failures = self.successes = 0
        self.reason = "not looked at yet"

    def good(self):
        """Take in a good answer."""
        self.since, self.failures = None, 0
        self.successes += 1
        if self.successes >= GOOD_TIMES:
            self.failed = False
            self.reason = ""

    def bad(self, began, now, reason):
        """Take in a failure: of a probe that began at `began`, known at `now`."""
        self.successes = 0
        self.failures += 1
        self.reason = reason
        if self.since is None:
            self.since = began
        if self.failures >= FAILED_TIMES and now - self.since >= FAILED_SECONDS:
            self.failed = True

    def failing(self, now):
        """Seconds since the failures in a row began; 0 when the last answer was good."""
        return now - self.since if self.since is not None else 0


def unit_to_mend(found, mended, now, is_holder):
    """Return the unit that is to be started anew, or None.

    found: (unit or None, Verdict) of each probe, in the order in which they depend on each other: while one is mended,
    those after it get their time. mended: unit to when it was last.
    """
    if any(now - when < MEND_SECONDS for when in mended.values()):
        return None
    patience = MEND_HOLDER_SECONDS if is_holder else MEND_SECONDS
    for unit, verdict in found:
        last = mended.get(unit)
        if unit and verdict.failed and verdict.failing(now) >= patience:
            if last is None or now - last >= MEND_AGAIN_SECONDS:
                return unit
            return None
    return None


def disk_problem(disk, free, total):
    """Return why a disk has too little room, or "".

    disk: {path, min_mib, min_percent}; free, total: octets for ordinary users.
    """
    least = max(disk["min_mib"] * 2**20, total * disk["min_percent"] // 100)
    if free >= least:
        return ""
    return f"{disk['path']} has {free // 2**20} MiB left, {least // 2**20} are the least"


def quorum_view(text):
    """Return {quorate, members, device} of what `corosync-quorumtool -s` prints; members counts hosts."""
    flags = re.search(r"^Flags:\s*(.*)$", text, re.M)
    device = re.search(r"^\s*0x0+\s+(\d+)\s.*Qdevice", text, re.M) or re.search(r"^\s*0\s+(\d+)\s.*Qdevice", text, re.M)
    nodes = re.search(r"^Nodes:\s*(\d+)$", text, re.M)
    return {
        "quorate": bool(re.search(r"^Quorate:\s*Yes$", text, re.M)),
        "members": int(nodes[1]) if nodes else 0,
        "device": bool(flags and "Qdevice" in flags[1] and device and int(device[1]) > 0),
    }


def cluster_alarms(before, after, size, node):
    """Yield (name, text) of the alarms for a change of the cluster as this host sees it; before is None at first."""
    if before is None:
        before = {"quorate": True, "members": size, "device": True, "holder": after["holder"]}
    if before["quorate"] and not after["quorate"]:
        yield (
            "cluster-quorum",
            f"{node} has lost quorum: it does not hold the service before it sees another host again",
        )
    if after["members"] < min(before["members"], size):
        yield "cluster-peer", f"{node} does not see the other host any more"
    if before["device"] and not after["device"]:
        yield "cluster-witness", f"{node} has lost the witness: if another host fails too, the service stops"
    if after["holder"] and not before["holder"]:
        yield "service-moved", f"the service has moved to {node}"


# --- probes ----------------------------------------------------------------------------------


def tls_context():
    """TLS without a look at the certificate: it is the host's own, at a loopback address, and watched elsewhere."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connected(probe, timeout):
    """Return a connection to a probe's daemon, with TLS where the probe says that it begins with it."""
    connection = socket.create_connection((probe["address"], probe["port"]), timeout)
    if probe["tls"] != "implicit":
        return connection
    try:
        return tls_context().wrap_socket(connection)
    except BaseException:
        connection.close()
        raise


def expect(stream, code):
    """Read one reply of SMTP or LMTP; ProbeFailed when it has another code."""
    while True:
        line = stream.readline(2000)
        if not line:
            raise ProbeFailed("closed the connection")
        if not line.startswith(code):
            raise ProbeFailed(f"answered {line[:60].decode(errors='replace').strip()!r}")
        if line[3:4] != b"-":
            return


def probe_greeting(probe, timeout):
    """SMTP: the greeting. LMTP: the greeting and what follows LHLO."""
    with connected(probe, timeout) as connection, connection.makefile("rb") as stream:
        expect(stream, b"220")
        if probe["kind"] == "lmtp":
            connection.sendall(b"LHLO localhost\r\n")
            expect(stream, b"250")
        connection.sendall(b"QUIT\r\n")
        expect(stream, b"221")


def probe_imap(probe, timeout):
    """Log in, open INBOX, log out."""
    if probe["tls"] == "implicit":
        session = imaplib.IMAP4_SSL(probe["address"], probe["port"], ssl_context=tls_context(), timeout=timeout)
    else:
        session = imaplib.IMAP4(probe["address"], probe["port"], timeout=timeout)
    try:
        if probe["tls"] == "starttls":
            session.starttls(tls_context())
        session.login(probe["login"], probe["password"])
        if session.select("INBOX", readonly=True)[0] != "OK":
            raise ProbeFailed("INBOX cannot be opened")
        session.logout()
    except imaplib.IMAP4.error as error:
        raise ProbeFailed(f"answered {str(error)[:80]!r}") from None
    finally:
        with contextlib.suppress(OSError):
            session.shutdown()


class LdapProbe:
    """A modification that changes nothing: to add a value that is there already. slapd takes the writer's lock for it.

    The session is kept for a while: a login in every round would be most of slapd's log.
    """

    def __init__(self):
        self.session = None
        self.began = 0.0

    def __call__(self, probe, timeout):
        import ldap

        try:
            if self.session and time.monotonic() - self.began > LDAP_SESSION_SECONDS:
                self.close()
            if not self.session:
                self.open(probe, timeout)
            self.session.modify_ext_s(probe["login"], [(ldap.MOD_ADD, "description", [b"probe"])])
        except ldap.TYPE_OR_VALUE_EXISTS:
            return
        except ldap.LDAPError as error:
            self.close()
            raise ProbeFailed(f"answered {type(error).__name__}") from None
        self.close()
        raise ProbeFailed("the value of the probe was not there yet")

    def open(self, probe, timeout):
        """Log in."""
        import ldap

        scheme = "ldaps" if probe["tls"] == "implicit" else "ldap"
        self.session = ldap.initialize(f"{scheme}://{probe['address']}:{probe['port']}")
        self.began = time.monotonic()
        for option, value in [
            (ldap.OPT_NETWORK_TIMEOUT, timeout),
            (ldap.OPT_TIMEOUT, timeout),
            (ldap.OPT_X_TLS_REQUIRE_CERT, ldap.OPT_X_TLS_NEVER),  # see tls_context
            (ldap.OPT_X_TLS_NEWCTX, 0),
        ]:
            self.session.set_option(option, value)
        if probe["tls"] == "starttls":
            self.session.start_tls_s()
        self.session.simple_bind_s(probe["login"], probe["password"])

    def close(self):
        """Drop the session."""
        if self.session:
            with contextlib.suppress(Exception):
                self.session.unbind_ext_s()
        self.session = None


class Watch(threading.Thread):
    """Run one probe again and again. Its verdict is the main thread's to read, under `lock`."""

    def __init__(self, probe, timeout):
        super().__init__(daemon=True, name=probe["name"])
        self.probe, self.timeout = probe, timeout
        self.look = {"imap": probe_imap, "ldap": LdapProbe()}.get(probe["kind"], probe_greeting)
        self.verdict, self.lock = Verdict(), threading.Lock()
        self.began = time.monotonic()
        self.overdue = False

    def run(self):
        while True:
            began = time.monotonic()
            with self.lock:
                self.began, self.overdue = began, False
            try:
                self.look(self.probe, self.timeout)
                reason = ""
            except ProbeFailed as error:
                reason = str(error)
            except TimeoutError:
                reason = f"no answer within {self.timeout:g} s"
            except OSError as error:
                reason = error.strerror or type(error).__name__
            now = time.monotonic()
            with self.lock:
                if reason:
                    self.verdict.bad(began, now, reason)
                else:
                    self.verdict.good()
                pause = self.probe["seconds"] if not reason else min(1, self.probe["seconds"])
            time.sleep(max(0.2 if reason else 0, began + pause - now))

    def judge(self, now):
        """Count a round that hangs in spite of its time limits as failures, and return the verdict."""
        with self.lock:
            late = now - self.began - 2 * self.timeout - self.probe["seconds"]
            if late > 0 and not self.overdue:
                self.overdue = True
                for _ in range(FAILED_TIMES):
                    self.verdict.bad(self.began, now, "hangs")
            return self.verdict


# --- the host --------------------------------------------------------------------------------


def run(*command, timeout=5):
    """Run a command; return (exit code, what it printed), (None, "") when it cannot be run or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return done.returncode, done.stdout


def alarm(name, text):
    """Raise an alarm, outside this unit's confinement, in which no mail can be sent."""
    print(f"{name}: {text}", flush=True)
    run("systemd-run", "--quiet", "--collect", "--no-block", "/usr/local/sbin/alarm", name, text)


def is_active(unit):
    """Whether a unit is active."""
    return run("systemctl", "is-active", "--quiet", unit)[0] == 0


def clock_is_synchronized():
    """Whether the kernel's clock follows a time server (adjtimex without the flag STA_UNSYNC)."""
    buffer = (ctypes.c_long * 64)()
    ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    return not ctypes.cast(buffer, ctypes.POINTER(ctypes.c_int))[10] & 0x40


def restart(unit):
    """Start a unit anew; what does not stop in time is killed. Returns when systemd has done it or never will."""
    run("systemctl", "restart", "--no-block", unit)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        time.sleep(1)
        if run("systemctl", "show", unit, "--property=Job", "--value")[1].strip() in ("", "0"):
            return
    run("systemctl", "kill", "--signal=KILL", unit)


def notify(text):
    """Tell systemd, where it asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            connection.send(text.encode())


class Host:
    """What the daemon knows of its host."""

    def __init__(self, settings):
        self.node, self.size = settings["node"], settings["nodes"]
        self.watches = [Watch(PROBE | probe, settings["timeout"]) for probe in settings["probes"]]
        self.disks = [DISK | disk for disk in settings["disks"]]
        self.health, self.told, self.told_at = "", "", 0.0
        self.mended, self.mending = {}, None
        self.view, self.look_at = None, time.monotonic() + JOIN_SECONDS
        self.unsynchronized_since = None
        self.raised = set()

    def holder(self):
        """Whether this host holds the service."""
        return is_active("holder.target")

    def find(self, now):
        """Return what is wrong, one clause each; empty when all is well."""
        wrong = []
        for watch in self.watches:
            verdict = watch.judge(now)
            if verdict.failed:
                wrong.append(f"{watch.probe['name']}: {verdict.reason}")
        for disk in self.disks:
            try:
                found = os.statvfs(disk["path"])
                problem = disk_problem(disk, found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)
            except OSError as error:
                problem = f"{disk['path']}: {error.strerror}"
            if problem:
                wrong.append(problem)
        return wrong

    def tell(self, now):
        """Tell Pacemaker the host's health, when it changed and from time to time."""
        if self.size < 2 or (self.told == self.health and now - self.told_at < REASSERT_SECONDS):
            return
        code, _ = run("attrd_updater", "--name", "#health-mail", "--update", self.health)
        self.told, self.told_at = (self.health if code == 0 else ""), now

    def look_at_cluster(self, now):
        """Raise the alarms about the cluster and about the clock."""
        if now < self.look_at:
            return
        self.look_at = now + CLUSTER_SECONDS
        if self.size > 1:
            _, text = run("corosync-quorumtool", "-s")
            view = quorum_view(text) | {"holder": self.holder()}
            for name, words in cluster_alarms(self.view, view, self.size, self.node):
                alarm(name, words)
            self.view = view
        if clock_is_synchronized() or not is_active("chrony.service"):
            self.unsynchronized_since = None
            self.raised.discard("clock")
        elif self.unsynchronized_since is None:
            self.unsynchronized_since = now
        elif now - self.unsynchronized_since > CLOCK_SECONDS and "clock" not in self.raised:
            self.raised.add("clock")
            alarm("clock", f"the clock of {self.node} follows no time server any more")

    def mend(self, now):
        """Start a failed unit anew, in a thread of its own."""
        if self.mending and self.mending.is_alive():
            return
        found = [(watch.probe.get("unit"), watch.verdict) for watch in self.watches]
        if not any(verdict.failed for _, verdict in found):
            return
        holds = self.size > 1 and self.holder()
        unit = unit_to_mend(found, self.mended, now, holds)
        # What somebody has stopped, a playbook perhaps, stays so.
        if unit and run("systemctl", "show", unit, "--property=ActiveState", "--value")[1].strip() in MENDED_STATES:
            self.mended[unit] = now
            alarm("self-healing", f"{unit} on {self.node} does not answer: it is started anew")
            self.mending = threading.Thread(target=restart, args=(unit,), daemon=True)
            self.mending.start()

    def round(self, began):
        """Look once; began: when the daemon did."""
        now = time.monotonic()
        wrong = self.find(now)
        if not wrong and self.health != "green":
            print(f"{self.node} can serve", flush=True)
        # A daemon that has just begun to look is red without having found anything: no alarm before it could.
        if wrong and "host-red" not in self.raised and (self.health == "green" or now - began > MEND_SECONDS):
            self.raised.add("host-red")
            alarm("host-red", f"{self.node} cannot serve: {'; '.join(wrong)}")
        if not wrong:
            self.raised.discard("host-red")
        self.health = "red" if wrong else "green"
        self.tell(now)
        self.look_at_cluster(now)
        self.mend(now)
        self.write(now, wrong)

    def write(self, now, wrong):
        """Write the status file."""
        status = {
            "health": self.health,
            "wrong": wrong,
            "told": self.told,
            "cluster": self.view,
            "probes": {
                watch.probe["name"]: {
                    "failed": watch.verdict.failed,
                    "failing_seconds": round(watch.verdict.failing(now), 1),
                    "reason": watch.verdict.reason,
                }
                for watch in self.watches
            },
            "time": int(time.time()),
        }
        new = STATUS.with_suffix(".new")
        new.write_text(json.dumps(status) + "\n", encoding="utf-8")
        new.replace(STATUS)


def main():
    """Watch for ever."""
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    host = Host(settings)
    for watch in host.watches:
        watch.start()
    notify("READY=1")
    began = time.monotonic()
    while True:
        host.round(began)
        if all(watch.is_alive() for watch in host.watches):
            notify("WATCHDOG=1")
        time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
