"""Pairs of pictures and captions, and the tasks that models are measured on. Never imports torch."""
