"""Every role documents its variables: argument specification, defaults and README agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import generate

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path for path in (ROOT / "roles").glob("*") if path.is_dir())
TYPES = {"str", "int", "float", "bool", "list", "dict", "path", "raw", "json", "bytes", "bits"}
SECRETS = ("_password", "_secret", "_passphrase", "_token")


def option_problems(options: Mapping[str, Any], parent: str = "") -> Iterator[str]:
    """Yield what is wrong with options and sub-options; parent: name in front, with its dot."""
    for name, option in options.items():
        where = f"{parent}{name}"
        if not isinstance(option, dict):
            yield f"{where} is empty"
            continue
        if not "".join(generate.paragraphs(option.get("description"))):
            yield f"{where} has no description"
        if option.get("type") not in TYPES:
            yield f"{where} has no type that Ansible knows"
        if option.get("type") == "list" and "elements" not in option:
            yield f"{where} is a list and does not say of what (elements)"
        if "default" in option and option.get("required"):
            yield f"{where} is required and has a default"
        if name.endswith(SECRETS) and "default" in option:
            yield f"{where} is a secret and has a default"
        yield from option_problems(option.get("options") or {}, f"{where}.")


def problems(role: Path) -> list[str]:
    """Return one sentence for each way in which a role's variables are not documented."""
    try:
        specs, defaults = generate.role_data(role)
    except generate.InputError as error:
        return [str(error)]
    options: dict[str, Any] = {}
    for spec in specs.values():
        options |= spec.get("options") or {}
    variables = role / "vars" / "main.yml"
    internal = generate.read_mapping(variables) if variables.exists() else {}
    public, hidden = f"{role.name}_", f"__{role.name}_"
    found = list(option_problems(options))
    for name in [*options, *defaults, *internal]:
        if not name.startswith((public, hidden)):
            found.append(f"{name} does not begin with {public}")
    for name, value in defaults.items():
        if name.startswith(hidden):
            continue
        option = options.get(name)
        if name not in options:
            found.append(f"{name} is in defaults and not in the specification")
        elif isinstance(option, dict):
            if option.get("required"):
                found.append(f"{name} is required and has a value in defaults")
            if "default" in option and option["default"] != value:
                found.append(f"{name} has another default in the specification than in defaults")
            if name.endswith(SECRETS):
                found.append(f"{name} is a secret and has a value in defaults")
    for name, option in options.items():
        if name in defaults or not isinstance(option, dict):
            continue
        if "default" in option:
            found.append(f"{name} has a default in the specification and no value in defaults")
        elif "required" not in option:
            found.append(f"{name} has no default: say 'required: true' or 'required: false'")
    return found


def test_there_is_a_role() -> None:
    assert ROLES, "roles/ is empty, so the tests of this file would test nothing"


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_variables_are_documented(role: Path) -> None:
    assert problems(role) == []


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_readme_is_current(role: Path) -> None:
    readme = role / "README.md"
    assert readme.exists(), f"{readme}: is missing; run make docs"
    assert readme.read_text(encoding="utf-8") == generate.readme(role), "stale; run make docs"


PORT = {"type": "int", "description": "Port."}
NAMES = {"type": "list", "elements": "str", "description": "Names."}


@pytest.mark.parametrize(
    ("options", "defaults", "expected"),
    [
        pytest.param({"relay_port": PORT}, {"relay_port": 25}, [], id="a default is enough"),
        pytest.param({"relay_port": PORT | {"required": True}}, {}, [], id="required"),
        pytest.param({"relay_port": PORT | {"required": False}}, {}, [], id="said to be optional"),
        pytest.param({"relay_port": PORT | {"default": 25}}, {"relay_port": 25}, [], id="same"),
        pytest.param({}, {"__relay_x": 1}, [], id="internal default"),
        pytest.param(
            {"relay_port": PORT},
            {},
            ["relay_port has no default: say 'required: true' or 'required: false'"],
            id="neither default nor required",
        ),
        pytest.param(
            {},
            {"relay_port": 25},
            ["relay_port is in defaults and not in the specification"],
            id="undocumented",
        ),
        pytest.param(
            {"relay_port": PORT | {"default": 26}},
            {"relay_port": 25},
            ["relay_port has another default in the specification than in defaults"],
            id="another default",
        ),
        pytest.param(
            {"relay_port": PORT | {"default": 25}},
            {},
            ["relay_port has a default in the specification and no value in defaults"],
            id="default that nothing sets",
        ),
        pytest.param(
            {"relay_port": PORT | {"required": True}},
            {"relay_port": 25},
            ["relay_port is required and has a value in defaults"],
            id="required and set",
        ),
        pytest.param(
            {"relay_port": PORT | {"required": True, "default": 25}},
            {},
            [
                "relay_port is required and has a default",
                "relay_port has a default in the specification and no value in defaults",
            ],
            id="required with default",
        ),
        pytest.param({"port": PORT}, {"port": 25}, ["port does not begin with relay_"] * 2, id="no prefix"),
        pytest.param({"relay_port": None}, {"relay_port": 25}, ["relay_port is empty"], id="empty option"),
        pytest.param(
            {"relay_port": {"type": "int"}},
            {"relay_port": 25},
            ["relay_port has no description"],
            id="no description",
        ),
        pytest.param(
            {"relay_port": {"type": "number", "description": "Port."}},
            {"relay_port": 25},
            ["relay_port has no type that Ansible knows"],
            id="bad type",
        ),
        pytest.param(
            {"relay_names": NAMES | {"elements": "dict", "options": {"name": {"type": "str"}}}},
            {"relay_names": []},
            ["relay_names.name has no description"],
            id="sub-option",
        ),
        pytest.param(
            {"relay_names": {"type": "list", "description": "Names."}},
            {"relay_names": []},
            ["relay_names is a list and does not say of what (elements)"],
            id="list of what",
        ),
        pytest.param(
            {"relay_password": {"type": "str", "description": "Password."}},
            {"relay_password": "secret"},
            ["relay_password is a secret and has a value in defaults"],
            id="secret with a default",
        ),
    ],
)
def test_problems_are_found(
    tmp_path: Path, options: dict[str, Any], defaults: dict[str, Any], expected: list[str]
) -> None:
    role = tmp_path / "relay"
    write(role / "meta" / "argument_specs.yml", {"argument_specs": {"main": {"options": options}}})
    write(role / "defaults" / "main.yml", defaults)
    assert problems(role) == expected


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        pytest.param(None, "argument_specs.yml: the file is missing", id="missing"),
        pytest.param("argument_specs: {}\n", "argument_specs.main is missing", id="no main"),
        pytest.param("argument_specs: [\n", "argument_specs.yml:2: is not valid YAML", id="broken"),
        pytest.param("- a\n", "must hold a mapping, not a list", id="list"),
    ],
)
def test_role_without_specification(tmp_path: Path, spec: str | None, sentence: str) -> None:
    role = tmp_path / "relay"
    (role / "meta").mkdir(parents=True)
    if spec is not None:
        (role / "meta" / "argument_specs.yml").write_text(spec)
    (found,) = problems(role)
    assert sentence in found


def test_vars_are_internal(tmp_path: Path) -> None:
    role = tmp_path / "relay"
    write(role / "meta" / "argument_specs.yml", {"argument_specs": {"main": {}}})
    write(role / "vars" / "main.yml", {"__relay_a": 1, "other_b": 2})
    assert problems(role) == ["other_b does not begin with relay_"]


def write(path: Path, content: object) -> None:
    """Write content as YAML, making the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
