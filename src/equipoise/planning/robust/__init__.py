"""Placements on ranks that hold on traffic they were not made from."""
