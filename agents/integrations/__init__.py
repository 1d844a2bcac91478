"""Per-turn credit inside other engines: `trl` for TRL's GRPOTrainer, `verl` for clusters on Ray."""
