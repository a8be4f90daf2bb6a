"""Answer like `clip-rd-edge classify BUNDLE IMAGE --json`, written directly with open_clip and torch.

python -m benchmarks.devices.classify_with_torch STUDENT BUNDLE IMAGE [--embed-labels]
"""

import json
import sys
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

student, bundle, path, *options = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{student}")
model.eval()
with np.load(Path(bundle) / "labels.npz") as bank:
    labels = bank["names"].tolist()
    embeddings = torch.from_numpy(bank["levels"] * bank["scales"] if "levels" in bank else bank["embeddings"])
with torch.inference_mode():
    if options == ["--embed-labels"]:
        templates = json.loads((Path(bundle) / "manifest.json").read_text())["templates"]
        tokenizer = open_clip.get_tokenizer(f"local-dir:{student}")
        prompts = tokenizer([template.replace("{}", label) for label in labels for template in templates])
        prompt_embeddings = torch.cat([model.encode_text(batch, normalize=True) for batch in prompts.split(32)])
        embeddings = prompt_embeddings.reshape(len(labels), len(templates), -1).mean(1)
        embeddings = torch.nn.functional.normalize(embeddings, dim=-1)
    image = model.encode_image(preprocess(Image.open(path).convert("RGB"))[None], normalize=True)
    probabilities = (model.logit_scale.exp() * image @ embeddings.float().T).softmax(-1)[0]
top = probabilities.topk(3)
predictions = [{"label": labels[i], "probability": p} for i, p in zip(top.indices, top.values.tolist(), strict=True)]
print(json.dumps({"image": path, "predictions": predictions}))
