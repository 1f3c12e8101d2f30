"""Block reconstruction: soft rounding, learned activation steps, the blocks, and what they see."""
