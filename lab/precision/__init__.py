"""State precision: the loss of a trained model whose state has fewer bits, its report, and the number formats."""
