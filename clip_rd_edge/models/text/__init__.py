"""Text towers and their tokens: built, trimmed, given weights to start from, and run on the positions needed."""
