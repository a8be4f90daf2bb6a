"""An index of an image folder: built, kept up to date, watched, and searched, exactly or by a graph."""
