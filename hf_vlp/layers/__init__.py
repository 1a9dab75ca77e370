"""Parts that several architectures are built from; none of them knows a model."""
