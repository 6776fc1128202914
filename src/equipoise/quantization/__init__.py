"""Expert weights in fewer bits: formats, packing, rounding."""
