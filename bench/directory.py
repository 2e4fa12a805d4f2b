"""The directory engine at 1,000, 10,000 and 100,000 mailboxes, each time against OpenLDAP's own tools in the same run.

    .venv/bin/python bench/directory.py [--sizes 1000,10000,100000] [--engine]

On a lab of its own, all overlays and the accesslog on. Every measurement begins with the same tree, put in place as
files. The references: `slapadd -q` of the very tree that the engine made, `ldapadd` of the same entries, `ldapmodify`
of the same changes, one paged read of the mailboxes by python3-ldap. The engine is the module as the host runs
it, plan and apply together, without Ansible around it; `--engine` leaves the playbook out.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import measure
from measure import CHECKOUT, BenchError, Row

sys.path.insert(0, str(CHECKOUT / "plugins" / "module_utils"))

from hopthu import state

SIZES = (1_000, 10_000, 100_000)
BUILD = CHECKOUT / "build" / "bench-directory"
HOST_FOLDER = "/root/bench-directory"
LDAP = "/var/lib/ldap"
DOMAIN = "daklak.gov.vn"
BASE = "dc=daklak,dc=gov,dc=vn"
LOADER = f"cn=loader,ou=services,{BASE}"
PASSWORD = "/etc/hopthu/directory.secret"
UNIT_SIZE = 100  # people
PAGE = 500
HO = "Nguyễn Trần Lê Phạm Hoàng Huỳnh Phan Vũ Võ Đặng Bùi Đỗ Hồ Ngô Dương Lý Niê Êban Kbuôr Mlô"
DEM = "Văn Thị Ngọc Minh Đức Thanh Hữu Quang Kim Xuân Thu Hồng Quốc Bảo Gia Tuấn Anh Công Đình Duy"
TEN = "Ánh Bình Châu Dũng Giang Hà Hiếu Hương Khánh Lan Linh Long Mai Nam Nga Phúc Quân Sơn Tâm Trang"
POLICY = f"""domain: {DOMAIN}
address:
  person: "{{ho}}{{dem}}{{ten}}-{{unit}}"
  unit: "{{code}}"
  reserved: {{postmaster: u0, abuse: u0}}
removal_limit: 0.1
required_refs: {{join: [decision_ref]}}
quota: {{unit: 10G, person: 2G}}
"""
FIELDS = ("id", "ho", "dem", "ten", "unit", "title", "decision_ref")
# What AnsibleModule does of it all that the module asks for.
STAND_IN = """import json, sys

class AnsibleModule:
    def __init__(self, argument_spec, **_more):
        self.params = {name: about.get("default") for name, about in argument_spec.items()}
        self.params.update(json.load(open(sys.argv[1])))
        self.check_mode = False

    def exit_json(self, **result):
        print(json.dumps(result))

    def fail_json(self, **result):
        sys.exit(json.dumps(result))
"""


# --- a province of any size --------------------------------------------------------------------------------------


def people(size: int, changed: bool) -> Iterator[dict[str, str]]:
    """Yield people with names that differ within a unit; with `changed`, every hundredth has a new title."""
    units = max(1, size // UNIT_SIZE)
    ho, dem, ten = HO.split(), DEM.split(), TEN.split()
    for number in range(size):
        place = number // units  # in the unit
        names = ho[place % 20], f"{dem[place // 20 % 20]} {dem[(place // 400 + number) % 20]}", ten[number % 20]
        title = "Trưởng phòng" if changed and number % 100 == 7 else "Chuyên viên"
        values = (f"p{number}", *names, f"u{number % units}", title, f"{number}/QĐ-UBND")
        yield dict(zip(FIELDS, values, strict=True))


def province(size: int, form: str, changed: bool = False) -> Path:
    """Write the directory files of a province with `size` people; return their folder."""
    folder = BUILD / f"{size}-{form}{'-changed' if changed else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.yml").write_text(POLICY, encoding="utf-8")
    units = "".join(
        f'- {{id: u{number}, code: donvi{number}, name: "Đơn vị số {number}", head: p{number}}}\n'
        for number in range(max(1, size // UNIT_SIZE))
    )
    (folder / "units.yml").write_text(f"mail_units:\n{units}", encoding="utf-8")
    target = folder / f"people.{form}"
    with target.open("w", encoding="utf-8", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(people(size, changed))
        elif form == "json":
            json.dump({"mail_people": list(people(size, changed))}, file, ensure_ascii=False, indent=1)
        else:
            file.write("mail_people:\n")
            for person in people(size, changed):
                file.write("".join(f"{'-' if n == 'id' else ' '} {n}: {v}\n" for n, v in person.items()))
    return folder


def desired(folder: Path) -> Path:
    """Have the controller's reader turn a folder into desired.jsonl; BenchError when it finds a fault."""
    target = folder / "desired.jsonl"
    with target.open("wb") as out:
        reading = state.read(folder, folder.name, out, date.today())
    if reading.problems:
        raise BenchError(f"The generated province is faulty: {reading.problems[0]}")
    return target


