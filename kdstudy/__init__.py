"""kdstudy: a reproducible study of knowledge distillation. `docs/architecture.md` draws the house."""

__version__ = "0.1.0"
