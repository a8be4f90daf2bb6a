"""The batches of a run: which samples a step takes, the way of their pixels, and the replay of reinforced ones."""
