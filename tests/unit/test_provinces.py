"""The five provinces' own files: addresses and grounds are as their regulation says, what it forbids is refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from datetime import date
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from hopthu import state
from hopthu.plan import Change, Row, make_plan

ROOT = Path(__file__).parents[2] / "inventories"
PROVINCES = ("daklak", "laocai", "hatinh", "cantho", "binhduong")
TODAY = date(2026, 12, 1)
DOCUMENTATION = [ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32")]
GROUPS = {"directory", "mailstore", "mx", "webmail", "backup", "monitor", "quorum"}

# The annex to Quyết định 2390/QĐ-UBND, rows 1 to 43, misprints included.
ANNEX = """
ubnd sonoivu congantinh sotaichinh soxaydung sotuphap sotnmt cucthongke chicuckiendlam cucthue soldtbxh socongngghiep
sonnptnt bodoibienphong sokhdt sovhtt sogvt soyte ubndtp sotmdl sogddt banqlkc bantongiao thanhtra bandantoc sobcvt
sokhcn hoilienhiepphunu sotheducthethao uybandsgdte vienkiemsatnd buondon cumgar eahleo eakar easup krongna krongbong
krongbuk krongnang krongpak lak madrak
"""

Desired = tuple[dict[str, Any], dict[str, dict[str, Any]]]
"""The policy of the header, and mailbox id → its line."""


def problems(folder: Path, today: date = TODAY) -> list[str]:
    return [str(problem) for problem in state.read(folder, "d", None, today).problems]


def desired(folder: Path, today: date = TODAY) -> Desired:
    out = io.BytesIO()
    reading = state.read(folder, "d", out, today)
    assert reading.problems == []
    header, *lines = map(json.loads, out.getvalue().splitlines())
    return header["policy"], {line["i"]: line for line in lines}


def addresses(mailbox: dict[str, Any]) -> list[str]:
    return [*mailbox["a"]["mail"], *mailbox["a"].get("mailLocalAddress", [])]


def by_name(mailboxes: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [line for line in mailboxes.values() if name in (*line["a"].get("cn", []), *line["a"].get("ou", []))]
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a province's directory files to a place where they can be changed."""
    return lambda province: Path(shutil.copytree(ROOT / province / "directory", tmp_path / province))


def edit(folder: Path, file: str, old: str, new: str) -> None:
    """Replace the first `old`, which must be there."""
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}"
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")


def people(folder: Path) -> list[dict[str, Any]]:
    """Take the people out of the files, whatever their form."""
    found: list[dict[str, Any]] = []
    for path in sorted([*folder.glob("people.*"), *folder.glob("people/*.yml")]):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            records = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(io.StringIO(text))]
        else:
            records = yaml.safe_load(text)["mail_people"]
        found += [({"unit": path.stem} if path.parent.name == "people" else {}) | record for record in records]
        path.unlink()
    if (folder / "people").is_dir():
        (folder / "people").rmdir()
    return found


def change(folder: Path, identity: str, **fields: Any) -> None:
    """Set fields of the unit or person with this id; None takes a field out."""
    units = yaml.safe_load((folder / "units.yml").read_text(encoding="utf-8"))["mail_units"]
    persons = people(folder)
    (record,) = [record for record in [*units, *persons] if record["id"] == identity]
    record.update(fields)
    for name in [name for name, value in fields.items() if value is None]:
        del record[name]
    for name, root, records in (("units.yml", "mail_units", units), ("people.json", "mail_people", persons)):
        (folder / name).write_text(json.dumps({root: records}, ensure_ascii=False), encoding="utf-8")


def planned(folder: Path, live: list[Row]) -> tuple[dict[str, Change], list[Row]]:
    """Plan `folder` on a tree: mailbox id → its row of the plan, and the tree that the steps give."""
    out = io.BytesIO()
    reading = state.read(folder, "d", out, TODAY)
    assert reading.problems == []
    base = "dc=" + reading.domain.replace(".", ",dc=")
    loader = f"cn=loader,ou=services,{base}"
    plan = make_plan(out.getvalue().splitlines(), live, [], base=base, loader=loader, now="20261201000000Z")
    assert plan.header["stop"] is None
    tree = {dn: dict(attributes) for dn, attributes in live}
    for step in plan.steps:
        identity = step.dn.split(",")[0].removeprefix("uid=")
        entry = tree.setdefault(step.dn, {"uid": [identity.encode()], "creatorsName": [loader.encode()]})
        for name, values in step.set.items():
            entry[name] = [value.encode() for value in values]
    full = [(dn, {name: values for name, values in entry.items() if values}) for dn, entry in tree.items()]
    rows: dict[str, Change] = {}
    for row in plan.changes:
        rows.setdefault(row.id, row)
    return rows, sorted(full, key=lambda row: "ou=people" in row[0])


