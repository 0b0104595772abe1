"""Hugging Face folders: export_hf writes a Trinity model as one, load_hf reads one."""

from trinity.interop.export import export_hf
from trinity.interop.load import load_hf

__all__ = ["export_hf", "load_hf"]
