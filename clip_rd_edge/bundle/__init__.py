"""What the exporter writes and the device reads: manifest, towers' formats, preprocessing, tokenizer, labels."""
