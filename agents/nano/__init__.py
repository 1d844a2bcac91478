"""The bundled tiny language model and the script that makes it (see MODEL_CARD.md)."""
