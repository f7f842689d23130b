"""The model: from host buffers to parameters. Knows no file."""
