"""Export to ONNX and the script that runs the exported model."""
