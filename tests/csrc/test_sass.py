"""The machine code of the CUDA kernels is read, and does what their speed rests on."""

from __future__ import annotations

import pytest

from tests.csrc.resources import OPS
from tests.csrc.sass import Instruction, Kernel, kernels_of, needs_tools, parse, select

USUAL, EXHAUSTIVE = ("row_linear", "silu_mul"), pytest.mark.exhaustive


@needs_tools
def test_kernels_are_found_with_their_instructions() -> None:
    kernels = kernels_of("silu_mul")
    assert set(kernels) == {
        f"silu_mul_kernel<{choice}>" for choice in ("bf16, 1", "bf16, 8", "float, 1", "float, 4")
    }
    for kernel in kernels.values():
        assert len(select(kernel.instructions, "LDG")) == 2  # a gate and an up
        assert select(kernel.instructions, "STG")
        assert kernel.resources.registers > 0


@needs_tools
def test_the_weights_of_a_product_stay_on_their_way() -> None:
    """A slice is copied past the registers, and waited for when those after it are in flight."""
    found = {name: kernel for name, kernel in kernels_of("row_linear").items() if "Loads 2" in name}
    assert len(found) == 9
    for name, kernel in found.items():
        loop = kernel.loop_with("LDGSTS")
        assert len(select(loop, "LDGSTS")) == 8, name
        assert all(copy.signals is None for copy in select(loop, "LDGSTS")), name
        groups = int(name.split(", ")[1])
        assert [str(wait) for wait in select(loop, "DEPBAR")] == [f"DEPBAR.LE SB0, 0x{3 - groups}"], name
        assert not select(loop, "BAR"), name
        normed, pieces = name.endswith("true>"), 4 if "Bfloat16" in name else 8
        assert len(select(loop, "LDG")) <= groups * pieces * (1 + normed), name  # x, and the norm's weight
    assert found["row_linear_bf16_kernel<Bfloat16, 1, Loads 2, false>"].resources.registers <= 64
    assert found["row_linear_bf16_kernel<Bfloat16, 1, Loads 2, true>"].resources.registers <= 80


@needs_tools
@pytest.mark.parametrize(
    "op", [*USUAL, *(pytest.param(op, marks=EXHAUSTIVE) for op in OPS if op not in USUAL)]
)
def test_kernels_wait_for_the_one_before_them(op: str) -> None:
    """Only weights are read before; the next kernel begins behind the wait, and loads are coherent there."""
    for name, kernel in kernels_of(op).items():
        places = [i for i, found in enumerate(kernel.instructions) if found.is_a("ACQBULK", "PREEXIT")]
        wait, let_in = (kernel.instructions[place] for place in places)
        assert wait.is_a("ACQBULK"), name
        assert let_in.is_a("PREEXIT"), name
        before, after = kernel.instructions[: places[0]], kernel.instructions[places[0] :]
        assert not select(before, "ST", "STG", "ATOM", "ATOMG", "RED"), name
        assert not [load for load in after if load.is_a("LDG") and "CONSTANT" in load.opcode], name
        copies, loads = (len(select(before, opcode)) for opcode in ("LDGSTS", "LDG"))
        if "Loads 2" in name:
            assert copies == 8 * (3 - int(name.split(", ")[1])), name  # all stages of the ring but one
        if "Loads" not in name or "Loads 2" in name:
            assert not loads, name


@needs_tools
@pytest.mark.exhaustive
def test_embeddings_are_read_in_wide_loads_once_their_ids_are_there() -> None:
    kernel = kernels_of("advance_windows")["advance_windows_kernel<bf16, 8, false>"]
    before, after = around_the_barrier(kernel)
    assert not select(before, "LDG.E.128")
    opcodes = [found.opcode for found in select(after, "LDG.E.128", "STG.E.128")]
    assert [opcode[:3] for opcode in opcodes[:5]] == ["LDG"] * 4 + ["STG"]  # four are on the way at once
    assert not select(after, "LDG.E.U16")
    assert select(after, "STG.E.128")
    assert kernel.resources.registers <= 64


@needs_tools
@pytest.mark.exhaustive
def test_a_norm_knows_the_second_place_of_a_row_before_it_is_summed() -> None:
    kernel = kernels_of("rms_norm")["rms_norm_kernel<bf16, 8>"]
    before, after = around_the_barrier(kernel)
    assert len(select(before, "LDG.E.64")) == 1
    assert not select(after, "LDG.E.64")
    assert kernel.resources.registers <= 64


def around_the_barrier(kernel: Kernel) -> tuple[list[Instruction], list[Instruction]]:
    """The instructions before and behind the only barrier of a block."""
    (place,) = (index for index, found in enumerate(kernel.instructions) if found.is_a("BAR"))
    return kernel.instructions[:place], kernel.instructions[place + 1 :]


LISTING = """
.text._ZN6blip3o4cuda3abc1kILi4ELb1EEEvi:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
                                                                         /* 0x000fe20000000800 */
.L_x_1:
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;      /* 0x0000000402048981 */
                                                                         /* 0x000ea8000c1e9d00 */
        /*0020*/                   FADD R4, R4, R5 ;                     /* 0x0000000504047221 */
                                                                         /* 0x004fca0000000000 */
        /*0030*/              @P1  BRA `(.L_x_1) ;                       /* 0xfffffffc00e01947 */
                                                                         /* 0x000fea000383ffff */
.L_x_2:
        /*0040*/                   BRA `(.L_x_2);                        /* 0xfffffffc00fc7947 */
                                                                         /* 0x000fc0000383ffff */
"""


def test_a_listing() -> None:
    """A load signals the scoreboard that the addition waits for; a branch to itself is no loop."""
    kernel = parse(LISTING)["k<4, true>"]
    assert [str(i) for i in kernel.instructions[:3]] == [
        "LDC R1, c[0x0][0x28]",
        "LDG.E.128.CONSTANT R4, [R2.64]",
        "FADD R4, R4, R5",
    ]
    load, addition = kernel.instructions[1:3]
    assert load.signals == 2
    assert addition.waits == {2}
    assert list(kernel.loops()) == [kernel.instructions[1:4]]
    assert kernel.loop_with("LDG") == kernel.instructions[1:4]
    assert load.is_a("LDG.E", "STG")
    assert not Instruction("LDGSTS.E", "").is_a("LDG")
