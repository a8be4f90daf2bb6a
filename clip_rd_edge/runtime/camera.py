"""Frames of a camera, the newest first come, or of a film; OpenCV is an extra."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image

from clip_rd_edge.errors import ClipRdEdgeError, MissingExtraError

_PATIENCE_S = 5.0  # how long a camera may take for its next frame


def frames(source: str) -> Iterator[Image.Image]:
    """RGB pictures from a camera until it ends.

    A camera's frames are taken at its own pace and only the newest is kept, so that a slow model lags by one frame
    and not by a queue of them. A film's frames all come, in order.

    Args:
        source: a camera's number, such as `0`, or a film's path or address, as OpenCV opens it.

    Raises:
        MissingExtraError: OpenCV is not installed.
        ClipRdEdgeError: the camera or film cannot be opened, or a camera stops sending.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingExtraError("opencv-python-headless", extra="camera", purpose="A camera") from error
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    try:
        if not capture.isOpened():
            raise ClipRdEdgeError(
                f"The camera {source} cannot be opened.", hint="see which there are: ls /dev/video*; or try --camera 1"
            )
        for frame in _newest(capture) if source.isdigit() else _every(capture):
            yield Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    finally:
        capture.release()


def _every(capture: Any) -> Iterator[Any]:
    while True:
        there, frame = capture.read()
        if not there:
            return
        yield frame


def _newest(capture: Any) -> Iterator[Any]:
    """Read in a thread as fast as the camera sends; hand over what is newest when the model is free."""
    changed = threading.Condition()
    newest: list[Any] = []
    stopping = threading.Event()

    def read() -> None:
        while not stopping.is_set():
            there, frame = capture.read()
            with changed:
                newest[:] = [frame if there else None]
                changed.notify()
            if not there:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            with changed:
                if not changed.wait_for(lambda: newest, timeout=_PATIENCE_S):
                    raise ClipRdEdgeError(f"The camera sent no picture for {_PATIENCE_S:.0f} s.")
                frame = newest.pop()
            if frame is None:
                raise ClipRdEdgeError("The camera stopped sending.", hint="is it still connected?")
            yield frame
    finally:
        # The capture must not be released while the thread reads from it.
        stopping.set()
        reader.join(timeout=_PATIENCE_S)
