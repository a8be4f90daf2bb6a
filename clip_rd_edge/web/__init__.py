"""Web demo for bundles: a small local server, and plain HTML, CSS and JavaScript. Never imports torch."""
