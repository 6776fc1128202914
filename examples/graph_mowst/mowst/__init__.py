"""Mowst (arXiv:2311.05185) on graphs: a weak expert that sees a node, a strong one that sees its neighbourhood, and a gate."""
