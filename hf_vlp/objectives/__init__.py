"""Objectives as pure functions of tensors: no modules, no gathering, no logging."""
