"""Models and mixers in other libraries and formats.

convert/  weights of other libraries' models, both ways
hf/       Hugging Face transformers
onnx/     ONNX files, and what runs them
lm_eval   the model class for lm-evaluation-harness
"""
