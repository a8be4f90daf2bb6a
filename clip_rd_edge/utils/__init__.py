"""Helpers shared by every layer: files, locks, host information, timing and progress. Never imports torch."""
