"""The delta family: DeltaNet and Gated DeltaNet."""
