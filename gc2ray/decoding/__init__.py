"""Decoders: owners of the language model. Prompt embeddings in, tokens out."""
