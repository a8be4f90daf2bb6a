"""INT8: candidates are made, measured beside float32, and one is chosen. Never imports torch."""
