"""ONNX: a model as five graphs, and a tracker that runs them without PyTorch."""
