"""Trained models as ONNX files, and what runs them.

from seqmix.interop.onnx import export_onnx

export_onnx("runs/retnet-tiny", Path("retnet-tiny.onnx"))
"""

from .export import OnnxExport, export_onnx, require_packages

__all__ = ["OnnxExport", "export_onnx", "require_packages"]
