"""Train a student under an objective: configuration, loader, step, loop, checkpoints, plots."""
