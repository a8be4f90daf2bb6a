"""Compare the accuracy, latency and size of several models in one run. Never imports torch."""
