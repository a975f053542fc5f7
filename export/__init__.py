"""Explanation graph to ONNX."""
