"""ALBEF: "Align before Fuse: Vision and Language Representation Learning with Momentum Distillation", https://arxiv.org/abs/2107.07651."""
