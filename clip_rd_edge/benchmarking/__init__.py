"""What a model is worth and what it costs: accuracy, latency and size, measured and reported. Never imports torch."""
