"""Results as people read them: HTML, Markdown, terminal and plot."""
