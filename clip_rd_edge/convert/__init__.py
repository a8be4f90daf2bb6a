"""From a float32 ONNX bundle to every other format and precision. Never imports torch."""
