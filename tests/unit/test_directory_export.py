"""Export and load: the files that are written give the desired state that was read."""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from directory_model import BASE, LOADER, NOW, Tree
from directory_samples import PEOPLE, POLICY, TODAY, UNITS, read_folder, write
from hypothesis import given, settings
from hypothesis import strategies as st

from hopthu import export, plan
from hopthu.state import read

FORMS = ("yml", "csv", "json")


def exported(lines: list[dict[str, Any]]) -> list[str]:
    """Return what the module's mode export gives for a tree that was loaded from these lines."""
    result = []
    for line in lines[1:]:
        attributes = dict(line["a"])
        if line["r"]:
            attributes["mailboxGrounds"] = [f"{name} {value}" for name, value in line["r"].items()]
        attributes["mailboxFormerAddress"] = ["old@daklak.gov.vn - 20271121000000Z"]
        attributes.pop("pwdPolicySubentry", None)
        result.append(json.dumps({"k": line["k"], "i": line["i"], "a": attributes}, ensure_ascii=False))
    return result


def there_and_back(folder: Path, form: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Path]:
    """Read `folder`, export the result in `form`, read it again; return both readings and the new folder."""
    before, reading = read_folder(folder)
    assert reading.problems == []
    target = folder / "exported" / form
    paths = export.write(exported(before), reading.policy, target, form)
    assert paths == [target / "units.yml", target / f"people.{form}", target / "applications.yml"]
    write(target, {"policy.yml": (folder / "policy.yml").read_bytes()})
    after, reading = read_folder(target)
    assert reading.problems == []
    return before, after, target


@pytest.mark.parametrize("form", FORMS)
def test_the_sample(tmp_path: Path, form: str) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    before, after, _target = there_and_back(tmp_path, form)
    assert before == after


def test_what_policy_says_is_left_out(tmp_path: Path) -> None:
    domain = "  - {domain: phuyen.gov.vn, same_local_part: true, map: {ubnd: u1, syt: u2}}"
    policy = POLICY.replace("  - domain: phuyen.gov.vn", domain) + "suspend_unit_people: true\n"
    policy = policy.replace("  person:", '  person_alias: "{ten}{ho}"\n  person:', 1)
    units = UNITS.replace("    parent: u1", "    parent: u1\n    state: suspended").replace(", soyte@phuyen.gov.vn", "")
    people = PEOPLE.replace("quota: 3G", "quota: 2048M").replace("    aliases", "    local_part: uyen1\n    aliases")
    write(tmp_path, {"policy.yml": policy, "units.yml": units, "people.yml": people})
    before, after, target = there_and_back(tmp_path, "yml")
    assert before == after
    assert (
        (target / "people.yml").read_text()
        == """\
---
mail_people:
  - id: p1
    ho: Nguyễn
    dem: Thị Tố
    ten: Uyên
    unit: u2
    title: Trưởng phòng
    local_part: uyen1
    aliases: [uyen]
  - id: p2
    ho: "H'Hen"
    ten: Niê
    unit: u2
    decision_ref: "15/QĐ"
"""
    )
    assert (
        (target / "units.yml").read_text()
        == """\
---
mail_units:
  - id: u1
    name: Sở Y tế
    code: syt
    aliases: [syt]
  - id: u2
    name: Phòng Kế hoạch
    parent: u1
    head: p1
    delegates: [{delegation_ref: "5/GUQ", person: p2, role: clerk}]
    state: suspended
"""
    )


def test_nobody_and_nothing(tmp_path: Path) -> None:
    policy = POLICY.replace("u1", "null").replace("u2", "null")
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    reading = read(tmp_path, "d", None, TODAY)
    for form in FORMS:
        export.write([], reading.policy, tmp_path / form, form)
        write(tmp_path / form, {"policy.yml": policy})
        texts = [str(problem) for problem in read_folder(tmp_path / form)[1].problems]
        assert [text.partition(":")[0] for text in texts] == ["d/policy.yml"] * 2


