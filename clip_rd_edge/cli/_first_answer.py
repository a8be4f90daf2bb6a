"""Process for timing a cold start: opens a model, embeds one image and, if it can, one text, and reports back.

python -m clip_rd_edge.cli._first_answer MODEL RUNTIME THREADS IMAGE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from clip_rd_edge.api.models import open_encoder
from clip_rd_edge.bundle.encoder import embeds_texts
from clip_rd_edge.bundle.images import open_image
from clip_rd_edge.utils.host import peak_memory_bytes
from clip_rd_edge.utils.paths import typed

TEXT = "a photo of a cat"


def main() -> None:
    """Print one line of JSON as soon as the embeddings are computed."""
    model, runtime_name, threads, image = sys.argv[1:]
    runtime: Any = runtime_name or None
    encoder = open_encoder(typed(model), runtime=runtime, threads=int(threads))
    encoder.encode_images([open_image(Path(image))])
    if embeds_texts(encoder):
        encoder.encode_texts([TEXT])
    print(json.dumps({"peak_memory_bytes": peak_memory_bytes()}), flush=True)


if __name__ == "__main__":
    main()
