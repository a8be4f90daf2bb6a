"""The terms of the distillation objectives, and `Objective`, their weighted sum."""
