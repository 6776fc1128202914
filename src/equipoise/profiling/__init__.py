"""A model and text become a Profile: texts, sequences, one pass over the model, importance of each expert."""
