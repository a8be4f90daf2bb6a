"""Train a student with a distillation objective: configuration, loader, step, loop, checkpoints, plots."""
