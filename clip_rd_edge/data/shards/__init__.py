"""Pairs from WebDataset shards: tars here or elsewhere, their indices, and the cache of those that were fetched."""