def test_a_folder_with_people_in_another_form_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    lines, reading = read_folder(tmp_path)
    with pytest.raises(
        export.ExportRefused, match="people.yml holds people already: move it away, or export in its form"
    ):
        export.write(exported(lines), reading.policy, tmp_path, "csv")
    with pytest.raises(export.ExportRefused, match="the unit u1 came out of its order"):
        export.write(exported([lines[0], lines[3], lines[1]]), reading.policy, tmp_path, "yml")
    lines[1]["a"]["mailboxDelegate"] = ["p1"]
    with pytest.raises(export.ExportRefused, match="the unit u1 has a mailboxDelegate written by hand that is no JSON"):
        export.write(exported(lines), reading.policy, tmp_path, "yml")
    assert (tmp_path / "people.yml").read_text() == PEOPLE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["people.yml", "policy.yml", "units.yml"]
    assert (tmp_path / "units.yml").read_text() == UNITS


REFS = st.dictionaries(
    st.sampled_from(["decision_ref", "order_ref", "request_ref", "approved_by", "commitment_ref", "legal_act_ref"]),
    st.sampled_from(["15/QĐ-UBND", "2026-01-01", "12", "a: b # c", 'nói "vâng"', "- x", "true", "12:30", "Null"]),
    max_size=3,
)
TEXT = st.sampled_from(
    ["Sở Y tế", "no", "3.14", "Phòng: kế hoạch", "'A' & \"B\"", "[x]", "{y}", "*z", "Đội, tổ", "0x1F"]
)
SIZES = st.sampled_from(["500M", "2G", "2048M", "3T", "1K", "1025K", "10G"])


@st.composite
def directories(draw: st.DrawFn) -> dict[str, str]:
    """Policy, units and people (as JSON, which is YAML) with nearly every field, free of clashes."""
    policy: dict[str, Any] = {
        "domain": "daklak.gov.vn",
        "alias_domains": [
            {"domain": "phuyen.gov.vn", "same_local_part": draw(st.booleans()),
             "map": draw(st.sampled_from([{}, {"ubnd": "u0", "don-vi": "p0"}]))},
            {"domain": "cu.gov.vn", "accept_until": draw(st.sampled_from(["2020-01-01", "2030-01-01"]))},
        ],
        "address": {
            draw(st.sampled_from(["main_unit", "unit"])): draw(st.sampled_from(["{code}", "contact-{code}"])),
            "sub_unit": "{code}-{parent}",
            "person": draw(st.sampled_from(["{hovaten}.{unit}", "{ho}{dem}{ten}-{unit}", "{hovaten}"])),
            "reserved": {"postmaster": "u0", "abuse": "u0", "root": None},
        },
        "suspend_unit_people": draw(st.booleans()),
        "passwords": {"administrators": {"people": ["p0"]}},
        "quota": {"unit": "10G", "person": "2G"},
    }  # fmt: skip
    if draw(st.booleans()):
        policy["address"]["person_alias"] = "{ten}{ho}.{unit}"
    units = []
    for number in range(draw(st.integers(1, 4))):
        unit = {"id": f"u{number}", "name": draw(TEXT), "code": f"dv{number}", **draw(REFS)}
        states = ["active", "suspended", "legacy", "dissolved"] if number else ["active", "suspended"]
        unit["state"] = draw(st.sampled_from(states))
        if number:
            unit["parent"] = f"u{draw(st.integers(0, number - 1))}"
            if unit["state"] in ("legacy", "dissolved"):
                unit["successor"] = "u0"
        units.append({**unit, **draw(optional(number, "u"))})
    people = []
    for number in range(draw(st.integers(1, 4))):
        person = {
            "id": f"p{number}", "ho": draw(st.sampled_from(["Nguyễn", "H'Hen", "Tôn Nữ", "No"])), "ten": f"Số {number}",
            "unit": f"u{draw(st.integers(0, len(units) - 1))}", **draw(REFS), **draw(optional(number, "p")),
        }  # fmt: skip
        person["state"] = draw(st.sampled_from(["active", "suspended", "left"])) if number else "active"
        if draw(st.booleans()):
            person["dem"] = draw(st.sampled_from(["Thị Tố", "Văn", "Số"]))
        if draw(st.booleans()):
            person["title"] = draw(TEXT)
        people.append(person)
    for unit in units:
        if draw(st.booleans()):
            unit["head"] = "p0"
            delegate = {"person": "p0", "role": draw(TEXT), "delegation_ref": draw(TEXT)}
            delegate.pop(draw(st.sampled_from(["role", "delegation_ref", "-"])), None)
            unit["delegates"] = [delegate]
    senders = [["own"], ["own", "a"], ["x@phuyen.gov.vn"]]
    programs = [
        {
            "id": f"a{number}", "name": draw(TEXT), "unit": "u0", "hosts": ["192.0.2.0/24", "2001:db8::1"],
            **draw(REFS), "addresses": [f"{number}.{text}" for text in draw(st.sampled_from(senders))],
            "state": draw(st.sampled_from(["active", "suspended", "left"])),
        }
        for number in range(draw(st.integers(0, 2)))
    ]  # fmt: skip
    return {
        "policy.yml": json.dumps(policy),
        "applications.yml": json.dumps({"mail_applications": programs}),
        "units.yml": json.dumps({"mail_units": units}),
        "people.json": json.dumps({"mail_people": people}),
    }


