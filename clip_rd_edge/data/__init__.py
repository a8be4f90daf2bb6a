"""Image-caption pairs for training and tasks for evaluation. Never imports torch."""
