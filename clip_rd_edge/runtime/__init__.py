"""Run bundles on a device. Never imports torch."""
