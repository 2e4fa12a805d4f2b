"""The cluster's host programs: when a host counts as red, what is mended, which switch-over is refused."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import xml.etree.ElementTree as xml
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cluster import corosync_key, fencing_ways

PROGRAMS = Path(__file__).parents[2] / "roles" / "cluster" / "files" / "usr" / "local" / "sbin"


def program(name: str) -> ModuleType:
    """Load a host program as a module."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), PROGRAMS / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


health, configure, switch = program("mail-health"), program("cluster-configure"), program("cluster-switch")


# --- the key ---------------------------------------------------------------------------------


def test_the_key_is_as_long_as_corosync_wants_and_depends_on_the_secret() -> None:
    assert 128 <= len(corosync_key("x" * 32)) <= 4096
    assert corosync_key("x" * 32) == corosync_key("x" * 32) != corosync_key("y" * 32)


def test_the_way_to_a_fencing_device_is_named_for_the_firewall() -> None:
    board = {"host": "mail1", "agent": "fence_ipmilan", "options": {"ip": "192.0.2.9"}}
    switch = {"host": "mail2", "options": {"ip": "192.0.2.8"}, "protocol": "tcp", "port": 161}
    by_cable = {"host": "mail3", "agent": "fence_ipmilan", "options": {}}
    ways = [(way["protocol"], way["ports"], way["to"], way["user"]) for way in fencing_ways([board, switch, by_cable])]
    assert ways == [("udp", [623], ["192.0.2.9"], "root"), ("tcp", [161], ["192.0.2.8"], "root")]


# --- health ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "failed"),
    [
        pytest.param([], True, id="nothing seen yet"),
        pytest.param([(0, "")], True, id="once good"),
        pytest.param([(0, ""), (2, "")], True, id="twice good"),
        pytest.param([(0, ""), (2, ""), (4, "")], False, id="three times good"),
        pytest.param([(0, ""), (2, "x"), (4, ""), (6, "")], True, id="good with a failure between"),
    ],
)
def test_a_host_must_show_that_it_can_serve(results: list[tuple[float, str]], failed: bool) -> None:
    assert judged(results).failed is failed


@pytest.mark.parametrize(
    ("results", "failed"),
    [
        pytest.param([(6, "refused")], False, id="one failure"),
        pytest.param([(6, "refused"), (7, "refused"), (8, "refused")], False, id="away for two seconds"),
        pytest.param([(6, "refused"), (7, "refused"), (8, ""), (10, "refused")], False, id="started anew"),
        pytest.param([(6, "refused"), (8, "refused"), (10, "refused")], True, id="away for four seconds"),
        pytest.param([(6, "hangs"), (10.5, "")], False, id="one slow answer"),
    ],
)
def test_a_daemon_that_is_back_at_once_moves_nothing(results: list[tuple[float, str]], failed: bool) -> None:
    assert judged([(0, ""), (2, ""), (4, ""), *results]).failed is failed


def judged(results: list[tuple[float, str]]) -> Any:
    """The verdict after (time, reason of the failure or "") of single looks."""
    verdict = health.Verdict()
    for when, reason in results:
        if reason:
            verdict.bad(when, when, reason)
        else:
            verdict.good()
    return verdict


def failing(since: float) -> Any:
    """A verdict that has failed since then."""
    verdict = health.Verdict()
    for when in (since, since + 2, since + 4):
        verdict.bad(when, when, "refused")
    return verdict


WELL = judged([(0, ""), (2, ""), (4, "")])


@pytest.mark.parametrize(
    ("found", "mended", "is_holder", "unit"),
    [
        pytest.param([("a", WELL)], {}, False, None, id="all well"),
        pytest.param([("a", failing(86))], {}, False, None, id="failing for 14 s"),
        pytest.param([("a", failing(85))], {}, False, "a", id="for 15 s"),
        pytest.param([("a", failing(85))], {}, True, None, id="the holder waits for the other host to take over"),
        pytest.param([("a", failing(60))], {}, True, "a", id="nobody did"),
        pytest.param([("a", failing(80)), ("b", failing(80))], {}, False, "a", id="what others depend on first"),
        pytest.param([("a", failing(70)), ("b", failing(70))], {"a": 90}, False, None, id="the others get time"),
        pytest.param([("a", WELL), ("b", failing(70))], {"a": 80}, False, "b", id="then they are mended too"),
        pytest.param([("a", failing(70))], {"a": -199}, False, None, id="not again within five minutes"),
        pytest.param([("a", failing(70))], {"a": -200}, False, "a", id="but then"),
        pytest.param([(None, failing(70)), ("b", failing(70))], {}, False, "b", id="a probe without a unit"),
        pytest.param([("a", health.Verdict())], {}, False, None, id="not looked at yet"),
    ],
)
def test_what_is_mended(
    found: list[tuple[str | None, Any]], mended: dict[str, float], is_holder: bool, unit: str | None
) -> None:
    assert health.unit_to_mend(found, mended, 100, is_holder) == unit