# --- the host ----------------------------------------------------------------------------------------------------


class Host:
    """The first host of the group directory."""

    def __init__(self, lab: dict[str, Any]) -> None:
        self.container = next(h["container"] for h in lab["hosts"].values() if "directory" in h["groups"])

    def do(self, script: str, stdin: str = "") -> str:
        """Run a shell script on the host; BenchError when it fails."""
        return measure.inside(self.container, ["bash", "-ec", script], stdin)

    def seconds(self, script: str) -> float:
        """Run a shell script on the host; return how long it took there."""
        out = self.do(f"s=$(date +%s.%N)\n{script}\ne=$(date +%s.%N)\necho; echo $s $e")
        start, end = out.split()[-2:]
        return float(end) - float(start)

    def copy(self, source: Path, target: str) -> None:
        """Copy a file to the host."""
        subprocess.run(["podman", "cp", str(source), f"{self.container}:{target}"], check=True, capture_output=True)

    def put_tree(self, name: str) -> None:
        """Let slapd run with the databases that were kept as `name`, and none of it in the page cache's queue."""
        self.do(
            f"systemctl stop slapd; rm -rf {LDAP}/mail {LDAP}/accesslog {LDAP}/mail.fill; "
            f"cp -a {HOST_FOLDER}/{name}/. {LDAP}/; systemctl reset-failed slapd; systemctl start slapd; sync"
        )

    def keep_tree(self, name: str) -> None:
        """Keep the databases as they are as `name`."""
        self.do(
            f"systemctl stop slapd; rm -rf {HOST_FOLDER}/{name}; mkdir -p {HOST_FOLDER}/{name}; "
            f"cp -a {LDAP}/mail {LDAP}/accesslog {HOST_FOLDER}/{name}/; systemctl start slapd"
        )

    def install_engine(self) -> None:
        """Put the module and what it imports on the host."""
        package = f"{HOST_FOLDER}/ansible/module_utils"
        self.do(f"mkdir -p {package}/hopthu; touch {HOST_FOLDER}/ansible/__init__.py {package}/__init__.py")
        self.do(f"cat > {package}/basic.py", STAND_IN)
        for source in (CHECKOUT / "plugins/module_utils/hopthu").glob("*.py"):
            self.copy(source, f"{package}/hopthu/{source.name}")
        self.copy(CHECKOUT / "plugins/modules/directory.py", f"{HOST_FOLDER}/directory.py")
        self.do(f"cat > {HOST_FOLDER}/secrets.json", json.dumps({"key": "07" * 32, "run": "bench"}))

    def empty_tree(self) -> None:
        """Keep a tree without mailboxes as `empty`."""
        branches = ("units", "people", "released", "decisions")
        drop = "|".join(f"^dn: .+,ou={branch}," for branch in branches)
        self.do(
            f"cd {HOST_FOLDER}; systemctl stop slapd\n"
            f"slapcat -b {BASE} -o ldif-wrap=no > whole.ldif\n"
            f"awk -v RS= -v ORS='\\n\\n' '!/{drop}/' whole.ldif > empty.ldif\n"
            f"cd {LDAP}; rm -rf mail accesslog; install -d -o openldap -g openldap -m 700 mail accesslog\n"
            f"runuser -u openldap -- slapadd -F /etc/ldap/slapd.d -b {BASE} < {HOST_FOLDER}/empty.ldif\n"
            "systemctl start slapd"
        )
        self.keep_tree("empty")

    def plan(self, file: str = "desired.jsonl") -> tuple[float, dict[str, int]]:
        """Plan; return seconds and counts."""
        arguments = {
            **{"mode": "plan", "base": BASE, "uri": "ldapi:///", "bind_dn": LOADER, "password_file": PASSWORD},
            **{"desired_file": f"{HOST_FOLDER}/{file}", "plan_file": f"{HOST_FOLDER}/plan.jsonl"},
        }
        taken = self._module(arguments)
        header = json.loads(self.do(f"head -1 {HOST_FOLDER}/plan.jsonl"))
        return taken, header["counts"]

    def apply(self) -> float:
        """Apply the plan; return seconds."""
        found = self.do(f"sha256sum {HOST_FOLDER}/plan.jsonl").split()[0]
        return self._module(
            {
                **{"mode": "apply", "base": BASE, "uri": "ldapi:///", "bind_dn": LOADER, "password_file": PASSWORD},
                **{"plan_file": f"{HOST_FOLDER}/plan.jsonl", "plan_sha256": found},
                **{"secrets_file": f"{HOST_FOLDER}/secrets.json", "decision": {"by": "bench", "commit": "none"}},
            }
        )

    def _module(self, arguments: dict[str, Any]) -> float:
        self.do(f"cat > {HOST_FOLDER}/arguments.json", json.dumps(arguments))
        return self.seconds(f"cd {HOST_FOLDER} && python3 directory.py arguments.json")

    def mark(self) -> str:
        """What changes with every write to the tree."""
        return self.do(f"ldapsearch -Q -LLL -Y EXTERNAL -H ldapi:/// -s base -b {BASE} contextCSN")

    # --- references ---

    def slapadd(self) -> float:
        """Seconds that `slapadd -q` takes for the tree as it is, into another folder."""
        self.do(
            f"cd {HOST_FOLDER}; slapcat -b {BASE} -o ldif-wrap=no > whole.ldif; rm -rf {LDAP}/reference config\n"
            f"install -d -o openldap -g openldap {LDAP}/reference config\n"
            f"slapcat -n 0 -o ldif-wrap=no | sed 's,: {LDAP}/mail$,: {LDAP}/reference,' | slapadd -n 0 -F config; sync"
        )
        taken = self.seconds(f"slapadd -F {HOST_FOLDER}/config -b {BASE} -q -w -S 1 -l {HOST_FOLDER}/whole.ldif")
        self.do(f"rm -rf {LDAP}/reference")
        return taken

    def ldapadd(self) -> float:
        """Seconds that `ldapadd` takes for the mailboxes of the tree that was last given to `slapadd`."""
        own = (
            "entryUUID|creatorsName|createTimestamp|entryCSN|modifiersName|modifyTimestamp|structuralObjectClass|pwd.*"
        )
        self.do(
            f"cd {HOST_FOLDER}; awk -v RS= -v ORS='\\n\\n' '/^dn: uid=[^,]*,ou=(units|people)/' whole.ldif"
            f" | grep -vE '^({own}): ' > mailboxes.ldif"
        )
        command = f"ldapadd -x -H ldapi:/// -D {LOADER} -y {HOST_FOLDER}/password -f {HOST_FOLDER}/mailboxes.ldif"
        return self.seconds(f"{command} > /dev/null")

    def ldapmodify(self) -> float:
        """Seconds that `ldapmodify` takes for the steps of the plan as it is."""
        script = (
            "import json\n"
            f"for line in open('{HOST_FOLDER}/plan.jsonl'):\n"
            "    step = json.loads(line)\n"
            "    if step.get('step') == 'modify':\n"
            "        print('dn:', step['dn']); print('changetype: modify')\n"
            "        for name, values in step['set'].items():\n"
            "            print('replace:', name)\n"
            "            for value in values: print(name + ':', value)\n"
            "            print('-')\n"
            "        print()\n"
        )
        self.do(f"python3 - > {HOST_FOLDER}/changes.ldif", script)
        command = f"ldapmodify -x -H ldapi:/// -D {LOADER} -y {HOST_FOLDER}/password -f {HOST_FOLDER}/changes.ldif"
        return self.seconds(f"{command} > /dev/null")

    def paged_read(self) -> float:
        """Seconds that one paged read of all mailboxes takes, by the module's LDAP library and of its attributes."""
        script = (
            "import ldap, sys; from ldap.controls import SimplePagedResultsControl as Page\n"
            "from ansible.module_utils.hopthu.plan import READ\n"
            f"session = ldap.initialize('ldapi:///'); session.simple_bind_s('{LOADER}', open('password').read())\n"
            f"page = Page(True, size={PAGE}, cookie='')\n"
            "for kind, branch in (('unit', 'ou=units'), ('person', 'ou=people')):\n"
            "    while True:\n"
            f"        number = session.search_ext(branch + ',{BASE}', ldap.SCOPE_ONELEVEL,\n"
            "            '(objectClass=hopThuMailbox)', READ[kind], serverctrls=[page])\n"
            "        _type, rows, _number, controls = session.result3(number)\n"
            "        page.cookie = controls[0].cookie\n"
            "        if not page.cookie: break\n"
        )
        self.do(f"cat > {HOST_FOLDER}/read.py", script)
        return self.seconds(f"cd {HOST_FOLDER} && python3 read.py")


