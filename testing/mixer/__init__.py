"""A mixer under test: its configuration and options, the cases that are drawn, and what a check does with one."""
