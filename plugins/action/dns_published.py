"""Action ``dns_published``: compare what a province must publish for its mail with what DNS says."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import dns.exception
import dns.flags
import dns.rdatatype
import dns.resolver
from ansible.plugins.action import ActionBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "filter"))

from mail_dns import differences, questions


class Unanswered(Exception):
    """No answer came: one sentence that says from whom."""


class ActionModule(ActionBase):
    """Ask for every record of ``zones`` (rows of the filter mail_zones) and say what is wrong.

    Arguments: ``zones``, ``servers`` (addresses, each of which is asked; the controller's own resolvers when empty).
    Fails with one sentence for each record that is missing, different or too many; what is only untidy, and a zone
    without DNSSEC, is a warning. Changes nothing.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset({"zones", "servers"})

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return ``failed`` with all findings in ``msg``, or how many records are as they must be."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        zones = self._task.args["zones"]
        wrong: dict[str, None] = {}
        tidy: dict[str, None] = {}
        try:
            for resolver in resolvers(self._task.args["servers"]):
                for zone in zones:
                    published = {(name, kind): ask(resolver, name, kind) for name, kind in questions(zone)}
                    found = differences(zone, published)
                    wrong.update(dict.fromkeys(found[0]))
                    tidy.update(dict.fromkeys(found[1]))
                    if not signed(resolver, zone["domain"]):
                        tidy[f"{zone['domain']} is not signed (DNSSEC): others cannot use its TLSA records."] = None
        except Unanswered as error:
            wrong[str(error)] = None
        if tidy:
            result["warnings"] = list(tidy)
        count = sum(len(zone["records"]) for zone in zones)
        result.update(msg=f"{count} records are published as they must be.")
        if wrong:
            result.update(failed=True, msg="\n".join(wrong))
        return result


def resolvers(servers: Iterable[str]) -> list[dns.resolver.Resolver]:
    """Return one resolver for each server; the controller's own when there are none."""
    found = []
    for server in servers:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers = [server]
        found.append(resolver)
    for resolver in found or (found := [dns.resolver.Resolver()]):
        resolver.lifetime = 10
        resolver.use_edns(0, dns.flags.DO, 1232)
    return found


def ask(resolver: dns.resolver.Resolver, name: str, kind: str) -> list[str]:
    """Return the data of the published records in zone-file form; Unanswered when no answer comes."""
    try:
        answer = resolver.resolve(f"{name}.", kind, raise_on_no_answer=False)
    except dns.resolver.NXDOMAIN:
        return []
    except dns.exception.DNSException as error:
        raise Unanswered(
            f"{', '.join(map(str, resolver.nameservers))} did not answer for {name} {kind}"
            f" ({str(error).rstrip('.')}): check that it can be reached from here, or set dns_records_servers."
        ) from error
    return [rdata.to_text() for rdata in answer.rrset or []]


def signed(resolver: dns.resolver.Resolver, domain: str) -> bool:
    """Return whether the answer for the domain's MX records carries a signature."""
    try:
        answer = resolver.resolve(f"{domain}.", "MX", raise_on_no_answer=False)
    except dns.resolver.NXDOMAIN:
        return False
    return any(rrset.rdtype == dns.rdatatype.RRSIG for rrset in answer.response.answer)