# --- the files as they are


@pytest.mark.parametrize("province", PROVINCES)
def test_files_are_accepted_and_every_mailbox_has_its_grounds(province: str) -> None:
    policy, mailboxes = desired(ROOT / province / "directory")
    eligible = policy["eligibility"]
    for line in mailboxes.values():
        kind, action = {"unit": ("units", "found"), "person": ("people", "join")}.get(
            line["k"], ("programs", "connect")
        )
        missing = set(policy["required_refs"].get(action, ())) - set(line["r"])
        assert not missing, f"{line['l']} lacks {missing}"
        if line["k"] == "application":
            continue
        (category,) = line["a"]["businessCategory"]
        if category in (eligible.get("on_request") or ()):
            assert "commitment_ref" in line["r"], line["l"]
        elif eligible.get(kind):
            assert category in eligible[kind], line["l"]
    for unit in (line for line in mailboxes.values() if line["k"] == "unit"):
        delegates = [json.loads(text) for text in unit["a"].get("mailboxDelegate", [])]
        limit = policy["delegates"].get("max")
        assert limit is None or len(delegates) <= limit
        for delegate in delegates:
            assert delegate["role"] in (policy["delegates"].get("roles") or [delegate["role"]])
            assert "delegation_ref" in delegate or not policy["delegates"].get("document_required")


@pytest.mark.parametrize("province", PROVINCES)
def test_technical_addresses_arrive_at_the_province_and_at_its_merged_domains(province: str) -> None:
    folder = ROOT / province / "directory"
    reading = state.read(folder, "d", None, TODAY)
    assert reading.domain == f"{province}.gov.vn"
    taken = [address for line in desired(folder)[1].values() for address in addresses(line)]
    assert len(taken) == len(set(taken))
    for domain in reading.domains:
        assert {f"postmaster@{domain}", f"abuse@{domain}"} <= set(taken)
    assert not {f"{name}@{reading.domain}" for name in ("root", "admin", "contact")} & set(taken)


def test_each_form_of_the_people_is_in_use() -> None:
    forms = {
        path.relative_to(ROOT / province / "directory").as_posix()
        for province in PROVINCES
        for path in (ROOT / province / "directory").rglob("people*/*" if province == "laocai" else "people.*")
    }
    assert forms == {"people.yml", "people.csv", "people.json", "people/lc-01.yml"}


@pytest.mark.parametrize(
    ("province", "domain", "local", "unit"),
    [
        ("daklak", "phuyen.gov.vn", "ubnd", "dl-01"),
        ("laocai", "yenbai.gov.vn", "contact-svhttdl", "lc-01"),
        ("cantho", "soctrang.gov.vn", "ubnd", "ct-01"),
        ("cantho", "haugiang.gov.vn", "ubnd", "ct-01"),
    ],
)
def test_merged_province_is_received_until_its_last_day(province: str, domain: str, local: str, unit: str) -> None:
    folder = ROOT / province / "directory"
    assert f"{local}@{domain}" in addresses(desired(folder, date(2027, 6, 30))[1][unit])
    gone = desired(folder, date(2027, 7, 1))[1]
    assert not [address for line in gone.values() for address in addresses(line) if address.endswith(f"@{domain}")]


# --- the addresses that a regulation names


@pytest.mark.requirement("DL-annex", "DL-4")
def test_daklak_has_the_annex_as_printed() -> None:
    _policy, mailboxes = desired(ROOT / "daklak" / "directory")
    assert [line["a"]["mail"] for line in mailboxes.values() if line["k"] == "unit"] == [
        [f"{name}@daklak.gov.vn"] for name in ANNEX.split()
    ]


