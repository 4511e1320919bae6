"""Ready adapters for the conformance kit, one file per library; each is imported, and needed, only where it is used."""
