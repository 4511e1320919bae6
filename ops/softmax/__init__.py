"""The softmax family: attention."""
