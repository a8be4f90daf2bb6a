"""The contract between the exporter of a bundle and the device that runs it. Never imports torch."""
