from __future__ import annotations

from clip_rd_edge.runtime.machine import INSTRUCTION_SETS, cpu_quota, instruction_sets, machine_name, usable_cores


def test_instruction_sets_of_x86_and_arm() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\nprocessor\t: 1\n"
    assert instruction_sets(x86) == ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX INT8")
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"
    assert instruction_sets(arm) == ("Neon", "Neon dot product")
    assert instruction_sets("") == ()


def test_instruction_sets_of_macos() -> None:
    said = "hw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    assert instruction_sets(said) == ("Neon", "Neon dot product")
    assert instruction_sets("hw.optional.avx2_0: 1\nhw.optional.avx512f: 0\n") == ("AVX2",)


def test_the_time_that_a_container_gets() -> None:
    assert cpu_quota("150000 100000\n") == 1.5
    assert cpu_quota("max 100000\n") is None
    assert cpu_quota("") is None


def test_this_machine() -> None:
    assert "core" in machine_name()
    assert usable_cores() >= 1
    assert set(instruction_sets()) <= set(INSTRUCTION_SETS.values())
