"""The memory bank: an exact cache of keys and values, fewer keys, and a state that does not grow."""
