"""The Windows build of Python under Wine; needs `apt-get install wine64`, and `benchmarks.devices.windows` once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.devices.windows import CACHE, environment, interpreter

wine = pytest.mark.skipif(
    not shutil.which("wine") or not (CACHE / "complete").is_file(), reason="Wine or Python for Windows is not set up"
)


@wine
@pytest.mark.slow
def test_a_file_that_others_read_is_replaced_on_windows(tmp_path: Path) -> None:
    """Without trying again, a third of the writes failed, and one in twenty reads."""
    (tmp_path / "race.py").write_text(
        "import subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from clip_rd_edge.utils.files import read_limited, write_text\n"
        "path = Path('index.json')\n"
        "if sys.argv[1:]:\n"
        "    while not Path('end').exists():\n"
        "        assert len(read_limited(path, 2000)) == 1000\n"
        "        time.sleep(0.005)\n"
        "    sys.exit()\n"
        "write_text(path, 'x' * 1000)\n"
        "readers = [subprocess.Popen([sys.executable, 'race.py', 'read']) for _ in range(3)]\n"
        "end = time.monotonic() + 10\n"
        "while time.monotonic() < end:\n"
        "    write_text(path, 'y' * 1000)\n"
        "Path('end').touch()\n"
        "print('ends', *[reader.wait() for reader in readers])\n"
    )
    result = subprocess.run(
        [*interpreter(), "race.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert "ends 0 0 0" in result.stdout, result.stderr
