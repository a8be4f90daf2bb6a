"""Running a bundle on a device. Never imports torch."""
