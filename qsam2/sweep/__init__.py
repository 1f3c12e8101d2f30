"""Many runs compared: sweeps, tables of methods, sensitivity of layers.

`definition` and `table` read the two file formats. Both make a `Plan` of `runner`, which carries out its runs: `study`
for sweeps (Optuna), `scores` for tables, whose `results` are written. `agent` joins a sweep on wandb.ai.
"""