FORMS = [
    pytest.param(
        "laocai", "Sở Văn hóa, Thể thao và Du lịch", "contact-svhttdl", marks=pytest.mark.requirement("LC-4.1")
    ),
    pytest.param("laocai", "Văn phòng Sở", "vanphong-svhttdl", marks=pytest.mark.requirement("LC-4.2")),
    pytest.param("laocai", "Thư viện tỉnh", "thuvien-svhttdl", marks=pytest.mark.requirement("LC-4.2")),
    pytest.param("laocai", "Nguyễn Thị Tố Uyên", "nguyenthitouyen-svhttdl", marks=pytest.mark.requirement("LC-4.3")),
    pytest.param("laocai", "Đặng Thị Ngọc Ánh", "dangthingocanh-svhttdl", marks=pytest.mark.requirement("LC-4.3")),
    pytest.param("hatinh", "Sở Thông tin và Truyền thông", "stttt", marks=pytest.mark.requirement("HT-2.2a")),
    pytest.param("hatinh", "Nguyễn Thiện", "nguyenthien.ubnd", marks=pytest.mark.requirement("HT-2.2b")),
    pytest.param("hatinh", "Nguyễn Thị Tố Uyên", "nguyenthitouyen.svhttdl", marks=pytest.mark.requirement("HT-2.2b")),
    pytest.param("hatinh", "Y Thông Ê-ban", "ythongeban.ubnd", marks=pytest.mark.requirement("HT-2.2b")),
    pytest.param("cantho", "Nguyễn Thị Tố Uyên", "nguyenthitouyen", marks=pytest.mark.requirement("CT-4")),
    pytest.param("cantho", "Huỳnh Phước Hoà", "huynhphuochoa", marks=pytest.mark.requirement("CT-4")),
    pytest.param("cantho", "Sở Tài nguyên và Môi trường", "sotnmt", marks=pytest.mark.requirement("CT-4")),
    pytest.param("cantho", "Sở Nội vụ", "sonoivu", marks=pytest.mark.requirement("CT-4")),
    # Bình Dương's articles at hand name no form: what its policy.yml says.
    pytest.param("binhduong", "Sở Thông tin và Truyền thông", "stttt"),
    pytest.param("binhduong", "H'Hen Niê", "hhennie"),
]


@pytest.mark.parametrize(("province", "name", "local_part"), FORMS)
def test_address_has_the_form_of_the_regulation(province: str, name: str, local_part: str) -> None:
    _policy, mailboxes = desired(ROOT / province / "directory")
    assert by_name(mailboxes, name)["a"]["mail"] == [f"{local_part}@{province}.gov.vn"]


def test_second_form_of_lao_cai_is_off_and_can_be_put_on(copy: Callable[[str], Path]) -> None:
    folder = copy("laocai")
    assert addresses(desired(folder)[1]["cb-0001"]) == ["nguyenthitouyen-svhttdl@laocai.gov.vn"]
    edit(folder, "policy.yml", "# person_alias:", "person_alias:")
    assert addresses(desired(folder)[1]["cb-0001"])[1:] == ["uyennguyenthito-svhttdl@laocai.gov.vn"]


# --- what is refused


@pytest.mark.parametrize("province", PROVINCES)
@pytest.mark.parametrize(
    ("field", "word"),
    [
        ("aliases: [ubnd2@example.org]", "outside"),
        ("aliases: [van+phong]", "van+phong"),
        ("aliases: [Van_Phong]", "Van_Phong"),
        ("aliases: [postmaster]", "postmaster"),
        ("aliases: [abuse]", "abuse"),
    ],
)
def test_forbidden_address_is_refused(copy: Callable[[str], Path], province: str, field: str, word: str) -> None:
    folder = copy(province)
    edit(folder, "units.yml", "    class:", f"    {field}\n    class:")
    (problem,) = problems(folder)
    assert problem.startswith("d/units.yml:")
    assert "aliases" in problem
    assert word in problem


@pytest.mark.requirement("DL-annex")
@pytest.mark.parametrize("misprint", ["chicuckiendlam", "socongngghiep", "banqlkc", "krongna", "madrak"])
def test_annex_address_that_is_computed_is_refused(copy: Callable[[str], Path], misprint: str) -> None:
    """The right form is an alias already, so a corrected or computed main address meets it."""
    folder = copy("daklak")
    text = (folder / "units.yml").read_text(encoding="utf-8")
    corrected = text.split(f"local_part: {misprint}\n    aliases: [")[1].split("]")[0]
    edit(folder, "units.yml", f"local_part: {misprint}\n", f"local_part: {corrected}\n")
    (problem,) = problems(folder)
    assert f"{corrected}@daklak.gov.vn" in problem


