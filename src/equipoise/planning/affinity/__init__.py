"""Placements that keep a token's next expert near (ExFlow)."""
