"""Records of any task: read, checked, drawn into image-text pairs, batched."""
