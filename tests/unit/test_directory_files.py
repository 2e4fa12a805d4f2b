"""Directory files: what is accepted, and one sentence with file, line and field for what is not."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from directory_samples import PEOPLE, POLICY, TODAY, UNITS, desired, problems_of, read_folder, write

from hopthu.state import read

DAKLAK = Path(__file__).parents[2] / "inventories" / "daklak" / "directory"


def test_good_files_give_the_mailboxes(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == []
    lines, reading = read_folder(tmp_path)
    assert (reading.domain, reading.domains, reading.units, reading.people) == (
        "daklak.gov.vn", ("daklak.gov.vn", "phuyen.gov.vn"), 2, 2
    )  # fmt: skip
    assert lines[0]["policy"] == {
        "domain": "daklak.gov.vn", "alias_days": 180, "block_days": 365, "retention_days": 180, "backup_days": 373,
        "pointer": "none", "removal_limit": 0.1, "required_refs": {}, "eligibility": {}, "delegates": {},
    }  # fmt: skip
    assert [(line["k"], line["i"], line["r"]) for line in lines[1:]] == [
        ("unit", "u1", {}), ("unit", "u2", {}), ("person", "p1", {}), ("person", "p2", {"decision_ref": "15/QĐ"})
    ]  # fmt: skip
    boxes = {line["i"]: line["a"] for line in lines[1:]}
    assert boxes["u1"] == {
        "ou": ["Sở Y tế"],
        "mailboxUnitCode": ["syt"],
        "mail": ["soyte@daklak.gov.vn"],
        "mailLocalAddress": [
            "postmaster@daklak.gov.vn",
            "postmaster@phuyen.gov.vn",
            "soyte@phuyen.gov.vn",
            "syt@daklak.gov.vn",
        ],
        "mailboxState": ["active"],
        "mailboxClass": ["unit"],
        "mailboxQuota": [str(10 * 2**30)],
    }
    assert boxes["u2"]["mail"] == ["phongkehoach@daklak.gov.vn"]
    assert boxes["u2"]["mailboxParent"] == ["u1"]
    assert boxes["u2"]["mailboxHead"] == ["p1"]
    assert boxes["u2"]["mailboxDelegate"] == ['{"delegation_ref":"5/GUQ","person":"p2","role":"clerk"}']
    assert boxes["p1"] == {
        "cn": ["Nguyễn Thị Tố Uyên"],
        "sn": ["Nguyễn"],
        "givenName": ["Thị Tố Uyên"],
        "mailboxMiddleName": ["Thị Tố"],
        "title": ["Trưởng phòng"],
        "departmentNumber": ["u2"],
        "mail": ["nguyenthitouyen@daklak.gov.vn"],
        "mailLocalAddress": ["uyen@daklak.gov.vn"],
        "mailboxState": ["active"],
        "mailboxClass": ["person"],
        "mailboxQuota": [str(2 * 2**30)],
    }
    assert boxes["p2"]["mail"] == ["hhennie@daklak.gov.vn"]
    assert boxes["p2"]["givenName"] == ["Niê"]
    assert boxes["p2"]["mailboxQuota"] == [str(3 * 2**30)]


def test_every_line_says_where_it_comes_from(tmp_path: Path) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    out = io.BytesIO()
    read(tmp_path, "d", out, TODAY)
    places = [json.loads(line)["l"] for line in out.getvalue().splitlines()[1:]]
    assert places == ["d/units.yml:2", "d/units.yml:7", "d/people.yml:2", "d/people.yml:9"]


def test_validation_alone_writes_nothing_and_finds_the_same(tmp_path: Path) -> None:
    assert problems_of(tmp_path) == []
    assert read(tmp_path, "d", None, TODAY).people == 2
    problems_of(tmp_path, people=PEOPLE.replace("unit: u2\n", "unit: u3\n"))
    assert read(tmp_path, "d", None, TODAY).problems == read_folder(tmp_path)[1].problems != []


def test_the_forms_of_people_are_alike(tmp_path: Path) -> None:
    people = [
        {"id": "p1", "ho": "Nguyễn", "dem": "Thị Tố", "ten": "Uyên", "unit": "u2",
         "title": "Trưởng phòng", "aliases": ["uyen", "uyen@phuyen.gov.vn"]},
        {"id": "p2", "ho": "H'Hen", "dem": None, "ten": "Niê", "unit": "u2", "quota": "3G",
         "decision_ref": "15/QĐ"},
    ]  # fmt: skip
    csv = (
        "\ufeffid,ho,dem,ten,unit,title,quota,aliases,decision_ref\r\n"
        'p1,Nguyễn,Thị Tố,Uyên,u2," Trưởng phòng",,uyen; uyen@phuyen.gov.vn,\r\n'
        "p2,H'Hen,,Niê,u2,,3G,,15/QĐ\r\n"
    )
    yaml = PEOPLE.replace("[uyen]", "[uyen, uyen@phuyen.gov.vn]")
    forms: dict[str, str] = {
        "people.yml": yaml,
        "people.csv": csv,
        "people.json": json.dumps({"mail_people": people}),
        "people/u2.yml": yaml.replace("    unit: u2\n", ""),
        "people/u1.yml": yaml,
    }
    results = []
    for number, (name, text) in enumerate(forms.items()):
        folder = tmp_path / str(number)
        write(folder, {"policy.yml": POLICY, "units.yml": UNITS, name: text})
        out = io.BytesIO()
        assert read(folder, "d", out, TODAY).problems == []
        results.append(re.sub(rb'"l":"[^"]*"', b"", out.getvalue()))
    assert len(set(results)) == 1


@pytest.mark.requirement("DL-annex", "DL-4")
def test_daklak_has_the_annex_as_printed() -> None:
    boxes = desired(DAKLAK)
    annex = [f"dl-{number:02}" for number in range(1, 44)]
    assert [identity for identity in boxes if identity.startswith("dl-")][:43] == annex
    printed = {"dl-09": "chicuckiendlam", "dl-12": "socongngghiep", "dl-22": "banqlkc",
               "dl-37": "krongna", "dl-43": "madrak", "dl-01": "ubnd"}  # fmt: skip
    for identity, local_part in printed.items():
        assert boxes[identity]["mail"] == [f"{local_part}@daklak.gov.vn"]
    corrected = {"dl-09": "chicuckiemlam", "dl-12": "socongnghiep", "dl-22": "banqlkcn",
                 "dl-37": "krongana", "dl-43": "mdrak"}  # fmt: skip
    for identity, local_part in corrected.items():
        assert f"{local_part}@daklak.gov.vn" in boxes[identity]["mailLocalAddress"]
    assert boxes["dl-43"]["ou"] == ["Huyện M'Đrăk"]
    addresses = [address for box in boxes.values() for address in box["mail"] + box.get("mailLocalAddress", [])]
    assert len(addresses) == len(set(addresses))
    assert {"postmaster@daklak.gov.vn", "abuse@daklak.gov.vn"} <= set(addresses)


UNIT_CASES = [
    ("    local_part: soyte", "    local_part: SoYTe",
     'd/units.yml:5: local_part: "SoYTe" must be what stands before the @: at most 64 of a-z, 0-9 and, '
     "between them, the signs . _ -"),
    ("    local_part: soyte", "    local_part: soyte@gmail.com",
     'd/units.yml:5: local_part: "soyte@gmail.com" must be what stands before the @: '),
    ("    local_part: soyte", f"    local_part: {'a' * 65}",
     f'd/units.yml:5: local_part: "{"a" * 39}…" must be what stands before the @: at most 64 of '),
    ("    local_part: soyte", "    local_part: admin",
     'd/units.yml:5: local_part: "admin" is reserved in policy.yml: choose another name'),
    ("    local_part: soyte", "    local_part: 12",
     "d/units.yml:5: local_part: must be text, not 12: put it in quotes"),
    ("    local_part: soyte", "    local_part: uyen",
     "d/people.yml:8: aliases: uyen@daklak.gov.vn is already an address of unit u1 "
     "(d/units.yml:5): give the newer of the two another alias, such as uyen2"),
    ("    local_part: soyte", "    local_pat: soyte",
     "d/units.yml:5: local_pat: is not a known field: did you mean local_part?"),
    ("    aliases: [syt, soyte@phuyen.gov.vn]", "    aliases: syt",
     'd/units.yml:6: aliases: "syt" must be a list'),
    ("    aliases: [syt, soyte@phuyen.gov.vn]", "    aliases: [syt, syt]",
     "d/units.yml:6: aliases: syt@daklak.gov.vn stands twice in this record: keep one"),
    ("    aliases: [syt, soyte@phuyen.gov.vn]", "    aliases: [abuse]",
     'd/units.yml:6: aliases: "abuse" is reserved in policy.yml: choose another name'),
    ("    aliases: [syt, soyte@phuyen.gov.vn]", "    aliases: [syt@yahoo.com]",
     'd/units.yml:6: aliases: "syt@yahoo.com" is outside the domains: '
     "use daklak.gov.vn, phuyen.gov.vn"),
    ("    name: Sở Y tế\n", "", "d/units.yml:2: name: is missing: fill it in"),
    ("    name: Sở Y tế", '    name: " "',
     "d/units.yml:3: name: is empty: fill it in or leave it out"),
    ("    name: Sở Y tế", "    name: Sôû Y teá",
     'd/units.yml:3: name: "Sôû Y teá" is in VNI: convert it to Unicode (QĐ 72/2002)'),
    ("    name: Sở Y tế", "    name: [a]",
     "d/units.yml:3: name: must be text, not a list: put it in quotes"),
    ("  - id: u2", "  - id: U1", 'd/units.yml:7: id: "U1" is already the id at d/units.yml:2: '
     "change one"),
    ("    parent: u1", "    parent: u9",
     'd/units.yml:9: parent: there is no unit "u9": correct it or add it to units.yml'),
    ("    parent: u1", "    parent: u2",
     "d/units.yml:9: parent: leads back to this unit: correct it"),
    ("    head: p1", "    head: p9",
     'd/units.yml:10: head: there is no person "p9": correct it or add the person'),
    ("person: p2", "person: p9",
     'd/units.yml:11: delegates: there is no person "p9": correct it or add the person'),
    ("role: clerk", "rôle: clerk",
     "d/units.yml:12: rôle: is not a known field: did you mean role?"),
    ("    parent: u1", "    state: closed", 'd/units.yml:9: state: "closed" must be one of '
     "active, suspended, legacy, dissolved"),
    ("    parent: u1", "    state: dissolved",
     "d/policy.yml:9: abuse: unit u2 is dissolved and receives no mail: name another"),
    ("    parent: u1", "    quota: 5 GB",
     'd/units.yml:9: quota: "5 GB" is no size: write one such as 500M or 5G'),
    ("    parent: u1", "    name: Twice",
     "d/units.yml:9: name: stands twice in one mapping: keep one"),
    ("    parent: u1", "    parent: &a u1",
     "d/units.yml:9: anchors and aliases (& and *) are not allowed: write the value"),
    ("    parent: u1", "    parent: !vault u1",
     "d/units.yml:9: the tag !vault is not allowed: remove it"),
    ("mail_units:", "---\n---\nmail_units:", "d/units.yml:1: must be a mapping"),
    ("mail_units:", "mail_units: []\n---\nmail_units:", "d/units.yml:2: starts a second document: keep one"),
    ("    parent: u1", "    parent: 0x1F", 'd/units.yml:9: put "0x1F" in quotes'),
    ("mail_units:", "units:", "d/units.yml:1: units: is unknown: the only root is mail_units"),
    ("    parent: u1", "   parent: u1", "d/units.yml:9: is not valid YAML"),
]  # fmt: skip


@pytest.mark.requirement("DL-4")
@pytest.mark.parametrize(("old", "new", "expected"), UNIT_CASES)
def test_faults_of_units(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert UNITS.count(old) == 1
    problems = problems_of(tmp_path, units=UNITS.replace(old, new))
    assert any(problem.startswith(expected) for problem in problems), problems


POLICY_CASES = [
    ("domain: daklak.gov.vn\na", "domain: Daklak\na",
     'd/policy.yml:1: domain: "Daklak" is no domain in lower case, such as daklak.gov.vn'),
    ("    postmaster: u1\n", "",
     "d/policy.yml:8: postmaster: is missing: name the unit that receives it (RFC 2142)"),
    ("    abuse: u2", "    abuse: null",
     "d/policy.yml:9: abuse: is missing: name the unit that receives it (RFC 2142)"),
    ("    abuse: u2", "    abuse: u7",
     'd/policy.yml:9: abuse: there is no unit "u7": correct it or add it to units.yml'),
    ('"{name}"', '"{ten}"',
     'd/policy.yml:5: unit: "{ten}" must be made of a-z 0-9 . _ - and {name}, {code}, {parent}'),
    ('"{name}"', '"{code}"',
     "d/units.yml:7: code: is missing and the address pattern needs it: "
     "fill it in or give local_part"),
    ('"{ho}{dem}{ten}"', '"{ten}.{unit}"',
     'd/people.yml:6: unit: the address needs the code of unit "u2": give it a code'),
    ('"{ho}{dem}{ten}"', '"{unit}{unit}"', "d/people.yml:6: unit: the address needs"),
    ("  unit: 10G\n", "", "d/policy.yml:12: unit: is missing: fill it in"),
    ("quota:", "removal_limit: 5\nquota:",
     'd/policy.yml:11: removal_limit: "5" must be a share between 0 and 1, such as 0.05'),
    ("quota:", "delegates: {max: many}\nquota:",
     'd/policy.yml:11: max: "many" must be a whole number, 0 or more'),
    ("quota:", "domian: x\nquota:",
     "d/policy.yml:11: domian: is not a known field: did you mean domain?"),
    ("  - domain: phuyen.gov.vn", "  - domain: daklak.gov.vn",
     "d/policy.yml:3: domain: daklak.gov.vn stands twice: keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), POLICY_CASES)
def test_faults_of_the_policy(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert POLICY.count(old) == 1
    problems = problems_of(tmp_path, policy=POLICY.replace(old, new))
    assert any(problem.startswith(expected) for problem in problems), problems


PEOPLE_CASES: list[tuple[str, str | bytes, str]] = [
    ("people.yml", PEOPLE.replace("ho: H'Hen, ", ""),
     "d/people.yml:9: ho: is missing: fill it in"),
    ("people.yml", PEOPLE.replace("ho: Nguyễn", "ho: NguyÔn"),
     'd/people.yml:3: ho: "NguyÔn" is in TCVN3: convert it to Unicode (QĐ 72/2002)'),
    ("people.yml", PEOPLE.replace("ten: Uyên", "ten: Uyên/2"),
     'd/people.yml:2: local_part: "/" of "Uyên/2" has no letter in an address: give local_part'),
    ("people.yml", PEOPLE.replace("unit: u2\n", "unit: u3\n"),
     'd/people.yml:6: unit: there is no unit "u3": correct it or add it to units.yml'),
    ("people.yml", PEOPLE.encode("utf-16"), "d/people.yml:1: is not UTF-8"),
    ("people.yml", PEOPLE.replace("Thị Tố", "Thị\x07 Tố"),
     "d/people.yml:4: holds a control character: remove it"),
    ("people.yml", PEOPLE.replace("[uyen]", "&a [*a]"),
     "d/people.yml:8: anchors and aliases (& and *) are not allowed: write the value"),
    ("people.yml", "", "d/people.yml:1: must be a mapping of the form key: value"),
    ("people.yml", "mail_people: {}\n", "d/people.yml:1: mail_people: must be a list"),
    ("people.yml", "mail_people: [p1]\n",
     'd/people.yml:1: mail_people: "p1" must be a mapping such as "- id: x"'),
    ("people.csv", "", "d/people.csv:1: is empty: the first row must name the columns"),
    ("people.csv", "id,ho,ten,unit\np1,Lê,An,u2\np2,Lê,\"Anh\nBa\",u2\np1,Lê,Tư,u1\n",
     'd/people.csv:5: id: "p1" is already the id at d/people.csv:2: change one'),
    ("people.csv", "id,ho,ten,unit\np1,Lê,An\n", "d/people.csv:2: the row has 3 cells, the "),
    ("people.csv", "id,id\n", "d/people.csv:1: id: the header needs a name per column, each once"),
    ("people.csv", 'id,ho\np1,"Lê"x\n', "d/people.csv:2: is not valid CSV"),
    ("people.csv", "id;ho;ten;unit\n" "p1;Lê;An;u2\n", 'd/people.csv:1: separates its columns by ";"'),
    ("people.json", '{"mail_people": [\n{"id": "p1", "ho": "Lê",\n "ten": 5, "unit": "u2"}]}',
     "d/people.json:2: ten: must be text, not 5: put it in quotes"),
    ("people.json", '{"mail_people": [{"id": "p1", "title": "\\ud800"}]}', 'd/people.json:1: title: "?" holds a '),
    ("people.csv", "id,ho,ten,unit,tilte\np1,Lê,An,u2,x\np2,Lê,An,u2,y\n",
     "d/people.csv:1: tilte: is not a known field: did you mean title?"),
    ("people.csv", "id,ho,ten,unit\n" + "p1,Lê,An,u2\n" + "\n" + "p2,Lê,,u2\n", "d/people.csv:4: ten: is missing"),
    ("people.csv", b"id,ho,ten,unit\np1,L\xea,An,u2\n", "d/people.csv:2: is not UTF-8"),
    ("people.json", '{"mail_people": [\n{"id": "p1",}]}', "d/people.json:2: is not valid JSON"),
    ("people.json", '{"mail_people": [\n{"id": "p1", "id": "p2"}]}',
     "d/people.json:2: id: stands twice in one mapping: keep one"),
    ("people.json", '{"people": []}', "d/people.json:1: people: is unknown: the only root is"),
    ("people.json", '{"mail_people": []} x', "d/people.json:1: has text after the end"),
    ("people.json", '{"mail_people": [{"id": "\\ud800"}]}', 'd/people.json:1: id: "?" may hold only'),
    ("people.json", '{"mail_people": [{"quota": NaN}]}', "d/people.json:1: NaN is not a JSON "),
    ("people/u2.yml", PEOPLE.replace("unit: u2\n", "unit: u1\n"),
     "d/people/u2.yml:6: unit: must be u2, as the file is named"),
    ("people/u2.csv", "id\n", "d/people/u2.csv:1: is not one of the files UNIT.yml"),
    ("people/u9.yml", "mail_people: [{id: p3, ho: Lê, ten: An}]\n",
     'd/people/u9.yml:1: unit: there is no unit "u9"'),
    ("nobody.yml", "", 'd/people.yml:1: is missing: write "mail_people: []" for nobody'),
]  # fmt: skip


@pytest.mark.requirement("N-72")
@pytest.mark.parametrize(("name", "text", "expected"), PEOPLE_CASES)
def test_faults_of_people(tmp_path: Path, name: str, text: str | bytes, expected: str) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, name: text})
    problems = [str(problem) for problem in read_folder(tmp_path)[1].problems]
    assert any(problem.startswith(expected) for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


def test_two_sources_of_people_and_a_missing_folder(tmp_path: Path) -> None:
    write(tmp_path, {"policy.yml": POLICY, "units.yml": UNITS, "people.yml": PEOPLE})
    write(tmp_path, {"people.csv": "id\n"})
    problems = [str(problem) for problem in read_folder(tmp_path)[1].problems]
    assert "d/people.csv:1: people.yml and people.csv both hold people: keep one" in problems
    assert [str(problem) for problem in read_folder(tmp_path / "none")[1].problems] == [
        'd/people.yml:1: is missing: write "mail_people: []" for nobody',
        "d/policy.yml:1: cannot be read (no such file or directory): make the file",
        "d/units.yml:1: cannot be read (no such file or directory): make the file",
    ]


@pytest.mark.parametrize("text", ["{}", "domain: null\n", "{domain: daklak.gov.vn}"])
def test_a_policy_without_content_is_refused(tmp_path: Path, text: str) -> None:
    assert any("address: is missing" in problem for problem in problems_of(tmp_path, policy=text))


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    problems = problems_of(
        tmp_path,
        policy=POLICY.replace("10G", "ten"),
        units=UNITS.replace("local_part: soyte", "local_part: Y").replace("code: syt", "cod: s"),
        people=PEOPLE.replace("ho: Nguyễn", "ho: 7").replace("quota: 3G", "state: gone"),
    )
    assert [problem.split(": ")[0] + " " + problem.split(": ")[1] for problem in problems] == [
        "d/people.yml:3 ho",
        "d/people.yml:9 state",
        "d/policy.yml:12 unit",
        "d/units.yml:4 cod",
        "d/units.yml:5 local_part",
    ]
