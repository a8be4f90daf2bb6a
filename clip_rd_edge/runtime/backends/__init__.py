"""One module per inference engine: how it opens a tower. Never imports torch."""
