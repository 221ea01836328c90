"""Rankings of layers, one file each."""
