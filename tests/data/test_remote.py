"""Shards on real servers give the same batches as local ones, whatever fails on the way."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import contents, wait_until

from benchmarks.data.unreliable_server import UnreliableServer
from clip_rd_edge.data import remote, shard_files
from clip_rd_edge.data.load import TrainingData, load_pairs, load_samples
from clip_rd_edge.data.samples import fingerprint
from clip_rd_edge.data.shard_files import close_tars
from clip_rd_edge.data.tasks import load_task
from clip_rd_edge.errors import InputError, UnreachableError
from clip_rd_edge.runtime.labels import read_texts

pytest.importorskip("aiohttp")
Factory = Callable[..., Any]
SHARDS = 4


def test_shards_on_a_web_server_are_read_as_local_ones(server: UnreliableServer, shards: Path) -> None:
    local = load_pairs(f"{shards}/{{000..003}}.tar")
    pairs = load_pairs(f"{server.url}/{{000..003}}.tar::{server.url}/000.tar", weights="1::2")
    assert contents(pairs)[:12] == contents(local)
    assert contents(pairs)[12:] == contents(local)[:3] * 2
    same = load_pairs(f"{server.url}/{{000..003}}.tar")
    assert fingerprint(same) == fingerprint(local)


@pytest.mark.parametrize("faults", [["500", "cut", "429"], ["", "", "cut", "", "503"], ["stall", "", "stall"]])
def test_requests_that_fail_or_stall_are_tried_again_soon(
    server: UnreliableServer, shards: Path, monkeypatch: pytest.MonkeyPatch, faults: list[str]
) -> None:
    if "stall" in faults:
        monkeypatch.setattr(remote, "_READ_TIMEOUT_S", 0.5)
    server.fail = list(faults)
    started = time.monotonic()
    assert contents(load_pairs(f"{server.url}/000.tar")) == contents(load_pairs(f"{shards}/000.tar"))
    assert server.fail == []
    assert time.monotonic() - started < 100  # a busy machine included; aiohttp's limit is 300 s for a whole answer


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_stop_waits_for_no_server_that_does_not_answer(server: UnreliableServer) -> None:
    server.fail = ["stall"] * 99
    program = """
