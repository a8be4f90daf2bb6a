from __future__ import annotations

import itertools
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clip_rd_edge.errors import ClipRdEdgeError, InputError
from clip_rd_edge.runtime.camera import frames


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """In OpenCV's place, a module to which a test adds its VideoCapture."""
    convert = {4: lambda frame: frame[..., ::-1]}
    module = SimpleNamespace(
        CAP_PROP_FRAME_COUNT=7, COLOR_BGR2RGB=4, cvtColor=lambda frame, code: convert[code](frame).copy()
    )
    monkeypatch.setitem(sys.modules, "cv2", module)
    return module


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
            return True, np.full((4, 4, 3), (sent[-1], 50, 100), dtype=np.uint8)

        def release(self) -> None:
            sent.append("released")

    opencv.VideoCapture = Camera
    seen = []
    with pytest.raises(ClipRdEdgeError):  # noqa: PT012
        for frame in frames(source):
            seen.append(frame.getpixel((0, 0)))
    assert len(seen) < 20  # this camera is faster than any consumer: old frames were dropped
    assert seen == sorted(seen)
    assert {pixel[:2] for pixel in seen} <= {(100, 50)}  # OpenCV's order is blue, green, red
    assert sent[-1] == "released"


def video_of(opencv: SimpleNamespace, count: int) -> SimpleNamespace:
    """A video with this number of frames, which says that it has 9."""
    video = SimpleNamespace(isOpened=lambda: True, release=lambda: None, get={opencv.CAP_PROP_FRAME_COUNT: 9.0}.get)
    levels = iter(range(count))
    video.read = lambda: next(
        ((True, np.full((4, 4, 3), (level, 50, 100), np.uint8)) for level in levels), (False, None)
    )
    return video


def unopened(source: int | str) -> SimpleNamespace:
    return SimpleNamespace(isOpened=lambda: False, release=lambda: None)


def test_a_video_that_cannot_be_opened_is_wrong_input(opencv: SimpleNamespace, tmp_path: Path) -> None:
    opencv.VideoCapture = unopened
    (tmp_path / "sound.mp4").write_bytes(b"no picture")
    (tmp_path / "part.mp4").write_bytes(box(b"ftyp", 8) + box(b"mdat", 40)[:20])
    for name in ("sounds.mp4", "", "sound.mp4", "part.mp4"):
        with pytest.raises(InputError) as raised:
            next(frames(str(tmp_path / name)))
        assert raised.value.hint
        assert "/dev" not in raised.value.hint


def box(kind: bytes, size: int) -> bytes:
    """A box of an MP4 file."""
    return struct.pack(">I", size) + kind + bytes(size - 8)


HEAD = box(b"ftyp", 24) + box(b"moov", 80)
LONG = struct.pack(">I4sQ", 1, b"mdat", 60) + bytes(44)
SIZED = [HEAD + rest for rest in (box(b"mdat", 60), LONG, LONG + box(b"moof", 32) + box(b"mdat", 60))]
WHOLE = [
    *SIZED,
    SIZED[0] + b"GPS 52.1 4.3 12:00",  # what a dashcam appends
    HEAD + struct.pack(">I", 0) + b"mdat" + bytes(50),  # up to the end
    b"RIFF" + bytes(60),
]
CUT = [content[:-missing] for content in SIZED for missing in (1, 40)]


@pytest.mark.parametrize(("content", "is_cut"), [*((each, False) for each in WHOLE), *((each, True) for each in CUT)])
def test_a_video_that_is_cut_off_is_an_error_after_its_last_frame(
    opencv: SimpleNamespace, tmp_path: Path, content: bytes, is_cut: bool
) -> None:
    """One that may be whole is none, though its header counts more frames: those that an editor took away, too."""
    (tmp_path / "video").write_bytes(content)
    opencv.VideoCapture = lambda source: video_of(opencv, 3)
    seen = frames(str(tmp_path / "video"))
    assert len(list(itertools.islice(seen, 3))) == 3
    if is_cut:
        with pytest.raises(InputError):
            next(seen)
    else:
        assert list(seen) == []
