"""Read frames from a camera or a video with OpenCV, which is an optional dependency."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image

from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError

_TIMEOUT_S = 5.0  # for the next frame of a camera


def frames(source: str) -> Iterator[Image.Image]:
    """Yield RGB frames from a camera or a video until it ends.

    A camera or a stream is read at its own rate and only the newest frame is kept, so that a slow model lags by one
    frame instead of a growing queue. All frames of a video are yielded, in order.

    Args:
        source: a camera number such as `0`, or a path or URL that OpenCV can open, such as `/dev/video2`,
            `rtsp://HOST/PATH` or `video.mp4`.

    Raises:
        MissingExtraError: OpenCV is not installed.
        ClipRdEdgeError: the camera or video cannot be opened, or the camera or stream stops sending frames.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingExtraError("opencv-python-headless", extra="camera", purpose="Reading from a camera") from error
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    try:
        if not capture.isOpened():
            raise ClipRdEdgeError(
                f"Cannot open the camera {source}.", hint="list the cameras with ls /dev/video*, or try --camera 1"
            )
        # A stream, as a device, has no number of frames; some files have none either.
        is_video = os.path.isfile(source) or capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0  # noqa: PTH113
        for frame in _all_frames(capture) if is_video and not source.isdigit() else _newest_frames(capture):
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()


def _all_frames(capture: Any) -> Iterator[Any]:
    while True:
        success, frame = capture.read()
        if not success:
            return
        yield frame


def _newest_frames(capture: Any) -> Iterator[Any]:
    """Read frames in a thread as fast as the camera sends them; yield the newest whenever the consumer asks."""
    changed = threading.Condition()
    newest: list[Any] = []  # empty, or the newest frame; None after the last one
    stopping = threading.Event()

    def read() -> None:
        while not stopping.is_set():
            success, frame = capture.read()
            with changed:
                newest[:] = [frame if success else None]
                changed.notify()
            if not success:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            with changed:
                if not changed.wait_for(lambda: newest, timeout=_TIMEOUT_S):
                    raise ClipRdEdgeError(f"The camera sent no frame for {_TIMEOUT_S:.0f} s.")
                frame = newest.pop()
            if frame is None:
                raise ClipRdEdgeError("The camera stopped sending.", hint="check that it is still connected")
            yield frame
    finally:
        # The capture must not be released while the thread is reading from it.
        stopping.set()
        reader.join(timeout=_TIMEOUT_S)