@pytest.mark.requirement("LC-3", "LC-9.2")
def test_a_unit_s_own_file_holds_only_its_own_people(copy: Callable[[str], Path]) -> None:
    folder = copy("laocai")
    (folder / "people" / "lc-05.yml").write_text(
        "mail_people:\n  - {id: cb-0009, ho: Ma, dem: Thị, ten: Xuân, unit: lc-01}\n", encoding="utf-8"
    )
    (problem,) = problems(folder)
    assert problem.startswith("d/people/lc-05.yml:2: unit:")


@pytest.mark.requirement("HT-2.2a")
def test_unit_of_ha_tinh_without_its_abbreviation_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("hatinh")
    edit(folder, "units.yml", "    code: svhttdl\n", "")
    assert any(problem.startswith("d/units.yml:") and "code" in problem for problem in problems(folder))


# --- the hosts


def hosts(province: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / province / "hosts.yml").read_text(encoding="utf-8"))["all"]
    return tree


@pytest.mark.parametrize("province", PROVINCES)
def test_hosts_stand_in_all_groups_and_have_documentation_addresses(province: str) -> None:
    tree = hosts(province)
    members = {group: set(content["hosts"]) for group, content in tree["children"].items()}
    assert set(members) == GROUPS
    # There is no webmail yet.
    assert {group for group, names in members.items() if not names} <= {"webmail"}
    assert set().union(*members.values()) == set(tree["hosts"]) == {"mail1", "mail2", "witness"}
    assert members["directory"] == members["mailstore"] == members["mx"] == {"mail1", "mail2"}
    networks = [ip_network(network) for network in tree["vars"]["mail_management_networks"]]
    for host in tree["hosts"].values():
        assert host["ansible_host"] == host["host_addresses"][0]
    # The service addresses are nobody's own: they move.
    for addresses in [tree["vars"]["mail_service_addresses"], *(h["host_addresses"] for h in tree["hosts"].values())]:
        four, six = map(ip_address, addresses)
        assert (four.version, six.version) == (4, 6)
        for address in (four, six):
            assert any(address in network for network in DOCUMENTATION)
            assert any(address in network for network in networks)


def test_no_two_provinces_share_an_address() -> None:
    trees = [hosts(name) for name in PROVINCES]
    taken = [address for tree in trees for host in tree["hosts"].values() for address in host["host_addresses"]]
    taken += [address for tree in trees for address in tree["vars"]["mail_service_addresses"]]
    assert len(taken) == len(set(taken)) == 40


# --- grounds, eligibility, delegation


@pytest.mark.parametrize("province", PROVINCES)
def test_first_load_has_nothing_refused_and_a_second_nothing_to_do(province: str) -> None:
    folder = ROOT / province / "directory"
    rows, tree = planned(folder, [])
    assert [row.refused for row in rows.values() if row.refused] == []
    assert {row.action for row in rows.values()} <= {"join", "found", "connect"}
    assert planned(folder, tree)[0] == {}


NEW = {"unit": "dl-02", "decision_ref": "15/QĐ-SNV", "order_ref": "20/VP-UBND"}


@pytest.mark.requirement("DL-7.1")
@pytest.mark.parametrize("lacking", ["decision_ref", "order_ref", None])
def test_dak_lak_takes_an_official_on_decision_and_order(copy: Callable[[str], Path], lacking: str | None) -> None:
    folder = copy("daklak")
    person = {"id": "cb-0001", "ho": "H'Hen", "ten": "Niê"} | NEW
    given = {name: value for name, value in person.items() if name != lacking}
    (folder / "people.yml").write_text(json.dumps({"mail_people": [given]}, ensure_ascii=False), encoding="utf-8")
    row = planned(folder, [])[0]["cb-0001"]
    assert row.address == "hhennie@daklak.gov.vn"
    assert (row.refused or "").startswith(f"join needs {lacking}:" if lacking else "")
    assert bool(row.refused) is bool(lacking)


