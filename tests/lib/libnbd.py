"""libnbd from Debian's own Python: scripts run there by subprocess, with parameters and results as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.lib.procs import run

PYTHON = Path("/usr/bin/python3")
PRELUDE = '''
import errno, hashlib, json, random, sys
import nbd
P = json.loads(sys.argv[1])
MiB = 1 << 20

def connect(uri=None, contexts=(), structured=True):
    """A connected handle."""
    h = nbd.NBD()
    for context in contexts:
        h.add_meta_context(context)
    h.set_request_structured_replies(structured)
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri or P["uri"])
    return h

def error(call, *args, **kwargs):
    """The errno of a call that must fail."""
    try:
        call(*args, **kwargs)
    except nbd.Error as failure:
        return failure.errnum
    raise AssertionError(f"{call.__name__}{args} succeeded")
'''


def libnbd(script: str, timeout_s: float = 60.0, **parameters: Any) -> Any:
    """Run a script that may use `nbd`, `P`, `connect` and `error`; return what it put into `result`."""
    probe = run([PYTHON, "-c", "import nbd"], check=False)
    assert probe.returncode == 0, f"libnbd's Python module is missing: apt-get install python3-libnbd\n{probe.stderr}"
    source = f"{PRELUDE}\nresult = None\n{script}\nprint(json.dumps(result))\n"
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in parameters.items()}
    done = run([PYTHON, "-c", source, json.dumps(plain)], timeout_s=timeout_s)
    return json.loads(done.stdout.splitlines()[-1])