@contextmanager
def prepared(host: Host) -> Iterator[None]:
    """Keep the tree as it was, make an empty one, and put everything back whatever happens."""
    host.do(f"mkdir -p {HOST_FOLDER}; chmod 700 {HOST_FOLDER}; tr -d '\\n' < {PASSWORD} > {HOST_FOLDER}/password")
    host.keep_tree("before")
    try:
        host.install_engine()
        host.empty_tree()
        yield
    finally:
        host.put_tree("before")
        host.do(f"rm -rf {HOST_FOLDER} {LDAP}/reference")


# --- the engine --------------------------------------------------------------------------------------------------


def engine(host: Host, size: int, times: dict[str, float]) -> list[Row]:
    """Measure the engine at one size."""
    host.copy(desired(province(size, "csv")), f"{HOST_FOLDER}/desired.jsonl")
    host.copy(desired(province(size, "csv", changed=True)), f"{HOST_FOLDER}/changed.jsonl")
    host.put_tree("empty")
    planned, counts = host.plan()
    if counts["refused"] or counts["total"] < size:
        raise BenchError(f"The plan of {size} people is not what was generated: {counts}")
    applied = host.apply()
    host.keep_tree("full")
    slapadd = host.slapadd()
    times[f"empty {size}"] = planned + applied
    rows = [
        Row(f"{size:,} into an empty tree: plan and apply", planned + applied, "s", slapadd, {"max": 1.5}),
        Row(f"{size:,} into an empty tree: apply alone", applied, "s", slapadd),
    ]
    print(f"  {rows[0].name}: {planned:.2f} s + {applied:.2f} s, slapadd {slapadd:.2f} s", flush=True)

    mark = host.mark()
    reads, plans = zip(*((host.paged_read(), host.plan()) for _ in range(3)), strict=True)
    if any(found["total"] for _taken, found in plans) or host.mark() != mark:
        raise BenchError("A run without a change was to write nothing, and did.")
    read, unchanged = min(reads), min(taken for taken, _found in plans)
    times[f"unchanged {size}"] = unchanged
    rows.append(Row(f"{size:,} without a change", unchanged, "s", read, {"max": 1.3}, [taken for taken, _ in plans]))
    print(f"  {rows[-1].name}: {unchanged:.2f} s, one paged read {read:.2f} s", flush=True)

    planned, counts = host.plan("changed.jsonl")
    modify = host.ldapmodify()
    host.put_tree("full")
    planned, counts = host.plan("changed.jsonl")
    changed = planned + host.apply()
    rows.append(Row(f"{size:,} with 1 % changed", changed, "s", unchanged + modify, {"max": 1}))
    print(f"  {rows[-1].name}: {changed:.2f} s, unchanged {unchanged:.2f} s + ldapmodify {modify:.2f} s", flush=True)

    host.do(f"cp {HOST_FOLDER}/desired.jsonl {HOST_FOLDER}/all.jsonl")
    host.put_tree("empty")
    host.do(
        f'(head -1 {HOST_FOLDER}/all.jsonl; grep -m1 \'"k":"unit"\' {HOST_FOLDER}/all.jsonl'
        f' | sed \'s/"i":"[^"]*"/"i":"x"/; s/"mail[A-Z][A-Za-z]*Address":[^]]*],//; s/"mail":\\["/&x/;'
        f' s/,"mailboxHead":\\[[^]]*\\]//\') > {HOST_FOLDER}/one.jsonl'
    )
    host.plan("one.jsonl")
    host.apply()
    host.do(f"cd {HOST_FOLDER}; tail -n +2 one.jsonl > unit; sed -i '1r unit' all.jsonl")
    host.keep_tree("one")
    planned, counts = host.plan("all.jsonl")
    added = planned + host.apply()
    host.put_tree("one")
    ldapadd = host.ldapadd()
    rows.append(Row(f"{size:,} into a live tree", added, "s", ldapadd, {"max": 0.5}))
    print(f"  {rows[-1].name}: {added:.2f} s, ldapadd {ldapadd:.2f} s", flush=True)
    return rows


