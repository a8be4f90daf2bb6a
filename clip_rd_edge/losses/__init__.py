"""The terms of the distillation objectives, one idea a file, and `Objective`, which adds up those that weigh."""
