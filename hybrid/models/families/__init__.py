"""Model families: one file each, named after the `model_type` of config.json and found by that name."""
