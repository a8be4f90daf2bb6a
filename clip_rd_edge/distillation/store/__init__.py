"""The teacher's embeddings on disk: computed once, read row by row."""
