"""VSE-infinity: "Learning the Best Pooling Strategy for Visual Semantic Embedding", https://arxiv.org/abs/2011.04305."""
