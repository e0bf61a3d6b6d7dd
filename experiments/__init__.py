"""The paper's figures, one script each. See experiments/README.md."""
