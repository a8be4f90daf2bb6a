"""Measure encoders side by side and report: accuracy × latency × size. Never imports torch."""
