"""What `utils` trains with: data, the optimizer, the training step, files and figures."""
