"""What concerns several records: references, address forms, uniqueness, alias domains, states."""

from __future__ import annotations

import io
import json
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from directory_samples import TODAY, desired, read_folder, write
from hypothesis import given, settings
from hypothesis import strategies as st

from hopthu.state import read

QUOTA = "quota: {unit: 10G, person: 2G}\n"
RESERVED = "reserved: {postmaster: u1, abuse: u1, contact: null}"
LAOCAI = f"""\
domain: laocai.gov.vn
address:
  main_unit: "contact-{{code}}"
  sub_unit: "{{code}}-{{parent}}"
  person: "{{ho}}{{dem}}{{ten}}-{{unit}}"
  {RESERVED}
{QUOTA}"""
HATINH = f"""\
domain: hatinh.gov.vn
address:
  unit: "{{code}}"
  person: "{{hovaten}}.{{unit}}"
  {RESERVED}
{QUOTA}"""
UNITS: list[dict[str, Any]] = [
    {"id": "u1", "name": "Sở Văn hóa, Thể thao và Du lịch", "code": "svhttdl"},
    {"id": "u2", "name": "Văn phòng", "code": "vanphong", "parent": "u1"},
    {"id": "u3", "name": "Tổ Văn thư", "code": "vanthu", "parent": "u2"},
]
UYEN = {"id": "p1", "ho": "Nguyễn", "dem": "Thị Tố", "ten": "Uyên", "unit": "u1"}
THIEN = {"id": "p2", "ho": "Nguyễn", "ten": "Thiện", "unit": "u1"}


def folder_of(
    folder: Path, policy: str = LAOCAI, units: list[dict[str, Any]] = UNITS, people: list[dict[str, Any]] | None = None
) -> Path:
    """Write a directory folder; JSON is YAML."""
    people = [UYEN, THIEN] if people is None else people
    write(folder, {
        "policy.yml": policy, "units.yml": json.dumps({"mail_units": units}),
        "people.json": '{"mail_people": [\n' + ",\n".join(map(json.dumps, people)) + "]}",
    })  # fmt: skip
    return folder


def problems(folder: Path, today: date = TODAY) -> list[str]:
    return [str(problem) for problem in read_folder(folder, today)[1].problems]


def test_addresses_of_lao_cai(tmp_path: Path) -> None:
    boxes = desired(folder_of(tmp_path))
    assert [box["mail"][0].partition("@")[0] for box in boxes.values()] == [
        "contact-svhttdl", "vanphong-svhttdl", "vanthu-vanphong", "nguyenthitouyen-svhttdl", "nguyenthien-svhttdl"
    ]  # fmt: skip


def test_addresses_of_ha_tinh(tmp_path: Path) -> None:
    boxes = desired(folder_of(tmp_path, HATINH))
    assert [box["mail"][0].partition("@")[0] for box in boxes.values()] == [
        "svhttdl", "vanphong", "vanthu", "nguyenthitouyen.svhttdl", "nguyenthien.svhttdl"
    ]  # fmt: skip


def test_the_general_unit_pattern_stands_in_for_the_special_ones(tmp_path: Path) -> None:
    policy = LAOCAI.replace("sub_unit", "unit")
    boxes = desired(folder_of(tmp_path, policy))
    assert boxes["u2"]["mail"] == ["vanphong-svhttdl@laocai.gov.vn"]
    policy = LAOCAI.replace('  main_unit: "contact-{code}"\n', "")
    assert problems(folder_of(tmp_path, policy)) == [
        "d/units.yml:1: local_part: is missing and policy.yml has no address pattern main_unit: give one of them"
    ]


