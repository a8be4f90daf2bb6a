"""The public Python API, one function per command: `clip_rd_edge` has their names."""
