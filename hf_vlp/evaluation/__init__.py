"""Measures of a model that is handed in: retrieval, downstream tasks, zero-shot classification, linear probe."""
