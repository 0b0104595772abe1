"""Hugging Face folders: export_hf writes a Trinity model as one, load_hf reads one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trinity.interop.export import export_hf
    from trinity.interop.load import load_hf

__all__ = ["export_hf", "load_hf"]


def __getattr__(name: str) -> Any:
    """Import a function when it is first used: a tool that needs only tensor names does not import the model."""
    if name == "export_hf":
        from trinity.interop.export import export_hf

        return export_hf
    if name == "load_hf":
        from trinity.interop.load import load_hf

        return load_hf
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