def optional(number: int, kind: str) -> st.SearchStrategy[dict[str, Any]]:
    """Fields that a unit or a person may have."""
    own = [
        f"{kind}{number}",
        f"{kind}{number}.x@daklak.gov.vn",
        f"{kind}{number}@phuyen.gov.vn",
        f"{kind}{number}@cu.gov.vn",
    ]
    return st.fixed_dictionaries({}, optional={
        "class": st.sampled_from(["administrative", "no"]),
        "local_part": st.sampled_from([f"{kind}-{number}", f"so{number}"] + [f"dv{number}-dv0", "sub"] * (kind == "u")),
        "aliases": st.lists(st.sampled_from(own), max_size=3, unique=True),
        "quota": SIZES,
        "internal": st.booleans(),
    })  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(directories(), st.sampled_from(FORMS))
def test_export_and_load_change_nothing(files: dict[str, str], form: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), dict(files))
        problems = read(Path(name), "d", None, TODAY).problems
        if problems:  # two units may have drawn the same local part
            assert all("already an address of" in problem.text for problem in problems)
            return
        before, after, target = there_and_back(Path(name), form)
        assert before == after
        for path in target.glob("*.yml"):
            plain = yaml.safe_load(path.read_text(encoding="utf-8"))  # any YAML reader finds texts, nothing else
            roots = ("mail_units", "mail_people", "mail_applications")
            for record in [record for root in roots for record in plain.get(root) or []]:
                texts = {name: value for name, value in record.items() if name != "internal"}
                assert all(isinstance(value, str | list) for value in texts.values())


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the desired state with its header."""
    out = io.BytesIO()
    assert read(folder, "d", out, TODAY).problems == []
    return [json.loads(line) for line in out.getvalue().splitlines()]


@settings(max_examples=80, deadline=None)
@given(directories(), st.sampled_from(FORMS))
def test_a_live_tree_exported_and_loaded_again_needs_no_change(files: dict[str, str], form: str) -> None:
    """Everybody is active at first, then takes the state drawn for him, so that leavers are in the tree."""
    first = {path: text for path, text in files.items() if path != "policy.yml"}
    for path, text in first.items():
        root, records = next(iter(json.loads(text).items()))
        plain = [
            {name: value for name, value in record.items() if name not in ("state", "successor")} for record in records
        ]
        first[path] = json.dumps({root: plain})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, {**files, **first})
        if read(folder, "d", None, TODAY).problems:
            return
        lines = lines_of(folder)
        tree = Tree(**lines[0]["policy"])
        tree.load(*lines[1:])
        write(folder, dict(files))
        tree.load(*lines_of(folder)[1:])
        live = [json.dumps(row) for row in plan.exported(tree.mailboxes(), base=BASE, loader=LOADER, now=NOW)]
        assert len(live) == len(lines) - 1
        reading = read(folder, "d", None, TODAY)
        export.write(live, reading.policy, folder / "out", form)
        write(folder / "out", {"policy.yml": files["policy.yml"]})
        after = tree.plan(*lines_of(folder / "out")[1:])
        assert after.changes == []
        assert after.steps == []
