"""A mixer under test: its configuration and options, the drawn cases, and the operations that checks use on a case."""
