"""The blip3o-rt command. This module imports next to nothing, so that Ctrl-C is answered from the start.

What comes before its first line is Python's: the interpreter ends by the signal itself, or with a traceback
while it imports site, the finder of an editable install or the modules of the console script.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence
    from types import FrameType
else:
    import _signal as signal  # which signal itself wraps in enums, and these import six modules

INTERRUPTED = 130  # what a shell gives for a program ended by Ctrl-C
INTERRUPTED_LINE = "blip3o-rt: interrupted"
_interrupts: list[int] = []  # signals of this command: libraries may lose the exception or raise another


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments; None is those of the process.

    Returns:
        The exit code: 0 done, 1 done and not good enough, 2 refused or failed, 130 interrupted, 141 unread.
    """
    _interrupts.clear()
    before = signal.getsignal(signal.SIGINT)
    ours = before is signal.default_int_handler  # else the caller's own, or ignored as in the background
    try:
        if ours:
            signal.signal(signal.SIGINT, interrupt)
        from blip3o_rt.cli.commands import run_safely

        code = run_safely(argv)
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt
        return INTERRUPTED if _interrupts else code
    except BaseException as error:  # what became of KeyboardInterrupt on its way here
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one line, however often it is pressed
        if not (_interrupts or isinstance(error, KeyboardInterrupt)):
            raise
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED
    finally:
        if ours and argv is not None:  # the process goes on
            signal.signal(signal.SIGINT, before)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end at once where a module is being imported.

    An exception that passes through the initialization of a C extension is lost there or aborts the process.
    Nothing is half written at that time.
    """
    _interrupts.append(number)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{INTERRUPTED_LINE}\n".encode())
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
