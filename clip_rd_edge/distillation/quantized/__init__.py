"""Quantisation-aware distillation: fine-tune a student under the INT8 rounding that the export will apply."""
