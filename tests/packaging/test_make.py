"""`make` on a new machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("make"), reason="of make on Linux")
@pytest.mark.parametrize("has_gpu", [False, True])
def test_torch_is_its_build_for_cpus_where_there_is_no_nvidia_gpu(has_gpu: bool, tmp_path: Path) -> None:
    for name in ("make", "uname", "sh", "python3"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    if has_gpu:
        (tmp_path / "nvidia-smi").symlink_to("/bin/true")
    command = ["make", "-n", "VENV=new", "new/.installed"]
    environment = {**os.environ, "PATH": str(tmp_path)}
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert ("whl/cpu torch" in shown) is not has_gpu
