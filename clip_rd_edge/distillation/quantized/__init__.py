"""Distilling for INT8: fine-tuning a student under the rounding that the export will apply."""
