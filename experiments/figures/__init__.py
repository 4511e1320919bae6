"""Figures: values (`figure`), their colours (`theme`), Altair charts of them (`charts`), a page, a file (`writer`)."""
