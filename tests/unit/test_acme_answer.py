"""What answers the ACME server on port 80."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / "roles/certificates/files/usr/local/sbin/acme-answer.py"
SPEC = importlib.util.spec_from_file_location("acme_answer", FILE)
assert SPEC and SPEC.loader
acme_answer = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(acme_answer)
FOLDER = "/.well-known/acme-challenge/"


@pytest.mark.parametrize(
    ("path", "host", "peer", "status"),
    [
        pytest.param(FOLDER + "abc", "mail1.x.vn", "mail2.x.vn", 200, id="its own token"),
        pytest.param(FOLDER + "abc", "mail.x.vn:80", "mail2.x.vn", 200, id="its own token under the service's name"),
        pytest.param(FOLDER + "xyz", "mail.x.vn", "mail2.x.vn", 302, id="perhaps the other's"),
        pytest.param(FOLDER + "xyz", "MAIL1.x.vn:80", "mail2.x.vn", 404, id="not sent on twice"),
        pytest.param(FOLDER + "xyz", "mail.x.vn", "", 404, id="no other host"),
        pytest.param(FOLDER + "../secret", "mail.x.vn", "mail2.x.vn", 404, id="out of the folder"),
        pytest.param(FOLDER + "a" * 129, "mail.x.vn", "mail2.x.vn", 404, id="no token"),
        pytest.param("/", "mail.x.vn", "mail2.x.vn", 404, id="something else"),
    ],
)
def test_tokens_are_found_here_or_at_the_other_host(
    tmp_path: Path, path: str, host: str, peer: str, status: int
) -> None:
    (tmp_path / "abc").write_text("abc.key", encoding="ascii")
    found, text = acme_answer.answer(path, host, "mail1.x.vn", peer, tmp_path)
    assert found == status
    assert text == {200: "abc.key", 302: f"http://{peer}{path}", 404: ""}[status]
