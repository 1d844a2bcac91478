"""Bundled personas (one JSONL file a domain) and the script that makes them."""
