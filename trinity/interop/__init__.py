"""Hugging Face folders: export_hf writes one of our model, load_hf reads one into it."""

from trinity.interop.export import export_hf
from trinity.interop.load import load_hf

__all__ = ["export_hf", "load_hf"]
