"""What the tests of availability conclude from status texts, and how they keep their rows."""

from __future__ import annotations

import json
import smtplib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "acceptance"))

from faults import cluster_problems, record, sync_problems
from load import Letter, Load, longest

NODE = '<node name="mail1" online="{online}" standby="{standby}" unclean="false" pending="false" health="{health}"/>'
WELL = {"online": "true", "standby": "false", "health": "green"}
RESOURCE = '<resource id="address" role="{role}" failed="{failed}"/>'


def status(node: dict[str, str], role: str = "Started", failed: str = "false") -> str:
    """What `crm_mon --output-as=xml` says of one node and one resource in a group."""
    group = f'<group id="service">{RESOURCE.format(role=role, failed=failed)}</group>'
    nodes = NODE.format(**WELL | node)
    return f"<pacemaker-result><nodes>{nodes}</nodes><resources>{group}</resources></pacemaker-result>"


@pytest.mark.parametrize(
    ("xml", "words"),
    [
        (status({}), []),
        (status({"online": "false"}), ["node mail1 is online=false"]),
        (status({"standby": "true", "health": "red"}), ["node mail1 is standby=true health=red"]),
        (status({}, role="Stopped"), ["resource address is Stopped, failed=false"]),
        (status({}, failed="true"), ["resource address is Started, failed=true"]),
        ("crm_mon: connection refused", ["Pacemaker gives no status"]),
    ],
)
def test_cluster_problems(xml: str, words: list[str]) -> None:
    assert cluster_problems(xml) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"behind": 0, "unverified": 0, "oldest_s": 0}', []),
        ('{"behind": 3, "unverified": 0}', ["mail-sync is behind with 3 users"]),
        ('{"behind": 0, "unverified": 2}', ["mail-sync has still to look through 2 users"]),
        ("{}", ["mail-sync gives no status"]),
        ("", ["mail-sync gives no status"]),
    ],
)
def test_sync_problems(text: str, words: list[str]) -> None:
    assert sync_problems(text) == words


@pytest.mark.parametrize(("times", "gap"), [([], 0), ([5.0], 0), ([1.0, 2.0, 9.5, 10.0], 7.5)])
def test_longest(times: list[float], gap: float) -> None:
    assert longest(times) == gap


def test_a_later_run_replaces_the_row_of_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "build" / "availability.json"
    for row in ({"fault": "a", "missing": 1}, {"fault": "b", "missing": 0}, {"fault": "a", "missing": 0}):
        record(row, path)
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"fault": "b", "missing": 0},
        {"fault": "a", "missing": 0},
    ]


class Peer:
    """A mail server as a sender meets it: `replies` to whole messages, in turn; None hangs up without one."""

    sock = SimpleNamespace(settimeout=lambda _seconds: None)

    def __init__(self, replies: list[int | None]) -> None:
        self.replies = replies

    def mail(self, *_words: object) -> tuple[int, bytes]:
        return 250, b""

    rcpt = mail

    def docmd(self, _command: str) -> tuple[int, bytes]:
        return 354, b""

    def send(self, data: bytes) -> None:
        assert data.endswith(b"\r\n..\r\n.\r\n")

    def getreply(self) -> tuple[int, bytes]:
        reply = self.replies.pop(0)
        if reply is None:
            raise smtplib.SMTPServerDisconnected("gone")
        return reply, b"said"

    def quit(self) -> None:
        pass


@pytest.mark.parametrize(
    ("replies", "acknowledged", "unknown", "deferred", "failed"),
    [
        ([250], True, False, 0, 0),
        ([451, 451, 250], True, False, 2, 0),
        ([None, 250], True, True, 0, 0),
        ([None, 451, 250], True, True, 1, 0),
        ([554], False, False, 0, 1),
    ],
)
def test_sender_tries_until_it_is_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
    replies: list[int | None],
    acknowledged: bool,
    unknown: bool,
    deferred: int,
    failed: int,
) -> None:
    addresses = {"v4": "192.0.2.11", "v6": "2001:db8::11"}
    service: Any = SimpleNamespace(
        units={"a@b": "x"},
        unit=lambda name: SimpleNamespace(address=f"{name}@b", password="x"),
        in_group=lambda _group: ["mail1"],
        hosts={"mail1": {"addresses": addresses}},
        addresses=addresses,
    )
    load = Load(service)
    peer = Peer(replies)
    monkeypatch.setattr(load, "_session", lambda *_place: nullcontext(peer))
    load._deliver(Letter("1", None, service.unit("a"), b"Subject: x\r\n\r\n.\r\n"), 0)
    assert replies == []
    assert ("1" in load.acknowledged) is acknowledged
    assert (load.sent.unknown_then_repeated == ["1"]) is unknown
    assert (load.sent.deferred, len(load.sent.failed)) == (deferred, failed)
