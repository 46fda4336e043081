"""Folders of trained nnU-Net v2 models: plans, weights, and networks of `models.nnunet` of them."""
