"""A daemon that was started by `up` ends when `up` is gone, however it went.

The kernel kills the process when its parent's starting thread ends (PR_SET_PDEATHSIG). Acknowledged writes
are in the kernel's hands by then: a process's death loses none of them.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Die by SIGKILL as soon as the process `parent`, which started this one, is gone. 0: do nothing."""
    if not parent:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        # It went before the line above; nobody would tell us any more.
        os._exit(1)
