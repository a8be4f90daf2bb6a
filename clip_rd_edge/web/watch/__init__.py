"""The page of `clip-rd-edge watch`: how a run goes, read from what it writes."""
