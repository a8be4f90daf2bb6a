"""The teachers of a run: their embeddings, live or on disk, those of the bank, and the texts that they choose."""
