"""A user's kernel comes first while it is loaded, leaves nothing behind, and fails in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blip3o_rt import ops
from blip3o_rt.errors import OpError
from blip3o_rt.ops.user_kernels import UserKernel, load_kernels

KERNEL = """
import torch
from blip3o_rt import ops

@ops.silu_mul.implementation("{name}", device="cpu", dtypes=(torch.float32,))
def silu_mul(gate_up, *, out=None):
    return torch.full((len(gate_up), gate_up.shape[1] // 2), {value})
"""


@pytest.fixture(autouse=True)
def unchanged() -> None:
    """Every test begins with the implementations that the package has."""
    assert "mine" not in ops.silu_mul.implementation_names


def written(folder: Path, text: str, name: str = "kernel.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_comes_first_where_it_applies_and_is_gone_afterwards(tmp_path: Path) -> None:
    before = ops.silu_mul.implementation_names
    x = torch.ones(2, 8)
    expected = ops.silu_mul(x)
    path = written(tmp_path, KERNEL.format(name="mine", value=7.0))
    with load_kernels([path]) as kernels:
        assert kernels == [UserKernel("silu_mul", "mine", path)]
        assert ops.silu_mul.implementation_names == ["mine", *before]
        assert torch.equal(ops.silu_mul(x), torch.full((2, 4), 7.0))
        bf16 = ops.silu_mul(x.bfloat16())  # not one of its dtypes
        torch.testing.assert_close(bf16.float(), expected, rtol=1e-2, atol=0)
        with ops.force("silu_mul", "torch"):
            torch.testing.assert_close(ops.silu_mul(x), expected, rtol=1e-6, atol=0)
    assert ops.silu_mul.implementation_names == before
    assert torch.equal(ops.silu_mul(x), expected)


def test_first_file_comes_first(tmp_path: Path) -> None:
    first = written(tmp_path, KERNEL.format(name="mine", value=1.0), "first.py")
    second = written(tmp_path, KERNEL.format(name="other", value=2.0), "second.py")
    with load_kernels([first, second]):
        assert ops.silu_mul.implementation_names[:2] == ["mine", "other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "registers no kernel"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\nx = (", "line 2: SyntaxError"),
        (KERNEL.format(name="mine", value=1.0) + "\n1 / 0\n", "line 9: ZeroDivisionError: division by zero"),
        (KERNEL.format(name="torch", value=1.0), "has an implementation 'torch' already"),
    ],
)
def test_bad_file_is_refused_and_leaves_nothing(tmp_path: Path, text: str, message: str) -> None:
    before = ops.silu_mul.implementation_names
    path = written(tmp_path, text)
    with pytest.raises(OpError) as caught, load_kernels([path]):
        pass
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ops.silu_mul.implementation_names == before


def test_a_missing_file_and_one_that_is_not_python(tmp_path: Path) -> None:
    with pytest.raises(OpError, match="there is no such file"), load_kernels([tmp_path / "none.py"]):
        pass
    path = written(tmp_path, "int main() {}", "kernel.cpp")
    with pytest.raises(OpError, match=r"ends in \.py"), load_kernels([path]):
        pass


def test_withdrawn_after_an_error_in_the_block(tmp_path: Path) -> None:
    path = written(tmp_path, KERNEL.format(name="mine", value=1.0))
    with pytest.raises(KeyError), load_kernels([path]):
        raise KeyError
    assert "mine" not in ops.silu_mul.implementation_names


def test_the_definition_is_never_withdrawn() -> None:
    with pytest.raises(OpError, match="is its definition and stays"):
        ops.silu_mul.withdraw("torch")
