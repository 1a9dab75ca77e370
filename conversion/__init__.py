"""The originals' checkpoints to folders of hf_vlp, and back: a script per original, each a reversible table of names."""
