"""From pictures and words to tensors, by the rules of each paper; knows no model."""
