"""Ready-made adapters for the conformance kit, one module per library, which is imported only when it is used."""
