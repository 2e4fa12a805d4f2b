"""Rotation of secrets: stages that leave, between them, nothing that is not accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from hopthu.rotation import RotationRefused, accompanying, fingerprint, missing, rotate

SECRETS: dict[str, dict[str, Any]] = {
    "vault_a": {"rotate": "openldap", "description": "a"},
    "vault_b": {"rotate": "valkey", "description": "b"},
    "vault_key": {"rotate": "dkim", "kind": "rsa-2048", "description": "key"},
    "vault_fixed": {"description": "never rotated"},
}
ALL = ["openldap", "valkey", "dkim"]


@pytest.fixture(scope="module")
def held() -> dict[str, str]:
    """A province's secrets."""
    return missing(SECRETS, {})


def test_what_is_missing_is_made_and_what_is_there_stays(held: dict[str, str]) -> None:
    assert missing(SECRETS, held) == {}
    assert missing(SECRETS, held | {"vault_b": ""}).keys() == {"vault_b"}
    assert len({*held.values()}) == 4
    assert all(len(held[name]) == 32 for name in ("vault_a", "vault_b", "vault_fixed"))
    key = load_pem_private_key(held["vault_key"].encode(), None)
    assert getattr(key, "key_size") == 2048  # noqa: B009 - the type of a loaded key is open
    assert held["vault_key"].startswith("-----BEGIN PRIVATE KEY-----\n")


def test_a_whole_rotation(held: dict[str, str]) -> None:
    first = rotate(SECRETS, held, ALL, published=False)
    one = first.secrets
    assert {one["vault_a_previous"], one["vault_b_previous"]} == {held["vault_a"], held["vault_b"]}
    assert one["vault_a"] != held["vault_a"]
    assert (one["vault_key"], one["vault_fixed"]) == (held["vault_key"], held["vault_fixed"])
    assert one.keys() - held.keys() == {"vault_a_previous", "vault_b_previous", "vault_key_next"}
    assert "dkim_published=true" in first.next

    two = rotate(SECRETS, one, ALL, published=True).secrets
    assert (two["vault_key"], two["vault_key_previous"]) == (one["vault_key_next"], held["vault_key"])
    assert (two["vault_a"], two["vault_b"]) == (one["vault_a"], one["vault_b"])
    assert two.keys() - held.keys() == {"vault_key_previous"}

    last = rotate(SECRETS, two, ALL, published=False)
    assert last.secrets.keys() == held.keys()
    assert last.next.endswith("the rotation is finished")
    assert all(last.secrets[name] == two[name] for name in held)


def test_the_key_waits_for_the_dns_and_the_others_do_not(held: dict[str, str]) -> None:
    one = rotate(SECRETS, held, ALL, published=False).secrets
    stage = rotate(SECRETS, one, ALL, published=False)
    assert stage.secrets.keys() - held.keys() == {"vault_key_next"}
    assert stage.secrets["vault_key"] == held["vault_key"]
    with pytest.raises(RotationRefused, match="waits for the DNS"):
        rotate(SECRETS, stage.secrets, ALL, published=False)


def test_only_the_groups_that_were_named_begin_and_all_that_is_under_way_ends(held: dict[str, str]) -> None:
    one = rotate(SECRETS, held, ["valkey"], published=False)
    assert one.secrets.keys() - held.keys() == {"vault_b_previous"}
    assert len(one.done) == 1
    assert rotate(SECRETS, one.secrets, ["openldap"], published=False).secrets.keys() == held.keys()


@pytest.mark.parametrize(
    ("change", "groups", "words"),
    [({}, ["colour"], "there is no group colour"), ({"vault_a": ""}, ALL, "vault_a is missing: run playbooks/secrets")],
)
def test_what_cannot_be_rotated_is_told(
    held: dict[str, str], change: dict[str, str], groups: list[str], words: str
) -> None:
    with pytest.raises(RotationRefused, match=words):
        rotate(SECRETS, held | change, groups, published=False)


def test_a_fingerprint_is_of_all_secrets_and_tells_none(held: dict[str, str]) -> None:
    mine = fingerprint(SECRETS, held)
    assert fingerprint(SECRETS, {**held, "vault_key": held["vault_key"].strip(), "other": "x"}) == mine
    assert fingerprint(SECRETS, held | {"vault_a": "y"}) != mine
    assert fingerprint(SECRETS, held | {"vault_a_previous": "y"}) != mine
    assert not any(value in mine for value in held.values())


def test_every_stage_has_its_names_in_the_kit() -> None:
    file = Path(__file__).parents[2] / "inventories" / "argument_specs.yml"
    specification = yaml.safe_load(file.read_text(encoding="utf-8"))["secrets"]
    assert {entry.get("kind", "token") for entry in specification.values()} == {"token", "rsa-2048"}
    assert "vault_dkim_key_next" in accompanying(specification)
    assert "vault_openldap_guard_password_previous" in accompanying(specification)
    assert "vault_certificates_ca_passphrase_previous" not in accompanying(specification)
