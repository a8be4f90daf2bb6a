"""What the producer of a bundle and the device agree on. Never imports torch."""