DELEGATES = [
    {"person": f"cb-000{number}", "role": "Văn thư", "delegation_ref": f"{number}/GUQ"} for number in (4, 5, 6)
]
REFUSED = [
    # id, fields taken out or set in it, the reason
    pytest.param(
        "laocai", "cb-0008", {"decision_ref": None}, "join needs decision_ref", marks=pytest.mark.requirement("LC-6.2a")
    ),
    pytest.param(
        "laocai", "cb-0008", {"request_ref": None}, "join needs request_ref", marks=pytest.mark.requirement("LC-6.2a")
    ),
    pytest.param(
        "laocai", "lc-06", {"legal_act_ref": None}, "found needs legal_act_ref", marks=pytest.mark.requirement("LC-6.1")
    ),
    pytest.param(
        "hatinh", "cb-0006", {"decision_ref": None}, "join needs decision_ref", marks=pytest.mark.requirement("HT-5.1")
    ),
    pytest.param(
        "hatinh", "cb-0006", {"request_ref": None}, "join needs request_ref", marks=pytest.mark.requirement("HT-5.1")
    ),
    pytest.param(
        "cantho", "cb-0008", {"decision_ref": None}, "join needs decision_ref", marks=pytest.mark.requirement("CT-7.1")
    ),
    pytest.param(
        "cantho", "cb-0008", {"request_ref": None}, "join needs request_ref", marks=pytest.mark.requirement("CT-7.1")
    ),
    pytest.param("binhduong", "cb-0009", {"request_ref": None}, "join needs request_ref"),
    pytest.param(
        "binhduong",
        "cb-0009",
        {"class": "public_employee"},
        "public_employee is not eligible",
        marks=pytest.mark.requirement("BD-2.2"),
    ),
    pytest.param(
        "binhduong",
        "cb-0009",
        {"class": None},
        "without a class is not eligible",
        marks=pytest.mark.requirement("BD-2.2"),
    ),
    pytest.param(
        "binhduong",
        "bd-05",
        {"class": "private_company"},
        "private_company is not eligible",
        marks=pytest.mark.requirement("BD-2.2"),
    ),
    pytest.param(
        "binhduong", "cb-0007", {"commitment_ref": None}, "give commitment_ref", marks=pytest.mark.requirement("BD-2.3")
    ),
    pytest.param(
        "binhduong", "bd-07", {"commitment_ref": None}, "give commitment_ref", marks=pytest.mark.requirement("BD-2.3")
    ),
    pytest.param(
        "laocai",
        "lc-03",
        {"delegates": [{"person": "cb-0004", "role": "Văn thư"}]},
        "no delegation_ref",
        marks=pytest.mark.requirement("LC-10.2"),
    ),
    pytest.param(
        "hatinh",
        "ht-04",
        {"delegates": [{"person": "cb-0006", "role": "Văn thư"}]},
        "no delegation_ref",
        marks=pytest.mark.requirement("HT-7.2"),
    ),
    pytest.param(
        "hatinh",
        "ht-04",
        {"delegates": [DELEGATES[2] | {"role": "Chuyên viên"}]},
        "Chánh Văn phòng, Văn thư",
        marks=pytest.mark.requirement("HT-7.2"),
    ),
    pytest.param(
        "cantho", "ct-02", {"delegates": DELEGATES[:2]}, "policy.yml allows 1", marks=pytest.mark.requirement("CT-9.1")
    ),
]


@pytest.mark.parametrize(("province", "identity", "fields", "reason"), REFUSED)
def test_mailbox_is_refused(
    copy: Callable[[str], Path], province: str, identity: str, fields: dict[str, Any], reason: str
) -> None:
    folder = copy(province)
    change(folder, identity, **fields)
    row = planned(folder, [])[0][identity]
    assert reason in (row.refused or "accepted")


