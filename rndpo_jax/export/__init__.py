"""Trained networks as other programs read them: nnU-Net, safetensors, StableHLO."""
