"""The project's Python inside a guest: orders for a process that waits there, and the command line itself."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tests.vm.guest import Guest, GuestError, Result

ROOT = Path(__file__).parents[2]
LIMIT_S = 400.0
"""The project's imports take 15 s under software emulation on an idle machine, an attach twice that."""


class Shell:
    """One Python process in the guest that runs inside.py."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self._answers = 0
        guest.check("mkfifo /run/orders; : >/run/answers")
        guest.background("exec sleep 10000 >/run/orders", "/dev/null")  # keeps it open between orders
        command = f"cd {ROOT}; exec {sys.executable} -m tests.vm.inside </run/orders >>/run/answers"
        self._pid = guest.background(command, "/run/shell.log")

    def __call__(self, *order: Any) -> Any:
        """Run one order; return its value: an attachment's record, or an error's `code` and `message`."""
        self._answers += 1
        script = (
            f"echo {shlex.quote(json.dumps(order))} >/run/orders\n"
            f"until test $(wc -l </run/answers) -ge {self._answers}\n"
            f"do kill -0 {self._pid} || exit 3; sleep 0.1; done\n"
            f"sed -n {self._answers}p /run/answers"
        )
        try:
            return json.loads(self.guest.check(script, LIMIT_S))[0]
        except GuestError as error:
            raise GuestError(f"{error}\n{self.guest.check('cat /run/shell.log')}") from error


def command_line(guest: Guest, *words: str) -> Result:
    """Run the `nbdvvol` command in the guest, as a person would; its time limit is that of an order."""
    return guest.run(f"cd {ROOT}; {shlex.join([sys.executable, '-m', 'nbdvvol', *words])}", LIMIT_S)