# --- the whole playbook ------------------------------------------------------------------------------------------


def playbook(folder: Path, lab: dict[str, Any]) -> tuple[float, float]:
    """Run playbooks/directory.yml with the files of `folder`; return seconds and MiB of its largest process."""
    build = Path(lab["inventory"]).parents[1] if "inventory" in lab else CHECKOUT / "build" / measure.LAB
    command = [
        *(str(CHECKOUT / ".venv/bin/ansible-playbook"), "-i", str(build / "inventory/hosts.yml")),
        *("--vault-password-file", str(build / "vault-password"), "-e", f"@{build / 'vault.yml'}"),
        *("-e", f"mail_directory_path={folder}", "-e", f"directory_slips_path={BUILD / 'slips'}"),
        *("-e", f"directory_plan_file={BUILD / 'plan.json'}", "--skip-tags", "mailstore"),
        str(CHECKOUT / "playbooks/directory.yml"),
    ]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(CHECKOUT / "ansible.cfg")}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.stdout.read() if process.stdout else ""
    _pid, status, usage = os.wait4(process.pid, 0)
    taken = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchError(f"{shlex.join(command[-1:])} failed: {out.strip().splitlines()[-1]}")
    return taken, usage.ru_maxrss / 1024


def c_loader(folder: Path) -> float:
    """Seconds that PyYAML's C loader takes for people.yml, in a process of its own."""
    script = "import sys, yaml; yaml.load(open(sys.argv[1], encoding='utf-8'), yaml.CSafeLoader)"
    started = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script, str(folder / "people.yml")], check=True)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime


