"""An image of the published size, of random weights, fits a machine of 16 GiB, as docs/checkpoints.md says.

What was resident at most is read from the system, pages of mapped files included, of which it can drop most.
It writes 17 GiB of files and takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from blip3o_rt.measure.random_checkpoint import write_random_checkpoint

GIB = 2**30
RESIDENT, OWN, FILES = 12 * GIB, 4 * GIB, 20 * GIB  # at most, also without mapped files; of disk

DRAW = """
import json, sys
from blip3o_rt import Pipeline
pipe = Pipeline.load(sys.argv[1], device="cpu", dtype=sys.argv[2])
(image,) = pipe.generate("a red circle on a blue background", steps=1)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
resident, own = (int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
print(json.dumps({"size": image.size, "resident": resident, "own": own}))
"""

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc"),
    pytest.mark.skipif(psutil.virtual_memory().total < RESIDENT, reason="needs 12 GiB of memory"),
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    if shutil.disk_usage(folder).free < FILES:
        pytest.skip("needs 20 GiB of disk")
    write_random_checkpoint(folder / "source", "published", shards=3)
    command = [
        sys.executable,
        "-m",
        "blip3o_rt",
        "convert",
        str(folder / "source"),
        str(folder / "converted"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(folder / "source")
    return folder / "converted"


@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_an_image_fits_a_machine_of_16_gib(converted: Path, dtype: str) -> None:
    command = [sys.executable, "-c", DRAW, str(converted), dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] == [1024, 1024]
    assert found["resident"] < RESIDENT
    assert found["own"] < OWN  # when the image is done