@pytest.mark.parametrize(
    ("least", "free", "problem"),
    [
        ({"min_mib": 100, "min_percent": 0}, 100 * 2**20, ""),
        ({"min_mib": 100, "min_percent": 0}, 99 * 2**20, "/srv has 99 MiB left, 100 are the least"),
        ({"min_mib": 0, "min_percent": 5}, 49 * 2**20, "/srv has 49 MiB left, 50 are the least"),
        ({"min_mib": 60, "min_percent": 5}, 55 * 2**20, "/srv has 55 MiB left, 60 are the least"),
    ],
)
def test_room_on_a_disk(least: dict[str, int], free: int, problem: str) -> None:
    assert health.disk_problem({"path": "/srv"} | least, free, 1000 * 2**20) == problem


# As corosync-quorumtool 3.1.9 prints them.
WHOLE = """\
Nodes:            2
Quorate:          Yes
Flags:            Quorate Qdevice

    Nodeid      Votes    Qdevice Name
         1          1    A,V,NMW mail1 (local)
         2          1    A,V,NMW mail2
         0          1            Qdevice
"""
NO_WITNESS = WHOLE.replace("0          1            Qdevice", "0          0            Qdevice (votes 1)")
CUT_OFF = "Nodes:            1\nQuorate:          No\nFlags:            Qdevice \n"


@pytest.mark.parametrize(
    ("text", "view"),
    [
        (WHOLE, {"quorate": True, "members": 2, "device": True}),
        (NO_WITNESS, {"quorate": True, "members": 2, "device": False}),
        (CUT_OFF, {"quorate": False, "members": 1, "device": False}),
        ("", {"quorate": False, "members": 0, "device": False}),
    ],
)
def test_how_the_cluster_looks(text: str, view: dict[str, Any]) -> None:
    assert health.quorum_view(text) == view


IDEAL = {"quorate": True, "members": 2, "device": True, "holder": False}


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (None, IDEAL | {"holder": True}, []),
        (None, IDEAL | {"device": False}, ["cluster-witness"]),
        (IDEAL, IDEAL | {"members": 1, "holder": True}, ["cluster-peer", "service-moved"]),
        (IDEAL | {"members": 1}, IDEAL | {"members": 1}, []),
        (
            IDEAL,
            IDEAL | {"quorate": False, "members": 1, "device": False},
            ["cluster-quorum", "cluster-peer", "cluster-witness"],
        ),
        (IDEAL | {"members": 1, "quorate": False}, IDEAL, []),
    ],
)
def test_alarms_of_the_cluster(before: dict[str, Any] | None, after: dict[str, Any], names: list[str]) -> None:
    assert [name for name, _ in health.cluster_alarms(before, after, 2, "mail1")] == names


def served(answers: list[bytes]) -> int:
    """Serve one connection that gets these answers, one for each line that it sends; return the port."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as stream:
            for answer in answers:
                connection.sendall(answer)
                if not stream.readline():
                    return

    threading.Thread(target=serve, daemon=True).start()
    port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize(
    ("kind", "answers", "failure"),
    [
        pytest.param("smtp", [b"220-mail\r\n220 ESMTP\r\n", b"221 bye\r\n"], None, id="smtp"),
        pytest.param("lmtp", [b"220 hi\r\n", b"250-a\r\n250 b\r\n", b"221 bye\r\n"], None, id="lmtp"),
        pytest.param("smtp", [b"421 busy\r\n"], "answered '421 busy'", id="busy"),
        pytest.param("smtp", [], "closed the connection", id="closed"),
    ],
)
def test_a_greeting(kind: str, answers: list[bytes], failure: str | None) -> None:
    probe = health.PROBE | {"kind": kind, "port": served(answers)}
    if failure is None:
        health.probe_greeting(probe, 2)
    else:
        with pytest.raises(health.ProbeFailed, match=failure):
            health.probe_greeting(probe, 2)


# --- Pacemaker's configuration ---------------------------------------------------------------

WANTED = """<configuration>
  <crm_config>
    <cluster_property_set id="hopthu-options"><nvpair id="a" name="a" value="1"/></cluster_property_set>
  </crm_config>
  <rsc_defaults/>
  <resources><primitive id="x" class="ocf"/></resources>
  <constraints/>
