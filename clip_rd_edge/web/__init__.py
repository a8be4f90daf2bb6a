"""A page to try bundles on: a small server on this machine, and plain HTML, CSS and JavaScript. Never imports torch."""
