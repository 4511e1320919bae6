"""Training on several processes: process groups, sharded parameters, and estimates of a layout's cost."""
