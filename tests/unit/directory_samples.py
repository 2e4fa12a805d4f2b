"""A small good directory for the tests of the reader, and its reading."""

from __future__ import annotations

import io
import json
from datetime import date
from pathlib import Path
from typing import Any

from hopthu.state import Reading, read

TODAY = date(2026, 11, 21)
POLICY = """\
domain: daklak.gov.vn
alias_domains:
  - domain: phuyen.gov.vn
address:
  unit: "{name}"
  person: "{ho}{dem}{ten}"
  reserved:
    postmaster: u1
    abuse: u2
    admin: null
quota:
  unit: 10G
  person: 2G
"""
UNITS = """\
mail_units:
  - id: u1
    name: Sở Y tế
    code: syt
    local_part: soyte
    aliases: [syt, soyte@phuyen.gov.vn]
  - id: u2
    name: Phòng Kế hoạch
    parent: u1
    head: p1
    delegates:
      - {person: p2, role: clerk, delegation_ref: 5/GUQ}
"""
PEOPLE = """\
mail_people:
  - id: p1
    ho: Nguyễn
    dem: Thị Tố
    ten: Uyên
    unit: u2
    title: Trưởng phòng
    aliases: [uyen]
  - {id: p2, ho: H'Hen, ten: Niê, unit: u2, quota: 3G, decision_ref: 15/QĐ}
"""


def write(folder: Path, files: dict[str, str | bytes]) -> None:
    """Write the files of a directory folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def read_folder(folder: Path, today: date = TODAY) -> tuple[list[dict[str, Any]], Reading]:
    """Return the lines of the desired state, without the places in the files, and the reading."""
    out = io.BytesIO()
    reading = read(folder, "d", out, today)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    for line in lines[1:]:
        assert line.pop("l").startswith("d/")
    return lines, reading


def desired(folder: Path, today: date = TODAY) -> dict[str, dict[str, list[str]]]:
    """Return the attributes of every mailbox of a folder without problems, by id."""
    lines, reading = read_folder(folder, today)
    assert reading.problems == []
    return {line["i"]: line["a"] for line in lines[1:]}


def problems_of(folder: Path, **files: str | bytes) -> list[str]:
    """Return the problems of the sample, with the files named by their stems replaced."""
    sources: dict[str, str | bytes] = {"policy": POLICY, "units": UNITS, "people": PEOPLE, **files}
    write(folder, {f"{name}.yml": text for name, text in sources.items()})
    return [str(problem) for problem in read_folder(folder)[1].problems]
