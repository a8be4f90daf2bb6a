"""Pairs from tables of image files and captions: CSV, TSV and Parquet of any number of rows."""
