#!/usr/bin/env python3
"""Writes the documents that are made from data: roles/*/README.md and docs/compliance.md.

    docs/generate.py            write them
    docs/generate.py --check    write nothing, fail when a role's README is not what its data says

A README comes from the role's meta/argument_specs.yml and defaults/main.yml; docs/compliance.md
from tests/clauses.yml and build/requirements.json, which tests/plugin_requirements.py writes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

REGULATIONS = {
    "DL": "Đắk Lắk, 2390/QĐ-UBND, 26/10/2005",
    "LC": "Lào Cai, 391/QĐ-SVHTTDL, 07/10/2015",
    "HT": "Hà Tĩnh, 43/2009/QĐ-UBND, 17/12/2009",
    "CT": "Cần Thơ, 71/2005/QĐ-UBND, 01/11/2005",
    "BD": "Bình Dương, amendment of 2012 to 82/2009/QĐ-UBND",
    "N": "National rules",
}
INLINE_LENGTH = 80  # characters of a default value that a table cell still bears


class InputError(Exception):
    """Input that cannot be turned into a document; its text is one sentence naming the file."""


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML or JSON file holds; empty when the file has no content.

    Raises InputError when the file is missing, malformed or holds something else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: the file is missing; write it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise InputError(f"{where}: is not valid YAML ({reason}); correct it") from None
    if not isinstance(content or {}, dict):
        raise InputError(f"{path}: must hold a mapping, not a {type(content).__name__}; correct it")
    return content or {}


def role_data(role: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a role's entry points (name → specification) and the values of its defaults."""
    path = role / "meta" / "argument_specs.yml"
    specs = read_mapping(path).get("argument_specs")
    if not isinstance(specs, dict) or not isinstance(specs.get("main"), dict):
        raise InputError(f"{path}: argument_specs.main is missing; describe the role there")
    defaults = role / "defaults" / "main.yml"
    return specs, read_mapping(defaults) if defaults.exists() else {}


def paragraphs(description: str | list[str] | None) -> list[str]:
    """Return the paragraphs of a description, which may be one text or a list, each on one line."""
    texts = [description] if isinstance(description, str) else description or []
    return [" ".join(text.split()) for text in texts]


def cell(text: str) -> str:
    """Return text as it may stand in a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def code(value: object) -> str:
    """Return a value as inline code, in JSON's notation, which is YAML's too."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}" if len(text) <= INLINE_LENGTH else "see `defaults/main.yml`"


