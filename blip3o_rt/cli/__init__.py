"""The blip3o-rt command. This module imports nothing heavy, so that Ctrl-C is answered from the start."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

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
    if before is signal.default_int_handler:  # else it is ignored, as in the background, or the caller's own
        signal.signal(signal.SIGINT, interrupt)
    try:
        from blip3o_rt.cli.commands import run_safely

        code = run_safely(argv)
    except BaseException as error:  # what became of KeyboardInterrupt on its way here
        if not (_interrupts or isinstance(error, KeyboardInterrupt)):
            raise
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED
    else:
        return INTERRUPTED if _interrupts else code
    finally:
        if before is signal.default_int_handler:  # a process of its own has nothing left to interrupt
            signal.signal(signal.SIGINT, signal.SIG_IGN if argv is None else before)


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
