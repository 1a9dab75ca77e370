"""ViLT: "ViLT: Vision-and-Language Transformer Without Convolution or Region Supervision", https://arxiv.org/abs/2102.03334."""