def rows(
    options: Mapping[str, Any], defaults: Mapping[str, Any], parent: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of each option, a sub-option after its parent.

    options: the specification's mapping; defaults: name → value for options of the first level;
    parent: what stands before the name of a sub-option, with its dot.
    """
    for name, option in options.items():
        kind = option.get("type", "str")
        if "elements" in option:
            kind = f"{kind} of {option['elements']}"
        if option.get("required"):
            default = "required"
        elif "default" in option or name in defaults:
            default = code(option.get("default", defaults.get(name)))
        else:
            default = "optional"
        texts = paragraphs(option.get("description"))
        if "choices" in option:
            texts.append("One of " + ", ".join(code(choice) for choice in option["choices"]) + ".")
        if option.get("no_log"):
            texts.append("A secret: it has no default and is never logged.")
        yield f"`{parent}{name}`", kind, default, " ".join(texts)
        brackets = "[]" if option.get("type") == "list" else ""
        yield from rows(option.get("options") or {}, {}, f"{parent}{name}{brackets}.")


def readme(role: Path) -> str:
    """Return the README of the role in this folder. Raises InputError on missing or bad data."""
    specs, defaults = role_data(role)
    lines = [f"# {role.name}"]
    for entry, spec in specs.items():
        if entry != "main":
            lines += ["", f"## Entry point `{entry}`"]
        lines += ["", *paragraphs(spec.get("short_description"))]
        for text in paragraphs(spec.get("description")):
            lines += ["", text]
        table = list(rows(spec.get("options") or {}, defaults))
        lines += ["", "## Variables" if entry == "main" else "### Variables", ""]
        if table:
            lines += ["| Name | Type | Default | What it is |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table]
        else:
            lines.append("None.")
    lines += [
        "",
        "Generated by `make docs` from `meta/argument_specs.yml` and `defaults/main.yml`; change those.",
    ]
    return "\n".join(lines) + "\n"


def short_names(tests: list[Mapping[str, str]]) -> str:
    """Return the tests as file and name, the cases of one test counted together."""
    cases: dict[str, int] = {}
    for test in tests:
        path, *names = re.sub(r"\[.*", "", test["id"], flags=re.DOTALL).split("::")
        name = "::".join([Path(path).name, *names])
        cases[name] = cases.get(name, 0) + 1
    return "<br>".join(f"`{n}`" + (f" ({c} cases)" if c > 1 else "") for n, c in cases.items())


def proof(result: Mapping[str, Any]) -> str:
    """Return what proves a requirement; result: its entry in build/requirements.json."""
    if result["kind"] == "organisational":
        return "organisational"
    tests = result["tests"]
    if result["kind"] == "gateway":
        return "the province's network" + (f"; here {short_names(tests)}" if tests else "")
    if result["proven"]:
        return short_names(tests)
    failing: dict[str, list[Mapping[str, str]]] = {}
    for test in tests:
        if test["outcome"] != "passed":
            failing.setdefault(test["outcome"], []).append(test)
    return "*open*" + "".join(f"; {how}: {short_names(some)}" for how, some in failing.items())


def compliance(requirements: list[Mapping[str, str]], results: Mapping[str, Any]) -> str:
    """Return docs/compliance.md.

    requirements: entries of tests/clauses.yml; results: content of build/requirements.json.
    Raises InputError when a requirement is not among the results, or has another kind there.
    """
    count = {"technical": 0, "organisational": 0, "gateway": 0}
    proven = 0
    for entry in requirements:
        result = results.get(entry["id"])
        if result is None or result["kind"] != entry["kind"]:
            raise InputError(
                f"build/requirements.json: {entry['id']} is not in it as tests/clauses.yml has it; run make test again"
            )
        count[entry["kind"]] += 1
        proven += result["proven"]
    lines = [
        "# Compliance",
        "",
        "What the regulations of five provinces and the national rules ask of a provincial mail "
        "service, what in the kit answers it, and the tests that showed it in the last test run. "
        "A control without a passing test is *open*, whether it is built or not. "
        "Clauses are in our own words; the regulation's own text is what counts.",
        "",
        f"{len(requirements)} clauses: {count['technical']} technical ({proven} proven, "
        f"{count['technical'] - proven} open); {count['organisational']} organisational, which "
        f"people fulfil with the kit's templates; {count['gateway']} for the province's own "
        "network.",
    ]
    for prefix, title in REGULATIONS.items():
        lines += ["", f"## {title}", "", "| Id | Clause | Control | Proof |", "|---|---|---|---|"]
        for entry in requirements:
            if entry["id"].split("-")[0] != prefix:
                continue
            control = entry["control"] + (f". *{entry['note']}*" if "note" in entry else "")
            row = (entry["id"], entry["clause"], control, proof(results[entry["id"]]))
            lines.append("| " + " | ".join(map(cell, row)) + " |")
    lines += ["", "Generated by `make docs` from `tests/clauses.yml` and the last test run."]
    return "\n".join(lines) + "\n"


def generate(root: Path, check: bool) -> list[str]:
    """Write the documents of the checkout at root, or with check compare the READMEs only.

    Returns one sentence per README that is stale (check only). Raises InputError on bad data.
    """
    roles = sorted(path for path in (root / "roles").glob("*") if path.is_dir())
    if not roles:
        raise InputError(f"{root / 'roles'}: there is no role; run this in the checkout")
    stale = []
    for role in roles:
        path, text = role / "README.md", readme(role)
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(f"{path.relative_to(root)}: is stale; run make docs")
    if check:
        return stale
    results = root / "build" / "requirements.json"
    if results.exists():
        requirements = read_mapping(root / "tests" / "clauses.yml")["requirements"]
        text = compliance(requirements, read_mapping(results))
        (root / "docs" / "compliance.md").write_text(text, encoding="utf-8")
    else:
        print("docs/compliance.md: left as it is, no build/requirements.json yet; run make test")
    return stale


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Write the documents that are made from data.")
    parser.add_argument("--check", action="store_true", help="fail when a role's README is stale")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        help="the checkout (default: the one this script is in)",
    )
    options = parser.parse_args(arguments)
    try:
        stale = generate(options.root, options.check)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    for sentence in stale:
        print(sentence, file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