@pytest.mark.parametrize(
    ("province", "unit", "delegates"),
    [
        pytest.param("laocai", "lc-03", DELEGATES, marks=pytest.mark.requirement("LC-10.2")),
        pytest.param("hatinh", "ht-05", DELEGATES, marks=pytest.mark.requirement("HT-7.2")),
        pytest.param("cantho", "ct-02", DELEGATES[:1], marks=pytest.mark.requirement("CT-9.1")),
        pytest.param("cantho", "ct-02", [{"person": "cb-0004"}], marks=pytest.mark.requirement("CT-9.1")),
    ],
)
def test_unit_may_be_delegated(copy: Callable[[str], Path], province: str, unit: str, delegates: list[Any]) -> None:
    folder = copy(province)
    _rows, tree = planned(folder, [])
    change(folder, unit, delegates=delegates)
    rows, _tree = planned(folder, tree)
    assert (rows[unit].action, rows[unit].refused) == ("delegate", None)
    for delegate in delegates:
        assert unit in (rows[delegate["person"]].after or {})["mailboxActsFor"]


@pytest.mark.requirement("HT-5.1")
def test_ha_tinh_names_the_two_bodies_that_are_written_to() -> None:
    folder = ROOT / "hatinh" / "directory"
    policy = yaml.safe_load((folder / "policy.yml").read_text(encoding="utf-8"))
    units = desired(folder)[1]
    names = [units[body]["a"]["ou"] for body in policy["notify"]["bodies"]]
    assert names == [["Trung tâm Công báo – Tin học"], ["Sở Thông tin và Truyền thông"]]


FRESH = {name: f"99/{name}" for name in ("decision_ref", "order_ref", "request_ref")}


@pytest.mark.parametrize(
    ("province", "person", "unit", "address", "former", "needed"),
    [
        pytest.param(
            "cantho",
            "cb-0008",
            "ct-04",
            "huynhphuochoa",
            None,
            ["decision_ref", "request_ref"],
            marks=pytest.mark.requirement("CT-7.2"),
        ),
        pytest.param(
            "binhduong",
            "cb-0009",
            "bd-02",
            "hhennie",
            None,
            ["request_ref", "decision_ref"],
        ),
        pytest.param("hatinh", "cb-0006", "ht-05", "dangthingocanh.svhttdl", "dangthingocanh.stttt", ["decision_ref"]),
        # The regulation knows one department only; a unit with a code of its own shows what a second one would do.
        pytest.param(
            "laocai",
            "cb-0008",
            "lc-06",
            "lovanphuong-baotang",
            "lovanphuong-svhttdl",
            ["decision_ref", "request_ref"],
            marks=pytest.mark.requirement("LC-6.2a"),
        ),
    ],
)
def test_change_of_post(
    copy: Callable[[str], Path],
    province: str,
    person: str,
    unit: str,
    address: str,
    former: str | None,
    needed: list[str],
) -> None:
    """The mailbox stays. Where the address holds the unit's code it is a new one, and the old goes on for a time."""
    folder = copy(province)
    _rows, tree = planned(folder, [])
    change(folder, person, unit=unit)
    for name in needed:
        grounds = {other: FRESH[other] for other in needed if other != name}
        other = Path(shutil.copytree(folder, folder.parent / name))
        change(other, person, **grounds)
        assert name in (planned(other, tree)[0][person].refused or "accepted")
    change(folder, person, **{name: FRESH[name] for name in needed})
    row = planned(folder, tree)[0][person]
    assert (row.action, row.refused) == ("move", None)
    assert row.address == f"{address}@{province}.gov.vn"
    aliases = (row.after or {}).get("mailLocalAddress", [])
    assert aliases == ([f"{former}@{province}.gov.vn"] if former else [])
    assert not row.password


@pytest.mark.requirement("CT-10.2")
def test_can_tho_suspends_a_whole_agency_on_a_decision(copy: Callable[[str], Path]) -> None:
    folder = copy("cantho")
    _rows, tree = planned(folder, [])
    change(folder, "ct-02", state="suspended")
    assert "suspend needs decision_ref" in (planned(folder, tree)[0]["ct-02"].refused or "accepted")
    assert {row.refused is None for row in planned(folder, tree)[0].values()} == {False}
    change(folder, "ct-02", decision_ref="99/QĐ-UBND")
    rows, _tree = planned(folder, tree)
    suspended = {row.id for row in rows.values() if row.action == "suspend" and not row.refused}
    # The agency, its officials, and the centre's below it.
    assert suspended == {"ct-02", "cb-0002", "cb-0007", "cb-0003"}
    assert rows["cb-0002"].after == {"mailboxState": ["suspended"]}
