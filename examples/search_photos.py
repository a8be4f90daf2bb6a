"""Find photographs by a text or by another image:  python examples/search_photos.py bundle photos/ "a red car"

The index is kept beside the folder. The next call embeds only images that are new or have changed.
"""

import sys
from pathlib import Path

import clip_rd_edge as edge

bundle, photos, query = sys.argv[1:4]
index = Path(photos).with_suffix(".index")
edge.index(bundle, photos, index)
for hit in edge.search(index, query, top=5):
    print(f"{hit.similarity:.3f}  {hit.path}")
