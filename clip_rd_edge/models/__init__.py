"""Teachers and students as open_clip models: building, loading, saving and running them."""
