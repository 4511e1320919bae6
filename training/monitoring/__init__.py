"""What a run reports: events, metrics, loggers, memory and peak rates."""