def test_the_second_form_goes_to_those_whose_address_follows_the_pattern(tmp_path: Path) -> None:
    policy = LAOCAI.replace("  person:", '  person_alias: "{ten}{ho}-{unit}"\n  person:')
    people = [UYEN, {**THIEN, "local_part": "nguyenthien-svhttdl"}, {**THIEN, "id": "p3", "local_part": "nvthien"}]
    boxes = desired(folder_of(tmp_path, policy, people=people))
    assert boxes["p1"]["mailLocalAddress"] == ["uyennguyen-svhttdl@laocai.gov.vn"]
    assert boxes["p2"]["mailLocalAddress"] == ["thiennguyen-svhttdl@laocai.gov.vn"]
    assert "mailLocalAddress" not in boxes["p3"]
    clash = [UYEN, {**UYEN, "id": "p3", "dem": "Văn"}]
    assert problems(folder_of(tmp_path, policy, people=clash)) == [
        "d/people.json:3: local_part: uyennguyen-svhttdl@laocai.gov.vn is already an address of person p1 "
        "(d/people.json:2): give the newer of the two another local_part, such as uyennguyen2-svhttdl"
    ]
    reserved = policy.replace('"{ten}{ho}-{unit}"', '"contact"').replace('contact"', '{dem}"')
    assert problems(folder_of(tmp_path, reserved, people=[{**UYEN, "dem": "Contact"}])) == [
        'd/people.json:2: local_part: "contact" is reserved in policy.yml: choose another name'
    ]


ALIAS_DOMAINS = """\
alias_domains:
  - domain: yenbai.gov.vn
    accept_until: 2027-06-30
    map: {ubnd: u1, uyen: p1, nguyenthien-svhttdl: u2}
    same_local_part: true
  - {domain: cu.laocai.gov.vn}
"""


def test_alias_domains_receive_until_their_last_day(tmp_path: Path) -> None:
    people = [{**UYEN, "aliases": ["uyen@cu.laocai.gov.vn", "touyen@yenbai.gov.vn"]}, THIEN]
    folder = folder_of(tmp_path, LAOCAI + ALIAS_DOMAINS, people=people)
    boxes = desired(folder, date(2027, 6, 30))
    assert boxes["u1"]["mailLocalAddress"] == [
        "abuse@cu.laocai.gov.vn", "abuse@laocai.gov.vn", "abuse@yenbai.gov.vn", "contact-svhttdl@yenbai.gov.vn",
        "postmaster@cu.laocai.gov.vn", "postmaster@laocai.gov.vn", "postmaster@yenbai.gov.vn", "ubnd@yenbai.gov.vn",
    ]  # fmt: skip
    assert boxes["u2"]["mailLocalAddress"] == ["nguyenthien-svhttdl@yenbai.gov.vn", "vanphong-svhttdl@yenbai.gov.vn"]
    assert boxes["p1"]["mailLocalAddress"] == [
        "nguyenthitouyen-svhttdl@yenbai.gov.vn", "touyen@yenbai.gov.vn", "uyen@cu.laocai.gov.vn", "uyen@yenbai.gov.vn"
    ]  # fmt: skip
    assert "mailLocalAddress" not in boxes["p2"]  # the map gives the address to u2
    after, reading = read_folder(folder, date(2027, 7, 1))
    assert reading.domains == ("laocai.gov.vn", "yenbai.gov.vn", "cu.laocai.gov.vn")
    assert "yenbai" not in json.dumps(after[1:])
    assert after[4]["a"]["mailLocalAddress"] == ["uyen@cu.laocai.gov.vn"]


def test_faults_of_alias_domains(tmp_path: Path) -> None:
    policy = LAOCAI + (
        "alias_domains:\n"
        "  - domain: yenbai.gov.vn\n"
        "    accept_until: 2027-06-31\n"
        "    map: {ubnd: u9, contact: p1}\n"
        "  - {domain: yenbai.gov.vn}\n"
        "  - {domain: cu.laocai.gov.vn, map: {a: P1}}\n"
    )
    assert problems(folder_of(tmp_path, policy)) == [
        'd/policy.yml:10: accept_until: "2027-06-31" is no day, such as 2027-06-30',
        'd/policy.yml:11: contact: "contact" is reserved in policy.yml: its mail goes where address.reserved says',
        'd/policy.yml:11: ubnd: there is no unit or person "u9": correct it',
        "d/policy.yml:12: domain: yenbai.gov.vn stands twice: keep one",
        'd/policy.yml:13: a: there is no unit or person "P1": correct it',
    ]


