from __future__ import annotations

import subprocess
import sys

from clip_rd_edge.benchmarking.results import this_environment


def test_the_environment_describes_this_machine() -> None:
    environment = this_environment()
    assert "core" in environment.machine
    assert environment.packages.keys() >= {"clip-rd-edge", "numpy", "onnxruntime"}
    assert environment.date.endswith("+00:00")


def test_reading_package_versions_imports_neither_torch_nor_onnxruntime() -> None:
    program = (
        "import sys; from clip_rd_edge.benchmarking import results, run;"
        "from clip_rd_edge.benchmarking.report import text;"
        "results.this_environment(); print({'torch', 'onnxruntime', 'matplotlib'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
