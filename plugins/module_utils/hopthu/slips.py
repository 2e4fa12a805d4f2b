"""Slips: the printed pages that bring an initial password to its owner. Runs on the controller.

A run that makes passwords first writes TIME.pending.yml (its key, encrypted with the run's vault secret) and
TIME.pending.cms (the pages, encrypted to the operators' certificates), and only then touches the directory. At its
end the first is removed and the second becomes TIME.cms. What an interrupted run has left is sorted out by the next:
the directory names, for each mailbox, the run whose slip holds its password, so the pages of mailboxes that came to
exist are kept and the others never leave this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml
from ansible.errors import AnsibleError

from .durable import replaced, sync
from .passwords import KEY_OCTETS, initial_password

_JOURNAL = ".pending.yml"
_PAGES = ".pending.cms"

_HEAD = """<!DOCTYPE html>
<html lang="vi"><head><meta charset="utf-8"><title>Phiếu cấp tài khoản thư điện tử</title>
<style>body{font:12pt serif}section{page-break-after:always;max-width:16cm;margin:2cm auto}h1{font-size:15pt;
text-align:center}dt{float:left;width:5cm;clear:left}dd{margin:0 0 .4cm 5cm;font-weight:bold}.p{font-family:monospace}
</style></head><body>
"""
# LC-11.1, HT-6.1, CT-8.3: change it; DL-8.1, LC-11.5, HT-6.1, CT-8.1: tell nobody; DL-8.5, CT-8.1: report a leak.
_PAGE = """<section data-id="{id}"><h1>PHIẾU CẤP TÀI KHOẢN THƯ ĐIỆN TỬ</h1><dl><dt>{label}</dt><dd>{name}</dd>
<dt>Đơn vị</dt><dd>{unit}</dd><dt>Địa chỉ thư điện tử</dt><dd>{address}</dd><dt>Mật khẩu ban đầu</dt>
<dd class="p">{password}</dd></dl><p>{use} Giữ bí
mật mật khẩu, không cung cấp cho người khác; khi lộ hoặc mất, báo ngay cho đơn vị vận hành để được cấp lại.</p>
<p>Người nhận ký tên, ngày tháng: ………………………………</p></section>
"""
_LABELS = {"person": "Họ và tên", "unit": "Hộp thư đơn vị", "application": "Ứng dụng"}
_CHANGE = "Mật khẩu ban đầu chưa mở được hộp thư: phải đổi ngay sau khi nhận phiếu này."
# HT-4.2e: a program cannot change its password, and has no mailbox.
_USE = {
    "application": "Ứng dụng đăng nhập bằng địa chỉ và mật khẩu này, chỉ để gửi thư, từ các máy chủ đã đăng ký; không"
    " đổi mật khẩu khi nhận."
}


class SlipsRefused(ValueError):
    """Why slips cannot be written or read; the message is one clear sentence."""


class Holder(NamedTuple):
    """Who gets a page: mailbox id, kind (unit, person or application), address, name, name of the unit."""

    id: str
    kind: str
    address: str
    name: str
    unit: str


class Vault(Protocol):
    """What is needed of ansible.parsing.vault.VaultLib."""

    secrets: Any

    def encrypt(self, plaintext: str) -> bytes:
        """Encrypt text."""

    def decrypt(self, vaulttext: bytes) -> bytes:
        """Decrypt what `encrypt` gave."""


def check_certificates(certificates: list[Path]) -> None:
    """Raise SlipsRefused unless openssl can encrypt to every one of the operators' certificates (X.509, PEM)."""
    if shutil.which("openssl") is None:
        raise SlipsRefused("the slips are encrypted by openssl, which is not installed here: apt-get install openssl")
    if not certificates:
        raise SlipsRefused("no operator's certificate is named: set directory_slips_certificates")
    for certificate in certificates:
        if not certificate.is_file():
            raise SlipsRefused(
                f"{certificate} is missing: slips with initial passwords are encrypted to the operator's certificate "
                f"(openssl req -x509 -newkey rsa:3072 -days 3650 -subj /CN=operator -keyout operator-key.pem "
                f"-out {certificate})"
            )
        tried = subprocess.run(_encrypt([certificate], os.devnull), input=b"x", capture_output=True, check=False)
        if tried.returncode:
            raise SlipsRefused(f"{certificate} is no certificate that openssl can encrypt to: give an X.509 one, PEM")


