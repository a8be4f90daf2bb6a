"""Teachers and students: everything that is an open_clip model."""
