"""What an MoE model is, for every architecture of transformers: its layers, its experts, its routing, its tokens."""