from clip_rd_edge.cli import main
from clip_rd_edge.data.load import load_pairs
main._run = lambda arguments: load_pairs(arguments[0])
main.main()
"""
    process = subprocess.Popen([sys.executable, "-c", program, f"{server.url}/{{000..003}}.tar"])
    wait_until(lambda: len(server.requests) == SHARDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_worker_leaves_its_parents_connections_alone(
    server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_READ_TIMEOUT_S", 20.0)
    shard = remote.RemoteShard(f"{server.url}/000.tar")
    before = remote.version(shard)
    remote._known_versions.clear()

    def work() -> None:
        remote.version(shard)
        gc.collect()

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    started = time.monotonic()
    assert remote.version(shard) == before
    assert time.monotonic() - started < 15


def test_a_server_that_ignores_ranges_is_read_whole(server: UnreliableServer, shards: Path) -> None:
    server.ignores_ranges = True
    assert contents(load_pairs(f"{server.url}/000.tar")) == contents(load_pairs(f"{shards}/000.tar"))


def test_each_shard_is_fetched_once(server: UnreliableServer) -> None:
    source = f"{server.url}/{{000..003}}.tar"
    contents(load_pairs(source))
    server.requests.clear()
    contents(load_pairs(source))
    assert sorted(server.requests) == [f"/{i:03d}.tar" for i in range(SHARDS)]  # only to ask for their versions


@pytest.mark.parametrize("version_header", ["ETag", "Last-Modified"])
def test_a_shard_that_changed_is_fetched_again(
    server: UnreliableServer, write_tar: Factory, encode_image: Factory, version_header: str
) -> None:
    server.version_header = version_header
    source = f"{server.url}/{{000..001}}.tar"
    before, task = contents(load_pairs(source)), load_task(source)
    write_tar(
        server.folder / "001.tar",
        {f"{i}.{s}": encode_image(9) if s == "png" else b"new" for i in (0, 1) for s in ("png", "txt")},
    )  # of the same size, as tars are whole blocks
    after = contents(load_pairs(source))
    assert after[:3] == before[:3]
    assert [captions for _, captions in after[3:]] == [("new",), ("new",)]
    assert load_task(source).questions != task.questions


def test_a_shard_that_was_replaced_since_it_was_indexed_is_not_read_as_the_one_before(server: UnreliableServer) -> None:
    pairs = load_pairs(f"{server.url}/000.tar")
    shard_files.local_path(remote.RemoteShard(f"{server.url}/000.tar")).unlink()
    close_tars()
    shutil.copy(server.folder / "001.tar", server.folder / "000.tar")  # of the same size
    with pytest.raises(UnreachableError, match=r"000\.tar has changed while it was read"):
        pairs.read(0)
    assert load_pairs(f"{server.url}/000.tar").read(0).captions == ("grey 3",)


@pytest.mark.parametrize("fault", ["404", "503"])
def test_a_shard_that_cannot_be_had_is_named(server: UnreliableServer, fault: str) -> None:
    server.fail = [fault] * 99
    with pytest.raises(InputError, match=r"000\.tar (does not exist|could not be fetched)"):
        load_pairs(f"{server.url}/000.tar")


def test_no_message_about_a_shard_shows_a_secret_of_its_address(
    server: UnreliableServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = server.url.removeprefix("http://")
    sources = [
        f"http://user:SECRET@{host}/000.tar?sig=SECRET",
        f"http://{host}/none.tar?sig=SECRET",
        "pipe:echo http://user:SECRET@a/?SECRET >&2; exit 3",
        "xyz://SECRET@a/0.tar?SECRET",
        "https://a/{0.tar?SECRET",
        "https://a/{0}.tar?SECRET",
        "https://user:SECRET@a/pairs.csv?SECRET",
    ]
    loads: list[Callable[[str], object]] = [
        load_pairs,
        load_task,
        lambda source: load_samples(TrainingData(images=source), read_texts),
        lambda source: load_samples(TrainingData(texts=source), read_texts),
    ]
    for source, kinds in [*((source, loads[:1]) for source in sources), (sources[0], loads), (sources[-1], loads)]:
        for load in kinds:
            server.fail = ["403"] * 9
            with pytest.raises(InputError) as caught:
                load(source)
            assert "SECRET" not in f"{caught.value} {caught.value.hint}"
    server.fail = []
    assert load_pairs(sources[0]).name == f"http://{host}/000.tar"
    assert load_task(sources[0]).name == f"http://{host}/000.tar"


def test_a_server_that_goes_away_ends_training_and_replaces_no_pair(server: UnreliableServer, shards: Path) -> None:
    from clip_rd_edge.bundle.preprocess import Preprocessing
    from clip_rd_edge.data.order import StepSampler
    from clip_rd_edge.distillation.loader import ViewDataset, step_loader
    from clip_rd_edge.distillation.pixels import Crops

    pairs = load_pairs(f"{server.url}/{{000..003}}.tar")
    for path in shard_files._cached(remote.RemoteShard(f"{server.url}/000.tar")).parent.glob("*.tar"):
        path.unlink()
    server.fail = ["503"] * 1000
    preprocessing = Preprocessing(size=(8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    dataset = ViewDataset(pairs, preprocessing, [], crops=Crops(scale=(0.9, 1.0)), seed=0, max_bad=1.0)
    sampler = StepSampler(pairs.groups, 4, seed=0, steps=range(3))
    for workers in (0, 1):
        with pytest.raises(UnreachableError, match=r"^The shard http://\S+\.tar could not be fetched: [^\n]*$"):
            list(step_loader(dataset, sampler, workers=workers))


def test_a_command_after_pipe_gives_a_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.01,) * 4)
    local = load_pairs(f"{shards}/{{000..001}}.tar")
    assert contents(load_pairs(f"pipe:cat {shlex.quote(str(shards))}/{{000..001}}.tar")) == contents(local)
    with pytest.raises(InputError, match=r"could not be fetched: exit status \d+: .*No such file"):
        load_pairs(f"pipe:cat {shlex.quote(str(shards))}/9.tar")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell with head")
@pytest.mark.parametrize("bytes_sent", [0, 3000])
def test_a_command_whose_failure_a_pipe_hides_leaves_no_shard_behind(
    shards: Path, monkeypatch: pytest.MonkeyPatch, bytes_sent: int
) -> None:
    monkeypatch.setattr(remote, "_RETRY_DELAYS_S", (0.01,) * 4)
    monkeypatch.chdir(shards)
    expected = contents(load_pairs("000.tar"))
    Path("get").write_text(f"head -c {bytes_sent} 000.tar; echo token expired >&2; exit 1")
    with pytest.raises(InputError, match=r"shard 000\.tar could not be fetched: .*: token expired\.$") as caught:
        load_pairs("pipe:sh get 000.tar | cat")
    assert "run the command by itself" in caught.value.hint
    Path("get").write_text("cat 000.tar")
    assert contents(load_pairs("pipe:sh get 000.tar | cat")) == expected