def _encrypt(certificates: list[Path], target: str | Path) -> list[str | Path]:
    """Return the command that encrypts its input as CMS (RFC 5652, RFC 5083) to each of `certificates`."""
    options = ["-binary", "-stream", "-outform", "DER", "-aes-256-gcm", "-out"]
    return ["openssl", "cms", "-encrypt", *options, target, *certificates]


def write_pages(path: Path, certificates: list[Path], holders: Iterable[Holder], key: bytes) -> None:
    """Write the encrypted pages of `holders`, passwords made from `key`, whole or not at all.

    Raises SlipsRefused when openssl fails.
    """
    with replaced(path) as target:
        process = subprocess.Popen(
            _encrypt(certificates, f"/dev/fd/{target.fileno()}"),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[target.fileno()],
        )
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            process.stdin.write(_HEAD.encode())
            for holder in holders:
                page = _PAGE.format(
                    id=escape(holder.id),
                    label=_LABELS[holder.kind],
                    name=escape(holder.name),
                    unit=escape(holder.unit),
                    address=escape(holder.address),
                    password=initial_password(key, holder.id),
                    use=_USE.get(holder.kind, _CHANGE),
                )
                process.stdin.write(page.encode())
            process.stdin.write(b"</body></html>\n")
            process.stdin.close()
        except BrokenPipeError:
            pass  # openssl has ended; its exit code says so
        said = process.stderr.read().decode("utf-8", "replace").strip().splitlines()
        if process.wait():
            raise SlipsRefused(f"openssl cannot write {path}: {said[-1] if said else 'no reason given'}")


class Slips:
    """The slips of one folder; `vault` encrypts the key of a run until its pages are finished."""

    def __init__(self, folder: Path, certificates: list[Path], vault: Vault) -> None:
        self.folder = folder
        self.certificates = certificates
        self.vault = vault
        self.run = ""

    def interrupted(self) -> list[str]:
        """Return the names of runs that never finished, oldest first."""
        return sorted(path.name.removesuffix(_JOURNAL) for path in self.folder.glob(f"*{_JOURNAL}"))

    def recover(self, issued: dict[str, list[Holder]]) -> list[Path]:
        """Finish what interrupted runs have left; return the files with pages.

        `issued` maps each name that `interrupted` gave to the mailboxes whose password is from that run, as the
        directory says. Raises SlipsRefused when a key cannot be decrypted.
        """
        finished = []
        for run in self.interrupted():
            journal, pages = self.folder / f"{run}{_JOURNAL}", self.folder / f"{run}{_PAGES}"
            if issued.get(run):
                write_pages(pages, self.certificates, issued[run], self._key(journal))
                finished.append(self._finish(run))
            else:
                pages.unlink(missing_ok=True)
            journal.unlink()
        return finished

    def begin(self, holders: Iterable[Holder]) -> bytes:
        """Write key and pages for `holders` durably; return the key. `run` is then the name of this run.

        Raises SlipsRefused before anything is written when there is no vault secret.
        """
        if not self.vault.secrets:
            raise SlipsRefused(
                "initial passwords need a vault secret while they are made: "
                "run with --vault-password-file or --ask-vault-pass"
            )
        key = os.urandom(KEY_OCTETS)
        self.run = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        with replaced(self.folder / f"{self.run}{_JOURNAL}") as journal:
            journal.write(self.vault.encrypt(yaml.safe_dump({"key": key.hex()})))
        write_pages(self.folder / f"{self.run}{_PAGES}", self.certificates, holders, key)
        return key

    def finish(self) -> Path:
        """Give the pages of this run their final name, now that its mailboxes exist, and forget the key."""
        final = self._finish(self.run)
        (self.folder / f"{self.run}{_JOURNAL}").unlink()
        return final

    def _finish(self, run: str) -> Path:
        final = self.folder / f"{run}.cms"
        (self.folder / f"{run}{_PAGES}").rename(final)
        sync(self.folder)
        return final

    def _key(self, journal: Path) -> bytes:
        try:
            return bytes.fromhex(yaml.safe_load(self.vault.decrypt(journal.read_bytes()))["key"])
        except (AnsibleError, yaml.YAMLError, KeyError, TypeError, ValueError):
            raise SlipsRefused(
                f"{journal} cannot be decrypted with this run's vault secret: use the one of the interrupted run"
            ) from None
