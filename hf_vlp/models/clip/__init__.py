"""CLIP: "Learning Transferable Visual Models From Natural Language Supervision", https://arxiv.org/abs/2103.00020."""
