"""Models made fast for inference: plain weights, bfloat16 where the processor multiplies in it, cheaper attention."""
