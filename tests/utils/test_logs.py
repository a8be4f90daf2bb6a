"""Libraries are quiet in one thread, and a host program's other threads log meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from support import share_in_threads

from clip_rd_edge.utils.process import quiet_logs


def _in_another_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_library_is_quiet_in_its_thread_alone_and_up_to_the_level(caplog: pytest.LogCaptureFixture) -> None:
    host, library = logging.getLogger("test.host"), logging.getLogger("test.library")
    with quiet_logs(logging.WARNING):
        library.warning("dropped")
        logging.warning("dropped")
        library.error("failed")
        _in_another_thread(lambda: host.warning("heard"))
    library.warning("heard again")
    assert [record.message for record in caplog.records] == ["failed", "heard", "heard again"]


def test_a_logger_with_a_level_can_be_spared(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("test.hub"), "level", logging.WARNING)
    with quiet_logs(logging.ERROR, spare_configured=True):
        logging.getLogger("test.hub.http").warning("retrying")
        logging.getLogger("test.library").error("dropped")
        logging.error("dropped")
        with quiet_logs(logging.WARNING):
            logging.getLogger("test.hub.http").warning("dropped")
        logging.getLogger("test.hub.http").warning("retrying again")
    assert [record.message for record in caplog.records] == ["retrying", "retrying again"]


def test_a_library_adds_no_handler_and_the_host_can(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    with quiet_logs(logging.WARNING):
        logging.warning("dropped")
        assert logging.root.handlers == []
        _in_another_thread(lambda: logging.getLogger("test.host").error("to Python's last resort"))
        _in_another_thread(logging.basicConfig)
        assert len(logging.root.handlers) == 1
    assert capfd.readouterr().err == "to Python's last resort\n"


def test_the_log_is_as_before_when_the_last_thread_has_left() -> None:
    before = logging.Logger.isEnabledFor, logging.basicConfig
    quiet = share_in_threads(
        lambda: quiet_logs(logging.WARNING), lambda: logging.getLogger("test").isEnabledFor(logging.WARNING)
    )
    assert quiet is False
    assert (logging.Logger.isEnabledFor, logging.basicConfig) == before