@pytest.mark.parametrize("suspended", ["u1", "u2"])
def test_people_are_suspended_with_their_unit_where_policy_says_so(tmp_path: Path, suspended: str) -> None:
    units = [{**unit, "state": "suspended"} if unit["id"] == suspended else unit for unit in UNITS]
    people = [UYEN, {**THIEN, "unit": "u3"}, {**THIEN, "id": "p3", "unit": "u2", "state": "left"}]
    boxes = desired(folder_of(tmp_path, LAOCAI, units, people))
    assert [boxes[box]["mailboxState"][0] for box in ("p1", "p2", "p3")] == ["active", "active", "left"]
    boxes = desired(folder_of(tmp_path, LAOCAI + "suspend_unit_people: true\n", units, people))
    first = "suspended" if suspended == "u1" else "active"
    assert [boxes[box]["mailboxState"][0] for box in ("p1", "p2", "p3")] == [first, "suspended", "left"]
    assert [boxes[box]["mailboxState"][0] for box in ("u1", "u2", "u3")].count("suspended") == 1


def test_administrators_get_their_password_policy(tmp_path: Path) -> None:
    policy = LAOCAI + "passwords: {administrators: {people: [p2]}}\n"
    boxes = desired(folder_of(tmp_path, policy))
    assert boxes["p2"]["pwdPolicySubentry"] == ["cn=administrators,ou=policies,dc=laocai,dc=gov,dc=vn"]
    assert "pwdPolicySubentry" not in boxes["p1"]
    people = [UYEN, {**THIEN, "state": "left"}]
    assert problems(folder_of(tmp_path, policy.replace("[p2]", "[p2, p9]"), people=people)) == [
        'd/policy.yml:8: people: person "p2" has left: name another or leave it out',
        'd/policy.yml:8: people: there is no person "p9": correct it or add the person',
    ]


def test_the_header_carries_what_the_plan_needs(tmp_path: Path) -> None:
    policy = LAOCAI.replace("contact: null}", "contact: null}\n  reuse_block_days: 7") + (
        "required_refs: {join: [decision_ref], hand-over: [approved_by]}\n"
        "eligibility: {units: [administrative], on_request: [party]}\n"
        "delegates: {max: 1, roles: [Văn thư], document_required: true}\n"
        "leaver: {pointer: unit}\nrename: {alias_days: 30}\nremoval_limit: 0.5\n"
        "passwords: {history: 3}\n"
    )
    lines, reading = read_folder(folder_of(tmp_path, policy))
    assert reading.problems == []
    assert lines[0] == {
        "policy": {
            "domain": "laocai.gov.vn", "alias_days": 30, "block_days": 7, "retention_days": 180, "backup_days": 373,
            "pointer": "unit", "removal_limit": 0.5,
            "required_refs": {"join": ["decision_ref"], "hand-over": ["approved_by"]},
            "eligibility": {"units": ["administrative"], "on_request": ["party"]},
            "delegates": {"max": 1, "roles": ["Văn thư"], "document_required": True},
        }
    }  # fmt: skip
    passwords = reading.policy.values["passwords"]
    assert (passwords["history"], passwords["min_length"], passwords["administrators"]["max_age_days"]) == (3, 12, 60)


