from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

from clip_rd_edge.demo.server import _listen, is_loopback

Run = Callable[..., tuple[int, str, str]]


def test_which_addresses_only_this_machine_reaches() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "192.168.1.2", "::", "example.org"))


def test_answers_are_not_held_back() -> None:
    with _listen("127.0.0.1", 0) as listening:
        # asyncio looks at it before it sets TCP_NODELAY; without that, every answer takes 40 ms.
        assert listening.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_serves_until_ctrl_c_and_says_what_the_network_means(colour_bundle: Path, host: str) -> None:
    command = [sys.executable, "-m", "clip_rd_edge", "demo", str(colour_bundle), "--host", host, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip().replace("0.0.0.0", "127.0.0.1")
        with urllib.request.urlopen(f"{url}api/bundles", timeout=10) as answer:
            assert json.load(answer)["bundles"][0]["name"] == "colours"
    finally:
        server.send_signal(signal.SIGINT)
        _, error = server.communicate(timeout=10)
    assert server.returncode in (0, 130)
    assert "Traceback" not in error
    assert ("everybody on this network" in error) is (host == "0.0.0.0")


def test_a_port_in_use_and_no_bundle(command_line: Run, colour_bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = command_line("demo", colour_bundle, "--port", str(taken.getsockname()[1]))
    assert code == 2
    assert "Cannot listen on 127.0.0.1" in error
    assert "hint: choose another with --port" in error
    code, _, error = command_line("demo", tmp_path / "none")
    assert (code, "is not a bundle" in error) == (2, True)
