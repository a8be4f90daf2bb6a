from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError
from clip_rd_edge.installation import install_command
from clip_rd_edge.runtime.camera import frames


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In OpenCV's place, a module to which a test adds its VideoCapture; colours stay as they are."""
    module = SimpleNamespace(CAP_PROP_FRAME_COUNT=7, COLOR_BGR2RGB=4, cvtColor=lambda frame, code: frame)
    monkeypatch.setitem(sys.modules, "cv2", module)
    return module


def test_missing_opencv_is_reported_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingExtraError) as raised:
        next(frames("0"))
    assert raised.value.hint == install_command("camera")


def test_every_frame_of_a_video_is_yielded_as_rgb(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    video = tmp_path / "video.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for blue in (0, 255):
        writer.write(np.full((48, 64, 3), (blue, 0, 255 - blue), dtype=np.uint8))
    writer.release()
    red, blue = frames(str(video))
    assert red.size == (64, 48)
    assert red.getpixel((5, 5))[0] > 200 > 50 > red.getpixel((5, 5))[2]  # type: ignore[index]
    assert blue.getpixel((5, 5))[2] > 200  # type: ignore[index]


@pytest.mark.parametrize("source", ["0", "/dev/video2", "rtsp://camera/stream"])
def test_a_slow_model_gets_the_newest_frames_until_the_camera_stops(opencv: SimpleNamespace, source: str) -> None:
    sent = []

    class Camera:
        def __init__(self, opened: int | str) -> None:
            assert opened == (0 if source == "0" else source)

        def get(self, key: int) -> float:
            return -1.0

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def read(self) -> tuple[bool, np.ndarray | None]:
            if len(sent) == 20:
                return False, None
            sent.append(len(sent))
            return True, np.full((4, 4, 3), sent[-1], dtype=np.uint8)

        def release(self) -> None:
            sent.append("released")

    opencv.VideoCapture = Camera
    seen = []
    with pytest.raises(ClipRdEdgeError, match="stopped sending"):  # noqa: PT012
        for frame in frames(source):
            seen.append(frame.getpixel((0, 0)))
    assert len(seen) < 20  # this camera is faster than any consumer: old frames were dropped
    assert seen == sorted(seen)
    assert sent[-1] == "released"


def test_every_frame_of_a_video_on_a_server_is_yielded(opencv: SimpleNamespace) -> None:
    video = SimpleNamespace(isOpened=lambda: True, release=lambda: None, get={opencv.CAP_PROP_FRAME_COUNT: 9.0}.get)
    levels = iter(range(9))
    video.read = lambda: next(((True, np.full((4, 4, 3), level, np.uint8)) for level in levels), (False, None))
    opencv.VideoCapture = lambda source: video
    seen = [frame.getpixel((0, 0)) for frame in frames("https://server/video.mp4")]
    assert seen == [(level,) * 3 for level in range(9)]


def test_a_missing_video_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    with pytest.raises(ClipRdEdgeError, match="Cannot open the camera"):
        next(frames(str(tmp_path / "none.avi")))