def whole(host: Host, lab: dict[str, Any], size: int) -> list[Row]:
    """Measure the whole playbook at one size."""
    host.put_tree("empty")
    tiny = province(10, "csv")
    playbook(tiny, lab)
    fixed, _memory = playbook(tiny, lab)
    rows, taken, memory = [], {}, {}
    for form in ("json", "yml", "csv"):
        folder = province(size, form)
        host.put_tree("empty")
        taken[form], memory[form] = playbook(folder, lab)
        print(f"  playbook, {size:,} from {form}: {taken[form]:.1f} s, {memory[form]:.0f} MiB", flush=True)
    slapadd = host.slapadd()
    for form in ("csv", "json"):
        rows.append(Row(f"playbook, {size:,} from {form} into an empty tree", taken[form], "s", slapadd, {"max": 6}))
        rows.append(Row(f"controller's memory, {size:,} from {form}", memory[form], "MiB", 300, {"max": 1}))
    loader = c_loader(province(size, "yml"))
    more = max(0.0, taken["yml"] - taken["csv"])
    rows.append(Row(f"playbook, {size:,} from YAML: more than from CSV", more, "s", loader, {"max": 1.2}))
    read = min(host.paged_read() for _ in range(3))
    unchanged, _memory = playbook(province(size, "csv"), lab)
    rows.append(
        Row(f"playbook, {size:,} without a change, but for Ansible's start", unchanged - fixed, "s", read, {"max": 1.3})
    )
    print(f"  playbook without a change: {unchanged:.1f} s, fixed {fixed:.1f} s, read {read:.2f} s", flush=True)
    return rows


def growth(times: dict[str, float], sizes: list[int]) -> list[Row]:
    """How time grows from each size to the next."""
    return [
        Row(
            f"{large:,} against {small:,}: {what}", times[f"{what} {large}"], "s", times[f"{what} {small}"], {"max": 12}
        )
        for small, large in zip(sizes, sizes[1:], strict=False)
        if large == 10 * small
        for what in ("empty", "unchanged")
    ]


def main() -> int:
    """Measure everything and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="numbers of people")
    parser.add_argument("--engine", action="store_true", help="leave the playbook out")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    with measure.lab() as lab:
        host = Host(lab)
        rows: list[Row] = []
        times: dict[str, float] = {}
        with prepared(host):
            for size in sizes:
                print(f"{size:,} people", flush=True)
                rows += engine(host, size, times)
                if not options.engine:
                    rows += whole(host, lab, size)
        rows += growth(times, sizes)
    return measure.report("directory", rows)


if __name__ == "__main__":
    sys.exit(measure.run(main))
