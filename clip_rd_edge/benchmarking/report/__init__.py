"""Benchmark reports as HTML, Markdown, terminal tables and a plot."""
