"""The processes of a run: how they share work, notice that one is lost, and stop."""
