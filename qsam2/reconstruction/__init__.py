"""Block reconstruction: soft rounding and learned activation steps, fitted block by block to the float model."""
