"""Export trained PyTorch models: towers to ONNX, tokenizers to tokenizer.json, and both to a float32 bundle."""
