"""Routing policies: other rules than the model's own for which experts a token goes to."""
