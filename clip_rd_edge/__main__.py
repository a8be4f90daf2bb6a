"""`python -m clip_rd_edge`, the same as the command `clip-rd-edge`."""

from clip_rd_edge.cli.main import main

main()