UNIT_CASES: list[tuple[str, dict[str, Any], str]] = [
    ("u2", {"successor": "u1"}, "successor: is only for a dissolved or legacy unit: remove it or set the state"),
    ("u2", {"successor": "u9", "state": "legacy"}, 'successor: there is no unit "u9": correct it or add it to units'),
    ("u2", {"successor": "u2", "state": "dissolved"}, "successor: is the unit itself: name the one that follows it"),
    ("u2", {"head": "p2"}, 'head: person "p2" has left: name another or leave it out'),
    ("u2", {"head": "P1"}, 'head: there is no person "P1": correct it or add the person'),
    ("u2", {"head": "u1"}, 'head: there is no person "u1": correct it or add the person'),
    ("u2", {"delegates": [{"person": "p2"}]}, 'delegates: person "p2" has left: name another or leave it out'),
    ("u2", {"delegates": [{"person": "p1"}, {"person": "p1", "role": "x"}]}, "delegates: name one person twice: keep"),
    ("u2", {"delegates": ["p1"]}, 'delegates: "p1" must be a mapping with person, role and delegation_ref'),
    ("u2", {"parent": "U1"}, 'parent: there is no unit "U1": correct it or add it to units.yml'),
    ("u1", {"parent": "u3"}, "parent: leads back to this unit: correct it"),
    ("u2", {"parent": "u2"}, "parent: leads back to this unit: correct it"),
    ("u3", {"code": None}, "code: is missing and the address pattern needs it: fill it in or give local_part"),
    ("u1", {"state": "dissolved"}, "postmaster: unit u1 is dissolved and receives no mail: name another"),
]


@pytest.mark.parametrize(("identity", "fields", "expected"), UNIT_CASES)
def test_faults_of_units(tmp_path: Path, identity: str, fields: dict[str, Any], expected: str) -> None:
    units = [{**unit, **fields} if unit["id"] == identity else unit for unit in UNITS]
    people = [UYEN, {**THIEN, "state": "left"}]
    found = problems(folder_of(tmp_path, units=units, people=people))
    assert any(problem.split(": ", 1)[1].startswith(expected) for problem in found), found


def test_a_successor_that_is_itself_dissolved_is_refused(tmp_path: Path) -> None:
    units = [UNITS[0], {**UNITS[1], "state": "dissolved"}, {**UNITS[2], "state": "dissolved", "successor": "u2"}]
    assert problems(folder_of(tmp_path, units=units)) == [
        "d/units.yml:1: successor: unit u2 is dissolved and receives no mail: name another"
    ]
    units[1]["state"] = "legacy"
    boxes = desired(folder_of(tmp_path, units=units))
    assert boxes["u3"]["mailboxSuccessor"] == ["u2"]
    assert boxes["u3"]["mail"] == ["vanthu-vanphong@laocai.gov.vn"]


POLICY_CASES = [
    ("required_refs: {jion: [decision_ref]}", 'jion: "jion" must be one of join, found, move, rename, '),
    ("required_refs: {join: [decision]}", 'join: "decision" must be one of decision_ref, order_ref, '),
    ("required_refs: {join: decision_ref}", 'join: "decision_ref" must be a list'),
    ("eligibility: {peopl: [x]}", "peopl: is not a known field: did you mean people?"),
    ("eligibility: {people: [Công chức]}", 'people: "Công chức" may hold only a-z, 0-9 and _'),
    ("delegates: {max: -1}", 'max: "-1" must be a whole number, 0 or more'),
    ("delegates: {document_required: maybe}", 'document_required: "maybe" must be true or false'),
    ("leaver: {pointer: head}", 'pointer: "head" must be one of none, unit'),
    ("rename: {alias_days: 1.5}", 'alias_days: "1.5" must be a whole number, 0 or more'),
    ("suspend_unit_people: 1", 'suspend_unit_people: "1" must be true or false'),
    ("passwords: {min_length: 4}", 'min_length: "4" must be a whole number between 8 and 64'),
    ("passwords: {administrators: {classes: 5}}", 'classes: "5" must be a whole number between 1 and 4'),
    ("notify: office", 'notify: "office" must be a mapping of the form key: value'),
    ("alias_domains: [yenbai.gov.vn]", 'alias_domains: "yenbai.gov.vn" must be a mapping such as "- domain: phuyen'),
    ("alias_domains: [{domain: yenbai.gov.vn, map: {Ubnd: u1}}]", 'Ubnd: "Ubnd" must be what stands before the @'),
    ("alias_domains: [{domain: yenbai.gov.vn, map: {ubnd: null}}]", "ubnd: is missing: fill it in"),
]


