"""What follows traffic while a model serves: watch, decide, make copies ahead, exchange them between forward passes."""
