"""TensorRT engines, and the files that build them on the device. Never imports torch."""
