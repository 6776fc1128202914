"""Equipoise keeps the load of sparse Mixture-of-Experts models in balance at inference."""

__version__ = "0.1.0"
