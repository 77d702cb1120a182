"""What the documentation states about the code, where the code can be asked."""

from __future__ import annotations

import re
from pathlib import Path

from blip3o_rt import ops

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| `(\w+)` \| `(csrc/cuda|triton_kernels)/(\w+)\.(cu|py)` \|", re.MULTILINE)


def test_every_gpu_kernel_has_a_line_in_the_table_of_what_ran_on_hardware() -> None:
    rows = ROW.findall((ROOT / "docs" / "kernels.md").read_text(encoding="utf-8"))
    assert all((ROOT / folder / f"{file}.{ending}").exists() for _, folder, file, ending in rows)
    stated = [(op, "cuda" if folder == "csrc/cuda" else "triton") for op, folder, _, _ in rows]
    known = [(name, kind) for name, op in ops.all_ops().items() for kind in op.implementation_names]
    assert sorted(stated) == sorted((op, kind) for op, kind in known if kind in ("cuda", "triton"))
