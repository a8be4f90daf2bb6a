"""Convert a float32 ONNX bundle to other formats and precisions. Never imports torch."""