@pytest.mark.parametrize(("line", "expected"), POLICY_CASES)
def test_faults_of_policy(tmp_path: Path, line: str, expected: str) -> None:
    found = problems(folder_of(tmp_path, f"{LAOCAI}{line}\n"))
    assert any(problem.startswith(f"d/policy.yml:8: {expected}") for problem in found), found


@pytest.mark.requirement("LC-3", "LC-9.2")
def test_a_departments_file_holds_only_people_of_the_department_and_below(tmp_path: Path) -> None:
    folder_of(tmp_path)
    (tmp_path / "people.json").unlink()
    row = "- {{id: {}, ho: Lê, ten: {}, unit: {}}}\n"
    own = "mail_people:\n" + row.format("p1", "An", "u2") + row.format("p2", "Ba", "u3") + "- {id: p3, ho: Lê, ten: Tư}"
    write(tmp_path, {"people/u2.yml": own, "people/u1.yml": "mail_people: []\n"})
    boxes = desired(tmp_path)
    assert [boxes[person]["departmentNumber"][0] for person in ("p1", "p2", "p3")] == ["u2", "u3", "u2"]
    write(tmp_path, {"people/u2.yml": own + "\n" + row.format("p4", "Sáu", "u1"), "people/u7.yml": own})
    assert problems(tmp_path) == [
        "d/people/u2.yml:5: unit: must be u2, as the file is named, or a unit below it",
        'd/people/u7.yml:1: unit: there is no unit "u7": correct it or add it to units.yml',
    ]


@pytest.mark.requirement("DL-4", "CT-4")
def test_a_clash_names_both_places_and_free_proposals(tmp_path: Path) -> None:
    people = [
        THIEN,
        {**THIEN, "id": "p3"},
        {**THIEN, "id": "p4", "unit": "u2", "local_part": "nguyenthien2.svhttdl"},
        {**THIEN, "id": "p5", "dem": "", "aliases": ["vanphong"]},
    ]
    people[3].pop("dem")
    text = "is already an address of"
    assert problems(folder_of(tmp_path, HATINH, people=people)) == [
        f"d/people.json:3: local_part: nguyenthien.svhttdl@hatinh.gov.vn {text} person p2 (d/people.json:2): "
        "give the newer of the two another local_part, such as nguyenthien3.svhttdl",
        f"d/people.json:5: aliases: vanphong@hatinh.gov.vn {text} unit u2 (d/units.yml:1): "
        "give the newer of the two another alias, such as vanphong2",
        f"d/people.json:5: local_part: nguyenthien.svhttdl@hatinh.gov.vn {text} person p2 (d/people.json:2): "
        "give the newer of the two another local_part, such as nguyenthien4.svhttdl",
    ]


def test_one_address_twice_in_a_record(tmp_path: Path) -> None:
    people = [{**THIEN, "aliases": ["nguyenthien.svhttdl"]}, {**UYEN, "aliases": ["uyen", "uyen@hatinh.gov.vn"]}]
    assert problems(folder_of(tmp_path, HATINH, people=people)) == [
        "d/people.json:2: aliases: nguyenthien.svhttdl@hatinh.gov.vn stands twice in this record: keep one",
        "d/people.json:3: aliases: uyen@hatinh.gov.vn stands twice in this record: keep one",
    ]


