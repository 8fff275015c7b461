"""The distillation engine: the ground floor, shipped whole to the GPU host and importing no other floor."""
