#!/usr/bin/python3
"""acme-answer NAME [PEER]: answer an ACME server on port 80 (HTTP-01, RFC 8555 section 8.3) for a host called NAME.

Under the name of the service the ACME server reaches the host that has its address, and it may be the other host, PEER,
that asked for the certificate: a token that is not here is looked for there (302). Nothing else is answered.
"""

from __future__ import annotations

import re
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKENS = Path("/var/lib/acme-answer/.well-known/acme-challenge")
PATH = re.compile(r"/\.well-known/acme-challenge/([A-Za-z0-9_-]{1,128})")


def answer(path: str, host: str, name: str, peer: str, tokens: Path = TOKENS) -> tuple[int, str]:
    """Return the HTTP status and, with 200, the key authorization, with 302, where to ask.

    path, host: of the request; name, peer: this host's name and the other's, or "".
    """
    found = PATH.fullmatch(path)
    if not found:
        return 404, ""
    file = tokens / found[1]
    if file.is_file():
        return 200, file.read_text(encoding="ascii")
    if peer and host.partition(":")[0].lower() != name:
        return 302, f"http://{peer}{path}"
    return 404, ""


class Answer(BaseHTTPRequestHandler):
    """One request."""

    timeout = 10
    name = peer = ""

    def do_GET(self) -> None:
        """Answer it."""
        status, text = answer(self.path, self.headers.get("Host", ""), self.name, self.peer)
        self.send_response_only(status)
        if status == 302:
            self.send_header("Location", text)
        body = text.encode() if status == 200 else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    """For both address families."""

    address_family = socket.AF_INET6
    daemon_threads = True

    def server_bind(self) -> None:
        """Take IPv4 too."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


if __name__ == "__main__":
    Answer.name, Answer.peer = sys.argv[1].lower(), (sys.argv[2:] or [""])[0]
    Server(("::", 80), Answer).serve_forever()
