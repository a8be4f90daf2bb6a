"""What measures the package: `python -m benchmarks.FOLDER.SCRIPT`, from the repository's root. Not installed."""
