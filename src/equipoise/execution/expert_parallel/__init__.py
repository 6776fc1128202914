"""A plan executed over processes, each with the slots of its units; batches exchanged by all-to-all."""
