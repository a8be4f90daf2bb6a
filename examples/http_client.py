"""Ask a server for the labels of an image, and for images that fit a text, with nothing but Python itself.

clip-rd-edge serve bundle photos.index &
python examples/http_client.py http://127.0.0.1:8766 photo.jpg "a cat" "a dog"

A server with a token takes it from the variable CLIP_RD_EDGE_TOKEN, and so does this client.
"""

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def ask(server: str, path: str, **body: Any) -> Any:
    """Send a request as JSON, and return the answer; an HTTPError's body has the server's explanation."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("CLIP_RD_EDGE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    with urlopen(Request(f"{server}{path}", json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer)


def main(server: str, image: str, *labels: str) -> None:
    """Classify the image among the labels, and search with the most likely one."""
    encoded = base64.b64encode(Path(image).read_bytes()).decode()
    predictions = ask(server, "/classify", image=encoded, labels=labels)["predictions"]
    for prediction in predictions:
        print(f"{prediction['probability']:6.1%}  {prediction['label']}")
    for hit in ask(server, "/search", query=predictions[0]["label"], top=3)["hits"]:
        print(f"{hit['similarity']:.3f}  {hit['path']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
