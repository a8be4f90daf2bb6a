"""python fastembed_client.py FOLDER REQUEST: print the embeddings of a request's images and texts as JSON."""

import json
import sys
from pathlib import Path

from fastembed import ImageEmbedding, TextEmbedding
from fastembed.common.model_description import DenseModelDescription, ModelSource, PoolingType
from fastembed.image.onnx_embedding import supported_onnx_models

folder, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
size = json.loads((Path(folder) / "config.json").read_text())["projection_dim"]
TextEmbedding.add_custom_model(
    "edge/text", pooling=PoolingType.DISABLED, normalization=False, sources=ModelSource(hf="edge/text"), dim=size,
    model_file="onnx/text_model.onnx",
)  # fmt: skip
description = {"description": "", "license": "", "size_in_GB": 0.1, "sources": ModelSource(hf="edge/image")}
supported_onnx_models.append(
    DenseModelDescription(model="edge/image", dim=size, model_file="onnx/vision_model.onnx", **description)
)
texts = TextEmbedding("edge/text", specific_model_path=folder)
images = ImageEmbedding("edge/image", specific_model_path=folder)
result = {
    "text_embeds": [row.tolist() for row in texts.embed(request["texts"])],
    "image_embeds": [row.tolist() for row in images.embed(request["images"])],
}
print(json.dumps(result))
