"""Accuracy × latency × size of several models in one run. Never imports torch."""