</configuration>"""
LIVE = """<configuration>
  <crm_config>
    <cluster_property_set id="cib-bootstrap-options"><nvpair id="b" name="b" value="2"/></cluster_property_set>
    <cluster_property_set id="hopthu-options"><nvpair name="a" value="1" id="a"/></cluster_property_set></crm_config>
  <nodes/>
  <resources><primitive class="ocf" id="x"/></resources>
  <constraints><rsc_location id="cli-prefer-service" rsc="service"/></constraints>
</configuration>"""


def changes(live: str, wanted: str = WANTED) -> dict[str, str]:
    """Section to its new text."""
    return {
        section: xml.tostring(element, encoding="unicode")
        for section, element in configure.differences(xml.fromstring(live), xml.fromstring(wanted))
    }


def test_what_operators_set_is_no_difference() -> None:
    assert changes(LIVE) == {}


def test_a_changed_option_is_replaced_and_others_stay() -> None:
    (text,) = changes(LIVE, WANTED.replace('value="1"', 'value="3"')).values()
    assert 'value="3"' in text
    assert "cib-bootstrap-options" in text


def test_what_is_no_longer_wanted_goes_and_an_operators_move_stays() -> None:
    found = changes(LIVE.replace("<constraints>", '<constraints><rsc_location id="old" rsc="x"/>'))
    assert list(found) == ["constraints"]
    assert "old" not in found["constraints"]
    assert "cli-prefer-service" in found["constraints"]


def test_a_new_cluster_gets_everything() -> None:
    assert list(changes("<configuration/>")) == ["crm_config", "resources"]


# --- switch-over -----------------------------------------------------------------------------


def cluster(holder: str = "mail1", **changed: dict[str, bool]) -> dict[str, Any]:
    """Two sound hosts, one of which holds the service, with what is said otherwise."""
    return {
        name: switch.Member(
            **({"online": True, "standby": False, "green": True, "holder": name == holder} | changed.get(name, {}))
        )
        for name in ("mail1", "mail2")
    }


@pytest.mark.parametrize(
    ("hosts", "wish", "name", "step"),
    [
        (cluster(), "move", "", ("move", "mail2")),
        (cluster("mail2"), "move", "", ("move", "mail1")),
        (cluster(), "move", "mail2", ("move", "mail2")),
        (cluster(), "move", "mail1", ("", "")),
        (cluster(), "standby", "mail1", ("standby", "mail2")),
        (cluster(), "standby", "mail2", ("standby", "")),
        (cluster(mail2={"standby": True}), "standby", "mail2", ("", "")),
        (cluster(mail2={"standby": True}), "rejoin", "mail2", ("rejoin", "")),
        (cluster(), "rejoin", "mail2", ("", "")),
        (cluster("mail2", mail1={"green": False}), "standby", "mail1", ("standby", "")),
    ],
)
def test_a_switchover_that_is_done(hosts: dict[str, Any], wish: str, name: str, step: tuple[str, str]) -> None:
    assert switch.plan(hosts, wish, name) == step


@pytest.mark.parametrize(
    ("hosts", "wish", "name", "words"),
    [
        (cluster(), "move", "mail3", "no host mail3"),
        (cluster(""), "move", "", "no host holds the service"),
        (cluster(mail2={"online": False}), "move", "", "mail2 is not in the cluster"),
        (cluster(mail2={"standby": True}), "move", "", "mail2 is in standby"),
        (cluster(mail2={"green": False}), "move", "mail2", "mail2 cannot serve"),
        (cluster(mail2={"green": False}), "standby", "mail1", "mail2 cannot serve"),
    ],
)
def test_a_switchover_that_is_refused(hosts: dict[str, Any], wish: str, name: str, words: str) -> None:
    with pytest.raises(switch.Refused, match=words):
        switch.plan(hosts, wish, name)


def test_hosts_are_read_from_what_pacemaker_prints() -> None:
    text = """<pacemaker-result><nodes>
      <node name="mail1" online="true" standby="false" pending="false" health="green"/>
      <node name="mail2" online="true" standby="true" pending="true" health="red"/></nodes>
      <resources><group id="service"><resource id="holder"><node name="mail1"/></resource></group></resources>
    </pacemaker-result>"""
    assert switch.members(text) == {
        "mail1": switch.Member(online=True, standby=False, green=True, holder=True),
        "mail2": switch.Member(online=False, standby=True, green=False, holder=False),
    }
