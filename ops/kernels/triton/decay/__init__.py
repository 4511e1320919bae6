"""The decay family in Triton: scalar decays (`launch`, `bodies`) and a decay per key dimension (`per_key_*`)."""
