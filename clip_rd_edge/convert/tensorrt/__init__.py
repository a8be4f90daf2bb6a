"""TensorRT engines and what builds them on the device. Never imports torch."""
