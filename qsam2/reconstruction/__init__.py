"""Block reconstruction: soft rounding and learned activation steps, fitted block by block to the float model.

`block_by_block` goes through the `blocks` and their captured calls; `fit_block` fits the `rounding` of each. Optionally
`fit_video` then fits the steps of all blocks on data of three time scales.
"""
