"""Programs of Python in processes of their own, which begin where PyTorch has been imported.

That takes seconds. One process of the session imports it and uses nothing of it; each program is a fork of
that one.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 300  # after which a program is ended; far more than any takes

SERVER = """
import json, os, signal, sys, traceback
import torch

def run(program):
    signal.alarm(program["seconds"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    for number, name in enumerate((os.devnull, program["output"], program["errors"])):
        os.dup2(os.open(name, os.O_RDWR), number)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["folder"])
    sys.argv = ["-c", *program["arguments"]]
    try:
        exec(program["code"], {"__name__": "__main__"})
    except SystemExit as end:
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(json.loads(line))
            sys.stdout.flush()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_python(
    code: str, *arguments: object, folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program.

    Args:
        code: The program.
        *arguments: Its sys.argv[1:].
        folder: Where it runs.
        **environment: Variables beside those of this process; none of OpenMP, which PyTorch has read.
    """
    assert not any(name.startswith("OMP_") for name in environment)
    with tempfile.TemporaryDirectory() as written:
        output, errors = Path(written, "output"), Path(written, "errors")
        output.touch()
        errors.touch()
        program = {
            "code": code, "arguments": [*map(str, arguments)], "folder": str(folder or Path.cwd()),
            "environment": {**os.environ, **environment}, "seconds": SECONDS,
            "output": str(output), "errors": str(errors),
        }  # fmt: skip
        served = server()
        assert served.stdin is not None
        assert served.stdout is not None
        print(json.dumps(program), file=served.stdin, flush=True)
        line = served.stdout.readline()
        assert line, f"the process that programs are forked from ended with {served.wait()}"
        return subprocess.CompletedProcess([code], int(line), output.read_text(), errors.read_text())


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that programs are forked from; it ends with this one."""
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # numpy's library starts its threads at once
    return subprocess.Popen(command, env=single, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
