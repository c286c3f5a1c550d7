"""What is run on a CUDA device: `python -m bench.gpu`; METHOD.md says how."""
