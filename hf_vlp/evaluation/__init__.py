"""Measures of a model that is handed in: retrieval, zero-shot classification, linear probe."""
