"""One module per inference engine, and how each opens a tower. Never imports torch."""
