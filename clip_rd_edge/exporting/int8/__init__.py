"""INT8: build candidates, measure them against float32, and select one. Never imports torch."""
