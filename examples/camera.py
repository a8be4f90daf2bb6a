"""Print what a camera sees whenever that changes:  python examples/camera.py bundle 0 "a cup" "a phone" "a hand"

Needs `pip install '.[camera]'`. In place of 0, name a device, a stream (rtsp://…) or a video file.
"""

import sys
from collections.abc import Iterable, Iterator

import clip_rd_edge as edge

FRAMES = 5  # a label counts once it has been first in so many frames in a row


def changes(predictions: Iterable[list[edge.Prediction]]) -> Iterator[str]:
    """Yield the label of each frame's first prediction when it has changed and stayed for some frames."""
    shown, label, count = None, None, 0
    for frame in predictions:
        first = frame[0].label if frame else "nothing of these"
        label, count = first, count + 1 if first == label else 1
        if count >= FRAMES and label != shown:
            shown = label
            yield label


if __name__ == "__main__":
    bundle, camera, *labels = sys.argv[1:]
    for seen in changes(edge.load(bundle).classify_camera(camera, labels, none=True)):
        print(seen, flush=True)
