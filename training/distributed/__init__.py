"""Training on several processes: process groups, sharded parameters, and what a layout costs."""
