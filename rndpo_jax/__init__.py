"""Preference fine-tuning of medical image segmentation: DPO and Region-Normalized DPO in JAX."""

__version__ = "0.1.0"
