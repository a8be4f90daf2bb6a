"""What every layer needs: files, locks, the host, timing and progress. Never imports torch."""
