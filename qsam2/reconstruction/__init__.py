"""Block reconstruction: soft rounding and learned activation steps, fitted block by block to the float model.

`reconstruct` goes through the `blocks`; for each, `capture` records calls and `fit_block` fits `rounding`. Optionally
`fit_video` then fits the steps of all blocks on data of three `time_scales`.
"""
