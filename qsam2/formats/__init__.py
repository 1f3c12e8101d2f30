"""File formats of models: packed, float weights, ONNX; the quantization card."""
