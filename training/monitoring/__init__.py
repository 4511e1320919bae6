"""Reports of a run: events, metrics, loggers, memory and peak rates."""
