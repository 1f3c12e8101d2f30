"""Many runs compared: sweeps, tables, sensitivity."""
