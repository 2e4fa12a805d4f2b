"""Keep the byte code of what Python imports from an archive; a lab's hosts load this when Python starts.

Ansible sends its library to a host as an archive with each module, and Python compiles it there anew each time: half of
what a module costs, and the hosts of a lab share the processors of one machine.
"""

import zipimport
from types import CodeType

FOLDER = "/run/byte-code"

_compile_source = zipimport._compile_source  # type: ignore[attr-defined]  # not public, so mypy does not know it


def _kept(pathname: str, source: bytes) -> CodeType:
    # Imported here: every Python program of the host loads this file, few import from an archive.
    import hashlib
    import marshal
    import os

    path = f"{FOLDER}/{hashlib.sha256(source).hexdigest()}"
    try:
        with open(path, "rb") as file:
            code: CodeType = marshal.load(file)
            return code
    except OSError:
        code = _compile_source(pathname, source)
    if os.geteuid() == 0:
        os.makedirs(FOLDER, 0o755, exist_ok=True)
        part = f"{path}.{os.getpid()}"
        with open(part, "wb") as file:
            marshal.dump(code, file)
        os.replace(part, path)
    return code


zipimport._compile_source = _kept  # type: ignore[attr-defined]  # not public, so mypy does not know it