def test_an_address_that_no_mail_server_takes_is_refused(tmp_path: Path) -> None:
    domain = ".".join(["a" * 60] * 3) + ".vn"
    policy = HATINH.replace("hatinh.gov.vn", domain)
    found = problems(folder_of(tmp_path, policy, people=[{**THIEN, "aliases": ["b" * 64]}, UYEN]))
    assert found == []
    policy = HATINH.replace("hatinh.gov.vn", "b" * 10 + "." + domain)
    found = problems(folder_of(tmp_path, policy, people=[{**THIEN, "aliases": ["b" * 64]}, UYEN]))
    assert found == [
        f'd/people.json:2: aliases: "{"b" * 39}…" makes an address longer than 254 octets: shorten it'
    ]  # fmt: skip


def test_people_of_another_file_are_not_missed_where_a_file_is_broken(tmp_path: Path) -> None:
    units = [{**UNITS[0], "head": "p1"}]
    folder = folder_of(tmp_path, units=units, people=[{**THIEN, "unit": "u9"}])
    write(folder, {"people.json": (folder / "people.json").read_text()[:-1] + "x"})
    assert problems(folder) == [
        'd/people.json:2: is not JSON of the form {"mail_people": [{…}]}: correct it',
        'd/people.json:2: unit: there is no unit "u9": correct it or add it to units.yml',
    ]
    write(folder, {"units.yml": "mail_units: [&a]\n"})
    assert [problem for problem in problems(folder) if "json" not in problem] == [
        "d/units.yml:1: anchors and aliases (& and *) are not allowed: write the value"
    ]


NAMES = st.sampled_from(["Nguyễn", "nguyen", "Lê", "An", "Ân", "Bình"])
ALIASES = st.lists(st.sampled_from(["an", "lean", "nguyenan", "binh@yenbai.gov.vn"]), max_size=2, unique=True)
PERSON = st.fixed_dictionaries(
    {"ho": NAMES, "ten": NAMES, "unit": st.sampled_from(["u1", "u2"])},
    optional={"dem": NAMES, "aliases": ALIASES, "local_part": st.sampled_from(["an", "lean", "binh"])},
)


@pytest.mark.requirement("DL-4", "CT-4")
@settings(max_examples=150, deadline=None)
@given(st.lists(PERSON, max_size=6), st.randoms(use_true_random=False), st.booleans())
def test_no_address_depends_on_the_order_of_the_records(people: list[dict[str, Any]], random: Any, same: bool) -> None:
    """Any order gives everybody the same addresses, or a clash of the same mailboxes."""
    people = [{"id": f"p{number}", **person} for number, person in enumerate(people)]
    policy = HATINH.replace(".{unit}", "") + ALIAS_DOMAINS.replace("uyen: p1", "binh: u3").replace(
        "same_local_part: true", f"same_local_part: {str(same).lower()}"
    )
    policy = policy.replace("  person:", '  person_alias: "{ten}{ho}"\n  person:')
    outcomes = []
    for _order in range(3):
        random.shuffle(people)
        with tempfile.TemporaryDirectory() as folder:
            out = io.BytesIO()
            reading = read(folder_of(Path(folder), policy, people=people), "d", out, TODAY)
            if reading.problems:
                lines = {problem.line for problem in reading.problems}
                text = " ".join(problem.text for problem in reading.problems)
                holders = {people[line - 2]["id"] for line in lines}
                holders |= {person["id"] for person in people if f"person {person['id']} " in text}
                assert "already an address of" in text or "twice" in text
                outcomes.append((False, holders))
            else:
                lines = out.getvalue().splitlines()
                boxes = [json.loads(line) for line in lines[1:]]
                addresses = [
                    address for box in boxes for address in box["a"]["mail"] + box["a"].get("mailLocalAddress", [])
                ]
                assert len(addresses) == len(set(addresses))
                outcomes.append((True, {box["i"]: json.dumps(box["a"]) for box in boxes}))
    assert outcomes[0] == outcomes[1] == outcomes[2]
