"""Every option of the commands and of the Python API, each declared once. No PyTorch."""
