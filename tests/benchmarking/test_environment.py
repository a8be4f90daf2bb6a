from __future__ import annotations

import subprocess
import sys

from clip_rd_edge.benchmarking.environment import instruction_sets, this_environment


def test_instruction_sets_of_x86_and_arm() -> None:
    x86 = "processor\t: 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_int8\nprocessor\t: 1\n"
    assert instruction_sets(x86) == ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX INT8")
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp\n"
    assert instruction_sets(arm) == ("Neon", "Neon dot product")
    assert instruction_sets("") == ()


def test_this_machine() -> None:
    environment = this_environment()
    assert "core" in environment.machine
    assert environment.packages.keys() >= {"clip-rd-edge", "numpy", "onnxruntime"}
    assert environment.date.endswith("+00:00")


def test_asking_for_versions_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from clip_rd_edge.benchmarking import environment, run, report, table;"
        "environment.this_environment(); print({'torch', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
