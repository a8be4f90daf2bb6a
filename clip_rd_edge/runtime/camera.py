"""Read frames from a camera or a video with OpenCV, which is an optional dependency."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from clip_rd_edge.errors import ClipRdEdgeError, InputError, needs_extra
from clip_rd_edge.utils.host import OPENCVS
from clip_rd_edge.utils.paths import is_file, why_no_file

_TIMEOUT_S = 5.0  # for the next frame of a camera


def frames(source: str) -> Iterator[Image.Image]:
    """Yield RGB frames from a camera or a video until it ends.

    A camera or a stream is read at its own rate and only the newest frame is kept, so that a slow model lags by one
    frame instead of a growing queue. All frames of a video are yielded, in order.
    """
    with needs_extra(OPENCVS[0], extra="camera", purpose="Reading from a camera"):
        import cv2
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    try:
        if not capture.isOpened():
            raise _not_opened(source)
        # A stream, as a device, has no number of frames; some files have none either.
        is_video = os.path.isfile(source) or capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0  # noqa: PTH113
        count = 0
        for frame in _all_frames(capture) if is_video and not source.isdigit() else _newest_frames(capture):
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            count += 1
        if not count or _is_cut_off(source):
            raise _unreadable_video(source)
    finally:
        capture.release()


def _not_opened(source: str) -> ClipRdEdgeError:
    if source.isdigit() or source.startswith("/dev/") or "://" in source or " ! " in source:  # a pipeline of GStreamer
        hint = "list the cameras with ls /dev/video*; check that a player on this machine shows a stream"
        return ClipRdEdgeError(f"Cannot open the camera or stream {source}.", hint=hint)
    if not is_file(source):
        return InputError(f"The video {source} {why_no_file(Path(source))}", hint="check the path")
    return _unreadable_video(source)


def _unreadable_video(source: str) -> InputError:
    if _is_cut_off(source):
        return InputError(f"The video {source} is cut off: the end of its file is missing.", hint="copy it again")
    return InputError(
        f"OpenCV reads no frame of the video {source}.", hint="if a player shows it, convert it to MP4 with H.264"
    )


def _is_cut_off(source: str) -> bool:
    """Return whether a file is an MP4 or QuickTime video whose last box is incomplete, as of a broken download.

    The number of frames in a header is not reliable: for a clip that was trimmed without being encoded anew, it counts
    what was trimmed away, and other containers have none, so OpenCV computes one from the duration of the sound.
    """
    if not os.path.isfile(source):  # noqa: PTH113 — Path's raises for long addresses
        return False
    start, kind = 0, b""
    with Path(source).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while start < size:
            file.seek(start)
            header = file.read(16)
            length, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if length == 1:
                length = int.from_bytes(header[8:], "big")
            if length < 8:  # 0: up to the end of the file
                return False
            start += length
    return start > size and kind in (b"moov", b"moof", b"mdat")  # others may be what a camera appends


def _all_frames(capture: Any) -> Iterator[Any]:
    while (read := capture.read())[0]:
        yield read[1]


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
                frame = newest.pop() if changed.wait_for(lambda: newest, timeout=_TIMEOUT_S) else None
            if frame is None:
                raise ClipRdEdgeError("The camera stopped sending.", hint="check that it is still connected")
            yield frame
    finally:
        # The capture must not be released while the thread is reading from it.
        stopping.set()
        reader.join(timeout=_TIMEOUT_S)
