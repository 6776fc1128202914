"""A plan carried out on a model: slots, dispatch, meters, checkpoints."""
