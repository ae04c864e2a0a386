"""Processes that die with their parent, by Linux's parent death signal."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1

#: A parent that wants its child to end with it puts its own process id here.
PARENT_VARIABLE = "CPTJOB_PARENT_PID"


def signal_on_parent_death(number: signal.Signals, parent: int) -> bool:
    """Asks the kernel for signal ``number`` when the process that started this one dies.

    ``parent`` is the process id the caller expects its parent to have. False when that parent was
    dead before the kernel was asked: then no signal will come, and the caller must end by itself.
    The kernel watches the thread that forked, so such children are started from the main thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    return os.getppid() == parent


def follow_parent(number: signal.Signals) -> bool:
    """`signal_on_parent_death` for the parent that named itself in the environment, if one did.

    The variable is removed: a grandchild has another parent. False when the parent is dead already.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    return parent is None or signal_on_parent_death(number, int(parent))
