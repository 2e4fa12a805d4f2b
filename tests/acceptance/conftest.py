"""Fixtures of the acceptance tests. HOPTHU_LAB names the lab.json of the running lab."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from service import Mailbox, Service


@pytest.fixture(scope="session")
def lab() -> dict[str, Any]:
    """What the running lab's lab.json says."""
    path = Path(os.environ.get("HOPTHU_LAB", "build/lab.json"))
    if not path.is_file():
        pytest.fail(f"{path} is not there: run `make lab`, or name another lab's file in HOPTHU_LAB.", pytrace=False)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="session")
def service(lab: dict[str, Any]) -> Service:
    """The running lab's service."""
    return Service(lab)


@pytest.fixture(params=["ipv4", "ipv6"])
def address(request: pytest.FixtureRequest, service: Service) -> str:
    """The service address, once per address family."""
    return service.addresses[request.param]


@pytest.fixture(params=["first-v4", "first-v6", "second-v4", "second-v6"])
def mx(request: pytest.FixtureRequest, service: Service) -> str:
    """Address of a mail exchanger: both hosts, each over both families."""
    which, family = request.param.split("-")
    host = service.in_group("mx")[["first", "second"].index(which)]
    address: str = service.hosts[host]["addresses"][family]
    return address


@pytest.fixture
def new_mailbox(service: Service) -> Iterator[Callable[..., Mailbox]]:
    """Makes mailboxes of the test's own; they go when the test ends."""
    with ExitStack() as stack:
        yield lambda **more: stack.enter_context(service.new_mailbox(**more))


@pytest.fixture
def mailbox(new_mailbox: Callable[..., Mailbox]) -> Mailbox:
    """One mailbox of the test's own."""
    return new_mailbox()
