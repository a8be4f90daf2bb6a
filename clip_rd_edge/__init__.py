"""clip-rd-edge: CLIP from the data centre to the device. Importing it imports nothing heavy."""

__version__ = "0.1.0"
