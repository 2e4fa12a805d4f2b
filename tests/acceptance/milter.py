"""The mail filter as the tests change it: a setting for a while, or its daemons stopped."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from service import Service, wait

# The test pattern that every spam filter knows.
GTUBE = "XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
SETTINGS = "/etc/rspamd/rspamd.conf.override"
BAYES = "/etc/rspamd/override.d/classifier-bayes.conf"
ACTIONS = "/etc/rspamd/override.d/actions.conf"
MILTER = "exec 3<>/dev/tcp/127.0.0.1/11332"


def filter_hosts(service: Service) -> list[str]:
    """The hosts that filter mail, the one that serves users first."""
    store = service.in_group("mailstore")
    return store + [host for host in service.in_group("mx") if host not in store]


def await_filter(service: Service, host: str) -> None:
    """Wait until the Rspamd of a host takes mail again."""
    answers: Callable[[], bool] = lambda: service.inside(host).run(f"bash -c '{MILTER}'").rc == 0  # noqa: E731
    wait(f"Rspamd on {host} is back", answers, 60)


@contextmanager
def setting(service: Service, file: str, changes: dict[str, str]) -> Iterator[None]:
    """The time with texts of a file of Rspamd's replaced, old by new, on all hosts that filter."""
    kept = shlex.quote(f"/run/{file.rpartition('/')[2]}.kept")
    hosts = filter_hosts(service)
    try:
        for host in hosts:
            text = service.run(host, f"cp -p {file} {kept} && cat {file}")
            for old, new in changes.items():
                assert text.count(old) == 1, f"{old!r} in {file} on {host}"
                text = text.replace(old, new)
            service.run(host, f"printf '%s\n' {shlex.quote(text)} > {file} && systemctl restart rspamd")
        for host in hosts:
            await_filter(service, host)
        yield
    finally:
        for host in hosts:
            service.run(host, f"if [ -e {kept} ]; then mv {kept} {file} && systemctl restart rspamd; fi")
        for host in hosts:
            await_filter(service, host)


@contextmanager
def without(service: Service, unit: str, hosts: list[str]) -> Iterator[None]:
    """The time without a daemon of the filter on hosts; the filter runs again afterwards, whatever happened."""
    with ExitStack() as stack:
        for host in hosts:
            stack.callback(await_filter, service, host)
            stack.callback(service.run, host, f"systemctl start {unit}")
            service.run(host, f"systemctl stop {unit}")
        yield
