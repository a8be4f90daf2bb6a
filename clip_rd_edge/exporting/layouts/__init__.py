"""One module per layout: folders for other programs."""
