"""Speed and memory of quantization, beside those of other libraries."""
