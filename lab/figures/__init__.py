"""Figures: values (`figure`), colours (`theme`), Altair charts (`charts`, `libraries`), a `page`, a file (`writer`)."""
